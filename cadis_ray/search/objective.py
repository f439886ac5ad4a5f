"""What wins: the objective's metrics, its constraint, and the order that follows."""

import numpy as np

from cadis_ray.search.trials import TrialResult, estimate_from
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.study.sections import Objective
from cadis_ray.study.study import Study


class Estimates:
    """Of a study's ended trials, without standard errors; ``labels`` (N,) of the validation images counted."""

    def __init__(self, study: Study, ledger: Ledger, labels: np.ndarray) -> None:
        self.study, self.ledger, self.labels = study, ledger, labels
        self._known: dict[int, Estimate] = {}

    def of(self, row: TrialRow) -> Estimate:
        """Of an ended trial's last epoch."""
        if row.number not in self._known:
            counts = self.ledger.epochs(row.number)[-1].counts
            self._known[row.number] = estimate_from(self.study.base, self.labels, counts, resamples=2)
        return self._known[row.number]

    def clean_limit(self, baseline: TrialRow) -> float | None:
        """The least feasible clean accuracy, given the ended baseline that it depends on; None if that failed."""
        return clean_limit(self.study.objective, self.of(baseline) if baseline.state == "complete" else None)


ACR = Objective()


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
    return tuple(score(metric, found) for metric in metrics_of(objective))


def score(metric: str | float, found: Estimate) -> float:
    """Look up a metric, of ``metrics_of``, in an estimate."""
    return float(getattr(found, metric)) if isinstance(metric, str) else found.certified_accuracy[metric]


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
    limit = limit_of(trials, objective)
    judged = [
        (violation(estimate, limit), scores(objective, estimate), trial)
        for trial in trials
        if (estimate := trial.candidate)
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


def limit_of(trials: list[TrialResult], objective: Objective) -> float | None:
    """The least clean accuracy that is feasible, given all trials; None as of ``clean_limit``."""
    limited = objective.clean_at_least
    named = [trial.estimate for trial in trials if limited and trial.baseline and trial.name == limited.baseline]
    return clean_limit(objective, named[0] if named else None)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))
