"""What is tried next, and when a trial has ended."""

import math
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial

from cadis_ray.search.objective import Estimates, scores
from cadis_ray.search.sampling import draw
from cadis_ray.search.stopping import Stopping
from cadis_ray.search.trials import warm_trials
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.study.space import distributions, grid
from cadis_ray.study.study import Study, configuration

optuna.logging.set_verbosity(optuna.logging.ERROR)
ENDED = ("complete", "pruned", "failed")


class Proposal:
    """Draws the parameters of trials, each a function of (seed, index, results that its index may know).

    Trial i knows the results of trials 0 .. i - C, C the number of concurrent ones, and waits until they have ended;
    of the C - 1 between it knows the parameters only. So neither timing nor a restart changes what is drawn. ``labels``
    (N,) are those of the validation images.
    """

    def __init__(self, study: Study, ledger: Ledger, labels: np.ndarray) -> None:
        self.study, self.ledger = study, ledger
        self.estimates = Estimates(study, ledger, labels)
        self.warm = warm_trials(study, labels)

    def draw(self, index: int, rows: dict[int, TrialRow]) -> dict[str, Any] | None:
        """Parameters of searched trial ``index``; None while a result that it needs is not there."""
        drawn_ahead = self.study.sampler.name == "grid"
        if drawn_ahead and self.study.scheduler.name == "none":
            return grid(self.study.space)[index]
        first, window = len(self.study.baselines), self.study.resources.concurrent_trials
        known = [rows[first + i] for i in range(index - window + 1) if first + i in rows]
        limit, settled = self._clean_limit(rows)
        if not settled or len(known) < index - window + 1 or any(row.state not in ENDED for row in known):
            return None
        if drawn_ahead:
            return grid(self.study.space)[index]
        past = [self._finished(parameters, found, limit) for parameters, found in self.warm]
        past += [self._told(row, limit) for row in known]
        between = [rows[first + i] for i in range(max(0, index - window + 1), index)]
        past += [self._as_optuna(row.parameters, TrialState.RUNNING) for row in between]
        failed = [row.parameters for row in known if row.state == "failed"]
        return draw(self.study, index, past, failed)

    def _clean_limit(self, rows: dict[int, TrialRow]) -> tuple[float | None, bool]:
        """The least feasible clean accuracy, and whether the baseline that it depends on has ended."""
        constraint = self.study.objective.clean_at_least
        if constraint is None:
            return None, True
        row = rows.get(list(self.study.baselines).index(constraint.baseline))
        if row is None or row.state not in ENDED:
            return None, False
        return self.estimates.clean_limit(row), True

    def _told(self, row: TrialRow, limit: float | None) -> optuna.trial.FrozenTrial:
        if row.state == "complete":
            return self._finished(row.parameters, self.estimates.of(row), limit)
        if row.state == "pruned":
            values = {epoch.epoch: epoch.metrics["acr"] for epoch in self.ledger.epochs(row.number)}
            return self._as_optuna(row.parameters, TrialState.PRUNED, intermediate_values=values)
        return self._as_optuna(row.parameters, TrialState.FAIL)

    def _finished(self, parameters: dict[str, Any], found: Estimate, limit: float | None) -> optuna.trial.FrozenTrial:
        values = scores(self.study.objective, found)
        if not all(map(math.isfinite, values)):
            return self._as_optuna(parameters, TrialState.FAIL)
        constraints = None if limit is None else {"clean": limit - found.clean}
        return self._as_optuna(parameters, TrialState.COMPLETE, values=values, constraints=constraints)

    def _as_optuna(self, parameters: dict[str, Any], state: TrialState, **told: Any) -> optuna.trial.FrozenTrial:
        described = distributions(self.study.space, parameters)
        return create_trial(state=state, params=parameters, distributions=described, **told)


def settle(study: Study, ledger: Ledger, labels: np.ndarray) -> None:
    """Close the trials whose last epoch is recorded, or after whose recorded epoch the study's scheduler stops them,
    but whose end a killed driver no longer heard of."""
    stopping = Stopping(study, ledger, labels)
    for row in ledger.trials():
        epochs = ledger.epochs(row.number) if row.state == "running" else []
        if not epochs:
            continue
        last = epochs[-1]
        if all_epochs_recorded(study, ledger, row.number, row.parameters):
            close_counted(ledger, row.number, "complete")
        elif row.baseline is None and stopping.stops(row.number, last.epoch, last.metrics["acr"], last.counts):
            close_counted(ledger, row.number, "pruned")


def all_epochs_recorded(study: Study, ledger: Ledger, number: int, parameters: dict[str, Any]) -> bool:
    settings = configuration(study, parameters).finetuning
    return ledger.last_epoch(number) == settings.last_epoch


def close_counted(ledger: Ledger, number: int, state: Literal["complete", "pruned"]) -> None:
    last = ledger.epochs(number)[-1]
    ledger.close_trial(number, state, None, last.checkpoint, int(last.metrics["trainable_parameters"]))
