"""The certificates of one model, and how they follow from its votes."""

from dataclasses import dataclass

import numpy as np

from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.smoothing.modes import MODES, Votes
from cadis_ray.smoothing.noise import Stream


@dataclass(frozen=True)
class Certificates:
    """The certificates of one model on the test images, one row an image; arrays share one length.

    ``mode``: how many samples an image got, ``protocol`` n, ``sequential`` at most n. ``predict`` is -1 where the
    procedure abstains (radius 0, never correct). ``radius`` is l2, unrounded. ``selection`` and ``estimation``
    (N, K + 1): the votes all of it follows from, the last column being votes for no class.
    """

    name: str
    mode: str
    sigma: float
    n0: int
    n: int
    alpha: float
    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray
    selection: np.ndarray
    estimation: np.ndarray
    p_a_lower: np.ndarray


def certificates_from(
    name: str, base: Configuration, ids: np.ndarray, labels: np.ndarray, votes: Votes, seconds: np.ndarray | None = None
) -> Certificates:
    """What follows from a model's votes (N, K + 1) of each stream on the images ``ids`` (N,), in the base's mode."""
    settings, sigma = base.certification, base.sigma
    conclude = MODES[settings.mode].conclude
    assert conclude is not None, "an estimate is no certificate"
    predict, radius, p_a_lower = conclude(settings, sigma, votes)
    return Certificates(
        name, settings.mode, sigma, settings.n0, settings.n, settings.alpha, ids, labels, predict, radius,
        predict == labels, np.zeros(len(ids)) if seconds is None else seconds, votes[Stream.SELECTION],
        votes[Stream.ESTIMATION], p_a_lower,
    )  # fmt: skip
