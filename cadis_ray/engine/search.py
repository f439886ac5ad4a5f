"""The search: Ray Tune runs the trials, Optuna proposes them, the ledger is the truth about both."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray.tune
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cadis_ray.engine.resources import DRIVER, Pool, worker_bundle
from cadis_ray.engine.trial import run_trial
from cadis_ray.search.objective import Estimates, scores
from cadis_ray.search.proposal import ENDED, all_epochs_recorded, close_counted
from cadis_ray.search.sampling import draw
from cadis_ray.search.stopping import Stopping
from cadis_ray.search.trials import warm_trials
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.storage.packing import unpack
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.space import distributions, grid
from cadis_ray.study.study import Study

optuna.logging.set_verbosity(optuna.logging.ERROR)


DEATHS = 3  # so often is a trial started again whose driving process died


def run_search(
    study: Study, ledger: Ledger, labels: np.ndarray, pool: Pool, run_dir: Path, session: str, report: "Report"
) -> None:
    """Run every baseline and trial that the ledger does not hold as ended. ``labels`` (N,) are those of the validation
    images; ``report`` hears of each epoch and end."""
    todo = len(study.baselines) + study.trials - sum(row.state in ENDED for row in ledger.trials())
    if not todo:
        return
    searcher = StudySearcher(study, ledger, session, labels)
    resources = study.resources
    trainable = ray.tune.with_parameters(run_trial, study=study, pool=pool, storage=str(RunFolder(run_dir).training))
    booked = DRIVER if resources.workers_per_trial else worker_bundle(resources)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, booked),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=LedgerScheduler(Stopping(study, ledger, labels)),
            metric="acr",
            mode="max",
            num_samples=todo * (1 + DEATHS),  # the searcher says when it is over
            max_concurrent_trials=resources.concurrent_trials,
            reuse_actors=True,  # the process that drives a trial takes seconds to import
        ),
        run_config=ray.tune.RunConfig(
            name=session,
            storage_path=str(RunFolder(run_dir).tune),
            callbacks=[LedgerCallback(study, ledger, searcher, report)],
            verbose=0,
        ),
    )
    tuner.fit()


class StudySearcher(Searcher):
    """Proposes baselines first, then trials, each a function of (seed, number, results that its number may know).

    Trial i knows the results of trials 0 .. i - C, C the number of concurrent ones, and waits until they have ended;
    of the C - 1 between it knows the parameters only. So neither timing nor a restart changes what is drawn.
    """

    def __init__(self, study: Study, ledger: Ledger, session: str, labels: np.ndarray) -> None:
        super().__init__()
        self.study, self.ledger, self.session = study, ledger, session
        self.proposed: set[int] = set()
        self.deaths: dict[int, int] = {}
        self.estimates = Estimates(study, ledger, labels)
        self.warm = warm_trials(study, labels)

    def suggest(self, trial_id: str) -> Any:
        rows = {row.number: row for row in self.ledger.trials()}
        names = list(self.study.baselines)
        for number in range(len(names) + self.study.trials):
            if number in self.proposed or (number in rows and rows[number].state in ENDED):
                continue
            if number < len(names):
                baseline, name = names[number], names[number]
                parameters = self.study.baselines[baseline]
            else:
                baseline, name = None, f"trial-{number - len(names):04d}"
                drawn = self._draw(number - len(names), rows)
                if drawn is None:
                    return None
                parameters = drawn
            self.proposed.add(number)
            self.ledger.open_trial(number, name, baseline, parameters)
            epochs = self.ledger.epochs(number)
            kept, deaths = epochs[-1].checkpoint if epochs else None, self.deaths.get(number, 0)
            return {
                "number": number, "session": f"{self.session}-{deaths}" if deaths else self.session,
                "baseline": baseline is not None, "parameters": parameters,
                "resume": kept and str(RunFolder(self.ledger.path.parent).checkpoint(kept)),
            }  # fmt: skip
        # While a trial runs it may have to be started again.
        return Searcher.FINISHED if all(row.state in ENDED for row in rows.values()) else None

    def again(self, number: int) -> bool:
        """Whether a trial whose process died is proposed once more, to go on from what the ledger has of it."""
        self.deaths[number] = self.deaths.get(number, 0) + 1
        if self.deaths[number] > DEATHS:
            return False
        self.proposed.discard(number)
        return True

    def _draw(self, index: int, rows: dict[int, TrialRow]) -> dict[str, Any] | None:
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

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments for a restore that is never asked for

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: what a trial gave is read from the ledger."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: this object is rebuilt from the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a study is resumed from its ledger")


Report = Callable[[int, str, dict[str, float]], None]


class LedgerCallback(ray.tune.Callback):
    """Writes what Tune hears into the ledger, in the driver; nothing slow happens here."""

    def __init__(self, study: Study, ledger: Ledger, searcher: StudySearcher, report: Report) -> None:
        self.study, self.ledger, self.searcher, self.report = study, ledger, searcher, report
        self.failures: dict[int, str] = {}
        self.folder = RunFolder(ledger.path.parent)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        number = trial.config["number"]
        if "failed" in result:
            self.failures[number] = result["failed"]
            return
        scores = {key: result[key] for key in ("acr", "acr_se", "clean", "trainable_parameters")}
        metrics = {key: value for key, value in result["metrics"].items() if math.isfinite(value)} | scores
        kept = result.get("checkpoint_path")
        self.ledger.record_epoch(
            number, result["epoch"], metrics, unpack(result["counts"]), kept and self.folder.within(kept)
        )
        self.report(number, "running", scores)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if number in self.failures:
            self._failed(number, self.failures[number])
            return
        whole = all_epochs_recorded(self.study, self.ledger, number, trial.config["parameters"])
        state = "complete" if whole else "pruned"
        close_counted(self.ledger, number, state)
        self.report(number, state, {})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if not self.searcher.again(number):
            self._failed(number, f"the processes that drove the trial died {DEATHS + 1} times")

    def _failed(self, number: int, reason: str) -> None:
        self.ledger.close_trial(number, "failed", reason)
        self.report(number, "failed", {})


class LedgerScheduler(FIFOScheduler):
    """Stops searched trials by ``Stopping``; baselines always run to their end."""

    def __init__(self, stopping: "Stopping") -> None:
        super().__init__()
        self.stopping = stopping

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.config["baseline"] or "failed" in result:
            return TrialScheduler.CONTINUE
        stop = self.stopping.stops(trial.config["number"], result["epoch"], result["acr"], unpack(result["counts"]))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments for a restore that is never asked for
