"""Certified models beside each other: a record for each, and paired differences to a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from cadis_ray.errors import UsageError
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.bounds import ABSTAIN
from cadis_ray.smoothing.metrics import acr, certified_accuracy, paired_difference


@dataclass(frozen=True)
class Protocol:
    """How radii were certified. Two models compare only under equal ones; a log of another program tells none."""

    mode: str
    n0: int
    n: int
    alpha: float


@dataclass(frozen=True, eq=False)
class Certified:
    """Certificates on N images, arrays (N,): ``predict`` is -1 for an abstention, ``radius`` l2, ``correct`` bool.

    ``method``: what is fine-tuned alike for several sigmas; the best-over-sigma table has a line for each.
    """

    method: str
    sigma: float | None
    protocol: Protocol | None
    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """A compared model: with certificates, or with what a search estimated (``trial``), or both.

    ``parameters``: its resolved configuration by dotted path, for finding what differs. A trial's name is the model's.
    """

    name: str
    parameters: Mapping[str, Any]
    certified: Certified | None
    trial: TrialResult | None = None


@dataclass(frozen=True)
class Comparison:
    """What one run, experiment or set of logs holds; names are unique.

    ``baseline`` names the model the others are compared to, ``dataset`` what the certificates are about, if known.
    """

    name: str
    dataset: str | None
    models: tuple[ComparedModel, ...]
    radii: tuple[float, ...]
    winner: str | None = None
    baseline: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """ACR minus that of the baseline on the same images: mean, standard error, 95% interval, and the two-sided p
    of Student's t for no difference, as it is and adjusted by Holm for all models of the comparison."""

    mean: float
    se: float
    low_95: float
    high_95: float
    p: float
    p_holm: float


def standard_error(values: ArrayLike) -> float | None:
    """Of the mean of ``values`` (N,), for images drawn like these; None for a single one."""
    values = np.asarray(values, np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): rejecting those <= a errs at all with probability <= a."""
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p, np.float64)[order]))
    return adjusted.tolist()


def differing(models: Sequence[ComparedModel]) -> tuple[str, ...]:
    """Dotted paths at which two of the models that have them differ, in the order of the first that has one."""
    paths = dict.fromkeys(path for model in models for path in model.parameters)
    values = {path: {str(model.parameters[path]) for model in models if path in model.parameters} for path in paths}
    return tuple(path for path in paths if len(values[path]) > 1)


def comparable(one: Certified, other: Certified) -> bool:
    """Same images with the same labels, under the same protocol as far as it is known."""
    same = np.array_equal(one.idx, other.idx) and np.array_equal(one.label, other.label)
    return same and one.protocol == other.protocol


def differences(comparison: Comparison) -> dict[str, Difference]:
    """ACR of every model minus the baseline's, by name; models that do not compare with it have none.

    The intervals and p-values speak of images drawn like these, not of training again, and are void for a model that
    was chosen on these images. Raises UsageError where the baseline has no certificates.
    """
    if comparison.baseline is None:
        return {}
    certified = {model.name: model.certified for model in comparison.models if model.certified}
    base = certified.pop(comparison.baseline, None)
    if base is None:
        raise UsageError(f"--baseline: {comparison.baseline!r} has no certificates; give one of {', '.join(certified)}")
    compared = {name: c for name, c in certified.items() if comparable(c, base) and len(c.idx) > 1}
    paired = [paired_difference(c.radius * c.correct, base.radius * base.correct) for c in compared.values()]
    ps = [_p_value(d.mean, d.se, len(base.idx)) for d in paired]
    return {
        name: Difference(d.mean, d.se, d.low, d.high, p, adjusted)
        for name, d, p, adjusted in zip(compared, paired, ps, holm(ps), strict=True)
    }


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """A dict for JSON a model, in their order, numbers unrounded, shares in [0, 1]; None where nothing is certified.

    ``certified_accuracy`` and ``acr`` are of certificates only; ``estimate`` is the search's, never a certificate.
    """
    against, paths = differences(comparison), differing(comparison.models)
    rows = []
    for model in comparison.models:
        c, d, e = model.certified, against.get(model.name), model.trial.estimate if model.trial else None
        shares = {str(r): share for r, share in e.certified_accuracy.items()} if e else {}
        measured: dict[str, Any] = _measured(c, comparison.radii) if c else dict.fromkeys(MEASURED)
        rows.append({
            "name": model.name,
            "sigma": c.sigma if c else model.parameters.get("sigma"),
            **measured,
            "protocol": vars(c.protocol) if c and c.protocol else None,
            "winner": model.name == comparison.winner,
            "parameters": {path: model.parameters.get(path) for path in paths},
            "difference": {"baseline": comparison.baseline, **vars(d)} if d else None,
            "estimate": {**vars(e), "certified_accuracy": shares} if e else None,
        })  # fmt: skip
    return rows


MEASURED = ("n_images", "acr", "acr_se", "abstained", "clean_accuracy", "clean_accuracy_se", "certified_accuracy",
            "certified_accuracy_se")  # fmt: skip


def _measured(c: Certified, radii: Sequence[float]) -> dict[str, Any]:
    images, clean = len(c.idx), float(c.correct.mean())
    shares = {str(r): certified_accuracy(c.radius, c.correct, r) for r in radii}
    values = (
        images, acr(c.radius, c.correct), standard_error(c.radius * c.correct), int(np.sum(c.predict == ABSTAIN)),
        clean, _share_error(clean, images), shares, {r: _share_error(share, images) for r, share in shares.items()},
    )  # fmt: skip
    return dict(zip(MEASURED, values, strict=True))


def _share_error(share: float, images: int) -> float | None:
    """``standard_error`` of zeros and ones with this mean."""
    return float(np.sqrt(share * (1 - share) / (images - 1))) if images > 1 else None


def _p_value(mean: float, se: float, images: int) -> float:
    if se == 0:
        return float(mean == 0)
    return float(2 * special.stdtr(images - 1, -abs(mean / se)))
