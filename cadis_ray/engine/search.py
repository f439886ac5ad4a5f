"""The search: Ray Tune runs the trials, Optuna proposes them, the ledger is the truth about both."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cadis_ray.engine.resources import DRIVER, Pool, worker_bundle
from cadis_ray.engine.trial import run_trial
from cadis_ray.search.proposal import ENDED, Proposal, all_epochs_recorded, close_counted
from cadis_ray.search.stopping import Stopping
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.packing import unpack
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study

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
    """Tells Tune what to run: the study's baselines first, then what ``Proposal`` draws."""

    def __init__(self, study: Study, ledger: Ledger, session: str, labels: np.ndarray) -> None:
        super().__init__()
        self.study, self.ledger, self.session = study, ledger, session
        self.proposed: set[int] = set()
        self.deaths: dict[int, int] = {}
        self.proposal = Proposal(study, ledger, labels)

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
                drawn = self.proposal.draw(number - len(names), rows)
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
