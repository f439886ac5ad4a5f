"""Trials as the ledger has them, with what their votes say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.smoothing.estimate import Estimate, estimate
from cadis_ray.storage.ledger import EpochRow, Ledger, State, TrialRow
from cadis_ray.study.study import Study
from cadis_ray.study.warm_start import complete_trials


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

    @property
    def candidate(self) -> Estimate | None:
        """The estimate of a searched trial that ended well, which may win; None for any other."""
        return self.estimate if self.state == "complete" and not self.baseline else None


def estimate_from(
    configuration: Configuration, labels: np.ndarray, counts: np.ndarray, resamples: int = 200
) -> Estimate:
    """The search's estimate from votes (N, K + 1) on validation images whose labels (N,) are known.

    An image without votes was not counted, and is left out. ``resamples`` are for the standard error alone.
    """
    settings, rows = configuration.certification, np.flatnonzero(counts.sum(axis=1))
    return estimate(
        counts[rows, labels[rows]],
        counts[rows].sum(axis=1),
        sigma=configuration.sigma,
        alpha=settings.alpha,
        at_n=settings.n,
        radii=settings.radii,
        resamples=resamples,
    )


def trial_results(study: Study, ledger: Ledger, labels: np.ndarray) -> list[TrialResult]:
    """All trials and baselines as they stand; ``labels`` are those of the validation images counted on."""
    found = []
    for row in ledger.trials():
        epochs = ledger.epochs(row.number)
        counted = row.state != "failed" and bool(epochs)
        estimated = estimate_from(study.base, labels, epochs[-1].counts) if counted else None
        found.append(trial_result(row, epochs, estimated))
    return found


def trial_result(
    row: TrialRow, epochs: Sequence[EpochRow], estimate: Estimate | None, recount: Estimate | None = None
) -> TrialResult:
    """A trial as the ledger has it, with what was estimated of it."""
    return TrialResult(
        row.number, row.name, row.baseline is not None, row.state, row.reason, row.parameters, estimate,
        [epoch.metrics | {"epoch": epoch.epoch} for epoch in epochs], row.trainable_parameters,
        row.ended - row.started if row.ended else None, recount,
    )  # fmt: skip


def warm_trials(study: Study, labels: np.ndarray) -> list[tuple[dict[str, Any], Estimate]]:
    """Parameters and estimates of the complete searched trials of ``study.warm_start``, in its order."""
    return [
        (parameters, estimate_from(study.base, labels, counts, resamples=2))
        for folder in study.warm_start
        for parameters, counts in complete_trials(Path(folder)).values()
    ]
