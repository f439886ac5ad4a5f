"""What a study has to say: plain data, from which table, report, MLflow and result.json are made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import State


@dataclass(frozen=True)
class TrialResult:
    """One line of the table: a searched trial, or a baseline (``baseline`` is its name in the study file).

    ``estimate`` is what the search went by; ``recount`` that of a finalist, and of the baseline that limits clean
    accuracy, from noise that the search did not see.
    """

    number: int
    name: str
    baseline: bool
    state: State
    reason: str | None
    parameters: dict[str, Any]
    estimate: Estimate | None
    epochs: list[dict[str, float]] = field(default_factory=list)
    trainable_parameters: int | None = None
    seconds: float | None = None
    recount: Estimate | None = None


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


@dataclass(frozen=True)
class Examples:
    """What the base classifier of the model ``name`` was shown of some test images, one row an image.

    ``clean``, ``noisy`` and ``seen``, which is the denoised image where the model has a denoiser: (N, H, W, C) uint8,
    clamped. ``confidence``: its softmax for ``predict``, on ``seen``. The surest right answers, then the surest wrong.
    """

    name: str
    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    confidence: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True)
class StudyResult:
    """Everything the outputs are made of. ``winner`` is a trial's name; certificates go by trial or baseline.

    ``metrics``: what was maximised, "acr", "clean" or the radius of a certified accuracy. ``clean_limit``: the least
    feasible clean accuracy by the search's estimates. ``front``: the names on the Pareto front by these.
    ``importance``: of each parameter for the first metric, the largest first; shares that sum to 1. ``examples``: what
    the winner was shown.
    """

    name: str
    run_dir: Path
    radii: tuple[float, ...]
    searched: tuple[str, ...]
    trials: list[TrialResult]
    winner: str | None
    certificates: dict[str, Certificates]
    metrics: tuple[str | float, ...] = ("acr",)
    clean_limit: float | None = None
    front: tuple[str, ...] = ()
    importance: dict[str, float] = field(default_factory=dict)
    examples: Examples | None = None
