"""From a run's ledger to the results that table, report, MLflow and result.json are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cadis_ray.config import Study, searched_paths
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.results import Certificates, StudyResult, TrialResult
from cadis_ray.search_sections import Metric, Objective
from cadis_ray.smoothing.estimate import Estimate, estimate
from cadis_ray.smoothing.modes import MODES, Votes
from cadis_ray.smoothing.noise import Stream
from cadis_ray.storage.ledger import EpochRow, Ledger, TrialRow

ACR = Objective()


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


def summarise(study: Study, run_dir: Path, trials: list[TrialResult], recounts: Mapping[str, Estimate]) -> StudyResult:
    """The result without certificates. ``recounts``: by name, of those in ``to_recount``, which alone decide."""
    judged = [replace(trial, estimate=recounts[trial.name]) for trial in trials if trial.name in recounts]
    best = best_trial(judged, study.objective)
    front = pareto_front(trials, study.objective)
    return StudyResult(
        name=study.name,
        run_dir=run_dir,
        radii=study.base.certification.radii,
        searched=searched_paths(study),
        trials=[replace(trial, recount=recounts.get(trial.name)) for trial in trials],
        winner=best.name if best else None,
        certificates={},
        metrics=metrics_of(study.objective),
        clean_limit=_limit(trials, study.objective),
        front=tuple(trial.name for trial in front),
    )


def to_recount(study: Study, trials: list[TrialResult]) -> list[str]:
    """Names of the finalists, best first, and then of the baseline that limits clean accuracy, where it has an
    estimate; empty without a finalist."""
    names = [trial.name for trial in finalists(trials, study.objective, study.finalists.count)]
    limited = study.objective.clean_at_least
    by = [t.name for t in trials if limited and t.baseline and t.name == limited.baseline and t.estimate]
    return [*names, *by] if names else []


def finalists(trials: list[TrialResult], objective: Objective, count: int) -> list[TrialResult]:
    """The ``count`` best by the search's estimates: the Pareto front, then the front of the others, and so on."""
    rest, chosen = list(trials), list[TrialResult]()
    while len(chosen) < count and (front := pareto_front(rest, objective)):
        chosen += front
        rest = [trial for trial in rest if trial not in front]
    return chosen[:count]


def metrics_of(objective: Objective) -> tuple[str | float, ...]:
    """Its metrics as ``StudyResult`` has them."""
    return tuple(metric if isinstance(metric, str) else metric.certified_accuracy for metric in objective.metrics)


def scores(objective: Objective, found: Estimate) -> tuple[float, ...]:
    """The values of the objective's metrics, in its order, each to be maximised."""
    return tuple(_score(metric, found) for metric in objective.metrics)


def clean_limit(objective: Objective, baseline: Estimate | None) -> float | None:
    """The least clean accuracy that is feasible; None without a constraint or without its baseline's estimate."""
    if objective.clean_at_least is None or baseline is None:
        return None
    return baseline.clean - objective.clean_at_least.minus


def violation(found: Estimate, limit: float | None) -> float:
    """How far the clean accuracy is below the limit, 0 where it is feasible; rounding is no violation."""
    missing = 0.0 if limit is None else limit - found.clean
    return missing if missing > 1e-12 else 0.0


def pareto_front(trials: list[TrialResult], objective: Objective = ACR) -> list[TrialResult]:
    """The complete searched trials that no other one equals or exceeds in every metric and exceeds in one.

    Largest first metric first, the earlier of equals. Only feasible trials take part; where none is, only those with
    the smallest violation. A constraint whose baseline has no estimate is not judged. Baselines are not candidates.
    """
    limit = _limit(trials, objective)
    judged = [
        (violation(trial.estimate, limit), scores(objective, trial.estimate), trial)
        for trial in trials
        if not trial.baseline and trial.state == "complete" and trial.estimate
    ]
    least = min((missing for missing, _, _ in judged), default=0.0)
    candidates = [(values, trial) for missing, values, trial in judged if missing == least]
    front = [
        (values, trial) for values, trial in candidates if not any(_dominates(other, values) for other, _ in candidates)
    ]
    return [trial for _, trial in sorted(front, key=lambda pair: -pair[0][0])]


def best_trial(trials: list[TrialResult], objective: Objective = ACR) -> TrialResult | None:
    """The first of the Pareto front: with one metric, the trial with its largest value; None without a candidate."""
    return next(iter(pareto_front(trials, objective)), None)


def _limit(trials: list[TrialResult], objective: Objective) -> float | None:
    limited = objective.clean_at_least
    named = [trial.estimate for trial in trials if limited and trial.baseline and trial.name == limited.baseline]
    return clean_limit(objective, named[0] if named else None)


def _score(metric: Metric, found: Estimate) -> float:
    if isinstance(metric, str):
        return float(getattr(found, metric))
    return found.certified_accuracy[metric.certified_accuracy]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))
