"""Summaries of certificates over images. Abstaining is never correct; every image is in the denominator."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


def acr(radii: ArrayLike, correct: ArrayLike) -> float:
    """Average certified radius: the mean over images of radius * [correct] (Zhai et al., MACER, ICLR 2020).

    It grows with the n that the radii were certified with: comparable only at equal n and alpha.
    """
    radii, correct = _certificates(radii, correct)
    return float(np.mean(radii * correct))


def certified_accuracy(radii: ArrayLike, correct: ArrayLike, r: float) -> float:
    """Share of images certified correctly against every perturbation of l2 norm below r: radius >= r and > 0.

    At r = 0 that is certified at all. Radii must be unrounded: rounding to three digits lifts 0.4996 to 0.5.
    """
    if not r >= 0:
        raise ValueError(f"r >= 0 must hold, but got r={r}")
    radii, correct = _certificates(radii, correct)
    return float(np.mean(correct & (radii >= r) & (radii > 0)))


def best_over_sigma(
    certificates: Mapping[float, tuple[ArrayLike, ArrayLike]], r: Iterable[float]
) -> dict[float, tuple[float, float]]:
    """The envelope that the papers' tables report: radius -> (certified accuracy, the sigma that has the most).

    ``certificates`` maps sigma to (radii, correct) of the model at that sigma; of several the smallest is named.
    It is no certified accuracy of a single model, and a little optimistic, as sigma is chosen on the same images.
    """
    if not certificates:
        raise ValueError("certificates must hold at least one sigma")
    return {
        radius: max(((certified_accuracy(*certificates[sigma], radius), sigma) for sigma in sorted(certificates)),
                    key=lambda best: best[0])
        for radius in r
    }  # fmt: skip


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over images, its standard error, and the ends of its confidence interval."""

    mean: float
    se: float
    low: float
    high: float


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> PairedDifference:
    """Student's t interval of a - b on the same N >= 2 images; a and b (N,) are e.g. radius * correct.

    It speaks of images drawn like these. It is void if one of the models was chosen on these images.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"a and b must be (N,) with N >= 2, but got {a.shape} and {b.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"0 < confidence < 1 must hold, but got confidence={confidence}")
    difference = a - b
    mean = float(difference.mean())
    se = float(difference.std(ddof=1) / np.sqrt(len(a)))
    margin = float(special.stdtrit(len(a) - 1, (1 + confidence) / 2)) * se
    return PairedDifference(mean, se, mean - margin, mean + margin)


def _certificates(radii: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    radii, correct = np.asarray(radii, np.float64), np.asarray(correct)
    if radii.ndim != 1 or radii.shape != correct.shape or not len(radii):
        raise ValueError(f"radii and correct must be (N,) with N >= 1, but got {radii.shape} and {correct.shape}")
    if not (np.isfinite(radii) & (radii >= 0)).all():
        raise ValueError("radii must be finite and >= 0")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("correct must hold only 0 and 1")
    return radii, correct.astype(np.bool_)
