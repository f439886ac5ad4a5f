"""What is drawn depends on the seed and on results, never on timing or restarts."""

from pathlib import Path

import numpy as np
import pytest

from cadis_ray.config import Study, load_study
from cadis_ray.engine.search import StudySearcher, settle
from cadis_ray.ledger import Ledger

REPOSITORY = Path(__file__).parents[2]
COUNTS = np.array([[3, 1, 0]])


@pytest.fixture(scope="module")
def study() -> Study:
    study = load_study(REPOSITORY / "search_spaces" / "digits.yaml")
    sampler = study.sampler.model_copy(update={"startup": 2})
    return study.model_copy(update={"trials": 7, "sampler": sampler})


def score(parameters: dict) -> float:
    return parameters["finetuning.adv_weight"] - parameters["finetuning.attack_radius"]


def end(ledger: Ledger, drawn: dict, state: str = "complete") -> None:
    if state == "complete":
        ledger.record_epoch(
            drawn["number"], 1, {"acr": score(drawn["parameters"]) if not drawn["baseline"] else 0.1}, COUNTS
        )
    ledger.close_trial(drawn["number"], state)  # pyright: ignore[reportArgumentType]


def drive(study: Study, ledger: Ledger, last_first: bool, restarts: int = 0) -> list[dict]:
    """Run all trials at most two at a time, ending either the older or the newer of them first."""
    searcher, running, done = StudySearcher(study, ledger, "session-000"), [], []
    while True:
        while len(running) < study.resources.concurrent_trials:
            drawn = searcher.suggest("any")
            if drawn == "FINISHED" or drawn is None:
                break
            running.append(drawn)
        if not running:
            return sorted(done, key=lambda drawn: drawn["number"])
        ended = running.pop(-1 if last_first else 0)
        end(ledger, ended, "failed" if ended["number"] == 4 else "complete")
        done.append(ended)
        if restarts:  # the driver is killed: what ran is lost, what ended stays
            restarts -= 1
            searcher, running = StudySearcher(study, ledger, "session-001"), []


def parameters(drawn: list[dict]) -> list[dict]:
    return [trial["parameters"] for trial in drawn]


def test_order_of_ends_and_restarts_change_nothing(study: Study, tmp_path: Path) -> None:
    runs = []
    for name, last_first, restarts in (("a", False, 0), ("b", True, 0), ("c", False, 4), ("d", True, 7)):
        with Ledger(tmp_path / name) as ledger:
            runs.append(parameters(drive(study, ledger, last_first, restarts)))
    assert len(runs[0]) == len(study.baselines) + study.trials
    assert runs[0][:2] == list(study.baselines.values())
    assert all(run == runs[0] for run in runs)


def test_a_trial_knows_the_results_before_its_window_and_no_later_ones(study: Study, tmp_path: Path) -> None:
    first = len(study.baselines)

    def drawn_after(results: dict[int, float], name: str) -> list[dict]:
        with Ledger(tmp_path / name) as ledger:
            searcher = StudySearcher(study, ledger, "session-000")
            for _ in range(first):
                end(ledger, searcher.suggest("any"))
            drawn = []
            for index in range(study.trials):
                trial = searcher.suggest("any")
                drawn.append(trial["parameters"])
                value = results.get(index, score(trial["parameters"]))
                ledger.record_epoch(first + index, 1, {"acr": value}, COUNTS)
                ledger.close_trial(first + index, "complete")
            return drawn

    usual, changed = drawn_after({}, "usual"), drawn_after({3: 1e3}, "changed")
    window = study.resources.concurrent_trials
    assert changed[: 3 + window] == usual[: 3 + window]
    assert changed[3 + window :] != usual[3 + window :]


def test_waits_for_the_results_it_needs(study: Study, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(study, ledger, "session-000")
        for _ in study.baselines:
            end(ledger, searcher.suggest("any"))
        older, newer = searcher.suggest("any"), searcher.suggest("any")
        end(ledger, newer)
        assert searcher.suggest("any") is None
        end(ledger, older)
        assert searcher.suggest("any")["number"] == newer["number"] + 1


def test_a_running_trial_of_a_killed_driver_goes_on_from_its_checkpoint(study: Study, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        StudySearcher(study, ledger, "session-000").suggest("any")
        ledger.record_epoch(0, 1, {"acr": 0.1}, COUNTS, "/somewhere/epoch-0001")
        again = StudySearcher(study, ledger, "session-001").suggest("any")
    assert again["number"] == 0
    assert again["resume"] == "/somewhere/epoch-0001"


def test_a_trial_whose_end_was_not_heard_of_is_complete(study: Study, tmp_path: Path) -> None:
    """Killed between the last epoch and the end: nothing is left to run, and nothing may run again."""
    recorded = {"acr": 0.1, "trainable_parameters": 9}
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(study, ledger, "session-000")
        assert [searcher.suggest("any")["number"] for _ in study.baselines] == [0, 1]
        ledger.record_epoch(0, 0, recorded, COUNTS)
        ledger.record_epoch(1, study.base.finetuning.epochs - 1, recorded, COUNTS)
        settle(study, ledger)
        assert [row.state for row in ledger.trials()] == ["complete", "running"]
        ledger.record_epoch(1, study.base.finetuning.epochs, recorded, COUNTS, "/last")
        settle(study, ledger)
        assert [row.state for row in ledger.trials()] == ["complete", "complete"]
        assert ledger.trials()[1].checkpoint == "/last"
        assert ledger.trials()[1].trainable_parameters == 9
        assert StudySearcher(study, ledger, "session-001").suggest("any")["number"] == 2
