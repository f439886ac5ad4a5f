"""From a run's ledger to the results that table, report, MLflow and result.json are made of."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cadis_ray.config import Configuration, Study, searched_paths
from cadis_ray.ledger import Ledger, TrialRow
from cadis_ray.results import Certificates, Estimate, StudyResult, TrialResult
from cadis_ray.smoothing.estimate import estimate


def estimate_from(configuration: Configuration, labels: np.ndarray, counts: np.ndarray) -> Estimate:
    """The search's estimate from votes (N, K + 1) on validation images whose labels (N,) are known."""
    settings = configuration.certification
    return estimate(
        counts[np.arange(len(labels)), labels],
        counts.sum(axis=1),
        sigma=configuration.sigma,
        alpha=settings.alpha,
        at_n=settings.n,
        radii=settings.radii,
    )


def summarise(
    study: Study, run_dir: Path, ledger: Ledger, labels: np.ndarray, certificates: Mapping[str, Certificates]
) -> StudyResult:
    """All trials and baselines as they stand; ``labels`` are those of the validation images counted on."""
    trials = [_trial(study, ledger, row, labels) for row in ledger.trials()]
    best = best_trial(trials)
    return StudyResult(
        name=study.name,
        run_dir=run_dir,
        radii=study.base.certification.radii,
        searched=searched_paths(study),
        trials=trials,
        winner=best.name if best else None,
        certificates=dict(certificates),
    )


def best_trial(trials: list[TrialResult]) -> TrialResult | None:
    """The complete searched trial with the largest ACR estimate, the first of equals; baselines are not candidates."""
    complete = [trial for trial in trials if not trial.baseline and trial.state == "complete" and trial.estimate]
    return max(complete, key=lambda trial: trial.estimate.acr if trial.estimate else 0.0, default=None)


def _trial(study: Study, ledger: Ledger, row: TrialRow, labels: np.ndarray) -> TrialResult:
    epochs = ledger.epochs(row.number)
    counted = row.state != "failed" and bool(epochs)
    return TrialResult(
        number=row.number,
        name=row.name,
        baseline=row.baseline is not None,
        state=row.state,
        reason=row.reason,
        parameters=row.parameters,
        estimate=estimate_from(study.base, labels, epochs[-1].counts) if counted else None,
        epochs=[epoch.metrics | {"epoch": epoch.epoch} for epoch in epochs],
        trainable_parameters=row.trainable_parameters,
        seconds=row.ended - row.started if row.ended else None,
    )
