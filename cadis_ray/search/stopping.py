"""When a searched trial is stopped early: Tune asks, the ledger answers.

Trial i is judged by its own counts and by those of trials 0 .. i - C, C the number of concurrent ones, which had all
ended before it was drawn. So neither timing nor a restart changes who is stopped, and there is no state to save.
"""

import numpy as np

from cadis_ray.search.objective import Estimates, violation
from cadis_ray.smoothing.estimate import Votes
from cadis_ray.smoothing.racing import may_still_win
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.study.study import Study, configuration


class Stopping:
    """A study's rule. ``labels`` (N,) are those of the validation images; all else is read from the ledger."""

    def __init__(self, study: Study, ledger: Ledger, labels: np.ndarray) -> None:
        self.study, self.ledger, self.labels = study, ledger, labels
        self.estimates = Estimates(study, ledger, labels)

    def stops(self, number: int, epoch: int, acr: float, counts: np.ndarray) -> bool:
        """Whether a searched trial ends after ``epoch``, given its estimate and its counts (N, K + 1) then."""
        scheduler = self.study.scheduler
        rows = {row.number: row for row in self.ledger.trials()}
        last = configuration(self.study, rows[number].parameters).finetuning.last_epoch
        if scheduler.name == "none" or epoch >= last:
            return False
        first, end = len(self.study.baselines), number - self.study.resources.concurrent_trials
        known = [rows[other] for other in range(first, end + 1)]
        if scheduler.name == "asha":
            return self._behind(known, epoch, acr)
        return epoch >= scheduler.grace_epochs and self._cannot_win(rows, known, epoch, counts, last)

    def _behind(self, known: list[TrialRow], epoch: int, acr: float) -> bool:
        """ASHA (Li et al., MLSys 2020): below the best 1 / reduction_factor of those that reached this rung."""
        scheduler, rung = self.study.scheduler, self.study.scheduler.grace_epochs
        while rung < epoch:
            rung *= scheduler.reduction_factor
        reached = [e.metrics["acr"] for row in known for e in self.ledger.epochs(row.number) if e.epoch == epoch]
        if rung != epoch or not reached:
            return False
        return acr < float(np.percentile(reached, 100 * (1 - 1 / scheduler.reduction_factor)))

    def _cannot_win(
        self, rows: dict[int, TrialRow], known: list[TrialRow], epoch: int, counts: np.ndarray, last: int
    ) -> bool:
        """Racing: even the upper confidence bound of its ACR is below that of the best feasible trial's then."""
        incumbent = self._incumbent(rows, known)
        if incumbent is None:
            return False
        theirs = next(e.counts for e in self.ledger.epochs(incumbent.number) if e.epoch == epoch)
        settings = self.study.base.certification
        return not may_still_win(
            self._votes(counts), self._votes(theirs), sigma=self.study.base.sigma, alpha=settings.alpha,
            at_n=settings.n, comparisons=last - self.study.scheduler.grace_epochs,
        )  # fmt: skip

    def _incumbent(self, rows: dict[int, TrialRow], known: list[TrialRow]) -> TrialRow | None:
        constraint, limit = self.study.objective.clean_at_least, None
        if constraint is not None:
            limit = self.estimates.clean_limit(rows[list(self.study.baselines).index(constraint.baseline)])
        estimate = self.estimates.of
        complete = [row for row in known if row.state == "complete" and not violation(estimate(row), limit)]
        return max(complete, key=lambda row: estimate(row).acr, default=None)

    def _votes(self, counts: np.ndarray) -> Votes:
        """(k, n) of the images that were counted: the same for all trials after an epoch."""
        rows = np.flatnonzero(counts.sum(axis=1))
        return counts[rows, self.labels[rows]], counts[rows].sum(axis=1)
