"""What is drawn depends on the seed and on results, never on timing or restarts."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import cmaes
import numpy as np
import pytest
from optuna.trial import create_trial

from cadis_ray.engine.search import DEATHS, StudySearcher
from cadis_ray.engine.study import _session
from cadis_ray.errors import UsageError
from cadis_ray.search.proposal import settle
from cadis_ray.search.sampling import _told_to_cma_es, draw
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.folder import fingerprint
from cadis_ray.study.load import load_study
from cadis_ray.study.space import distributions
from cadis_ray.study.study import Study
from cadis_ray.study.warm_start import check_warm_start
from tests.helpers.places import DIGITS

LABELS = np.zeros(20, dtype=np.int64)


def votes(share: float, samples: int = 100) -> np.ndarray:
    """Counts of 20 images of class 0 whose label gets this share of the votes, a tenth more or less by image."""
    right = np.clip(np.rint(samples * (share + np.linspace(-0.1, 0.1, 20))), 0, samples).astype(np.int32)
    return np.stack([right, samples - right, np.zeros_like(right)], axis=1)


COUNTS = votes(0.75)


SAMPLERS = ("tpe", "gp", "random", "nsga2")


def with_(study: Study, **changes) -> Study:
    """The study, checked again, with top-level sections replaced."""
    return Study.model_validate_json(json.dumps(study.model_dump(mode="json") | changes))


@pytest.fixture(scope="module")
def study() -> Study:
    study = load_study(DIGITS)
    return with_(study, trials=7, sampler={"name": "tpe", "startup": 2}, objective={"maximise": "acr"})


def score(parameters: dict) -> float:
    """A share of votes."""
    return 0.5 + parameters.get("finetuning.adv_weight", 1) / 20 - parameters.get("finetuning.attack_radius", 0) / 4


def end(ledger: Ledger, drawn: dict, state: str = "complete") -> None:
    if state == "complete":
        ledger.record_epoch(drawn["number"], 1, {"acr": 0.1}, votes(score(drawn["parameters"])))
    ledger.close_trial(drawn["number"], state)  # pyright: ignore[reportArgumentType]


def drive(study: Study, ledger: Ledger, last_first: bool, restarts: int = 0) -> list[dict]:
    """Run all trials at most two at a time, ending either the older or the newer of them first."""
    searcher, running, done = StudySearcher(study, ledger, "session-000", LABELS), [], []
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
            searcher, running = StudySearcher(study, ledger, "session-001", LABELS), []


def parameters(drawn: list[dict]) -> list[dict]:
    return [trial["parameters"] for trial in drawn]


ONE, TWO = {"maximise": "acr"}, {"maximise": ["acr", "clean"]}


@pytest.mark.parametrize(
    ("sampler", "objective"), [*((name, metrics) for name in SAMPLERS for metrics in (ONE, TWO)), ("cma_es", ONE)]
)
def test_order_of_ends_and_restarts_change_nothing(study: Study, tmp_path: Path, sampler: str, objective: dict) -> None:
    limited = {"clean_at_least": {"baseline": "off_the_shelf", "minus": 0.05}}
    if sampler == "gp":  # fits a model for each draw
        study = with_(study, trials=4)
    population = 4 if sampler == "cma_es" else 2
    study = with_(
        study, sampler={"name": sampler, "startup": 2, "population": population}, objective=objective | limited
    )
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
            searcher = StudySearcher(study, ledger, "session-000", LABELS)
            for _ in range(first):
                end(ledger, searcher.suggest("any"))
            drawn = []
            for index in range(study.trials):
                trial = searcher.suggest("any")
                drawn.append(trial["parameters"])
                value = results.get(index, score(trial["parameters"]))
                ledger.record_epoch(first + index, 1, {"acr": 0.1}, votes(value))
                ledger.close_trial(first + index, "complete")
            return drawn

    usual, changed = drawn_after({}, "usual"), drawn_after({3: 1.1}, "changed")
    window = study.resources.concurrent_trials
    assert changed[: 3 + window] == usual[: 3 + window]
    assert changed[3 + window :] != usual[3 + window :]


def test_waits_for_the_results_it_needs(study: Study, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(study, ledger, "session-000", LABELS)
        for _ in study.baselines:
            end(ledger, searcher.suggest("any"))
        older, newer = searcher.suggest("any"), searcher.suggest("any")
        end(ledger, newer)
        assert searcher.suggest("any") is None
        end(ledger, older)
        assert searcher.suggest("any")["number"] == newer["number"] + 1


def test_a_running_trial_of_a_killed_driver_goes_on_from_its_checkpoint(study: Study, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        StudySearcher(study, ledger, "session-000", LABELS).suggest("any")
        ledger.record_epoch(0, 1, {"acr": 0.1}, COUNTS, "/somewhere/epoch-0001")
        again = StudySearcher(study, ledger, "session-001", LABELS).suggest("any")
    assert again["number"] == 0
    assert again["resume"] == "/somewhere/epoch-0001"


def test_a_trial_whose_process_died_goes_on_from_its_checkpoint_and_not_for_ever(study: Study, tmp_path: Path) -> None:
    study = with_(study, trials=1)
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(study, ledger, "session-000", LABELS)
        first, *others = (searcher.suggest("any") for _ in range(3))
        for other in others:
            end(ledger, other)
        sessions = {first["session"]}
        for death in range(1, DEATHS + 1):
            assert searcher.suggest("any") is None  # it is not over: the one that runs may die
            ledger.record_epoch(0, death, {"acr": 0.1}, COUNTS, f"/epoch-{death}")
            assert searcher.again(0)
            once_more = searcher.suggest("any")
            assert (once_more["number"], once_more["resume"]) == (0, f"/epoch-{death}")
            sessions.add(once_more["session"])
        assert len(sessions) == 1 + DEATHS  # a folder of its own each time
        assert not searcher.again(0)
        end(ledger, first, "failed")
        assert searcher.suggest("any") == "FINISHED"


def test_a_trial_whose_end_was_not_heard_of_is_complete(study: Study, tmp_path: Path) -> None:
    """Killed between the last epoch and the end: nothing is left to run, and nothing may run again."""
    recorded = {"acr": 0.1, "trainable_parameters": 9}
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(study, ledger, "session-000", LABELS)
        assert [searcher.suggest("any")["number"] for _ in study.baselines] == [0, 1]
        ledger.record_epoch(0, 0, recorded, COUNTS)
        ledger.record_epoch(1, study.base.finetuning.epochs - 1, recorded, COUNTS)
        settle(study, ledger, LABELS)
        assert [row.state for row in ledger.trials()] == ["complete", "running"]
        ledger.record_epoch(1, study.base.finetuning.epochs, recorded, COUNTS, "/last")
        settle(study, ledger, LABELS)
        assert [row.state for row in ledger.trials()] == ["complete", "complete"]
        assert ledger.trials()[1].checkpoint == "/last"
        assert ledger.trials()[1].trainable_parameters == 9
        assert StudySearcher(study, ledger, "session-001", LABELS).suggest("any")["number"] == 2


def test_nsga2_breeds_from_the_generations_of_the_rebuilt_study(study: Study, tmp_path: Path) -> None:
    """Children of a population whose parameters are all alike are mostly alike too; random draws are not."""
    study = with_(study, sampler={"name": "nsga2", "population": 4})
    parent = {
        "finetuning.adv_weight": 2.0, "finetuning.attack_radius": 0.2,
        "finetuning.num_noises": 4, "finetuning.lora.r": 8,
    }  # fmt: skip
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(study, ledger, "session-000", LABELS)
        for number in range(2 + 8):
            baseline = number < 2
            ledger.open_trial(number, f"t{number}", "b" if baseline else None, {} if baseline else parent)
            ledger.record_epoch(number, 1, {"acr": 0.1}, COUNTS)
            ledger.close_trial(number, "complete")
        past = [searcher.proposal._told(row, None) for row in ledger.trials()[2:]]
    children = [draw(study, index, [*past], []) for index in range(10, 20)]
    kept = sum(child[path] == value for child in children for path, value in parent.items())
    assert kept >= 20


def test_cma_es_learns_from_each_generation_of_the_rebuilt_study(study: Study) -> None:
    """Its distribution is that of the cmaes package told the same, and it draws nearer and nearer to the best."""
    best = {"finetuning.adv_weight": 2.0, "finetuning.attack_radius": 0.3}
    space = {path: {"low": 0.0, "high": 4.0} for path in best}
    study = with_(study, space=space, sampler={"name": "cma_es", "population": 6}, trials=60)
    drawn, past = [], []
    for index in range(60):
        drawn.append(draw(study, index, [copy.deepcopy(trial) for trial in past], []))
        distance = sum((drawn[-1][path] - value) ** 2 for path, value in best.items())
        described = distributions(study.space, drawn[-1])
        limited = {"clean": distance - 9.0}  # far away it is infeasible, whatever the value
        value = 1 - distance / 100 if distance <= 9 else 5.0
        past.append(create_trial(params=drawn[-1], distributions=described, value=value, constraints=limited))
    by_cmaes = cmaes.CMA(mean=np.full(2, 0.5), sigma=1 / 6, bounds=np.array([[0.0, 1.0]] * 2), population_size=6)
    ranked = [trial.value if trial.constraints["clean"] <= 0 else -trial.constraints["clean"] for trial in past]
    for first in range(0, 60, 6):
        points = [np.array([drawn[i][path] for path in space]) / 4 for i in range(first, first + 6)]
        by_cmaes.tell([(point, -ranked[first + place]) for place, point in enumerate(points)])
    told = _told_to_cma_es(study, past)
    state = "".join(text for key, text in told[-1].system_attrs.items() if key.startswith("cma:optimizer"))
    ours = pickle.loads(bytes.fromhex(state))
    np.testing.assert_allclose(ours.mean, by_cmaes.mean)
    np.testing.assert_allclose(ours._C, by_cmaes._C)
    last = [sum((point[path] - value) ** 2 for path, value in best.items()) for point in drawn[-12:]]
    assert np.mean(last) < 0.2  # of points drawn at random: above 4


def test_a_trial_waits_for_the_baseline_that_limits_it(study: Study, tmp_path: Path) -> None:
    limited = with_(study, objective={"maximise": "acr", "clean_at_least": {"baseline": "cross_entropy"}})
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(limited, ledger, "session-000", LABELS)
        shelf, entropy = searcher.suggest("any"), searcher.suggest("any")
        end(ledger, shelf)
        assert searcher.suggest("any") is None
        end(ledger, entropy)
        assert searcher.suggest("any")["number"] == 2


def test_optuna_is_told_metrics_from_the_counts_and_the_missing_clean_accuracy(study: Study, tmp_path: Path) -> None:
    metrics = [{"certified_accuracy": 0.25}, "clean"]
    limited = with_(study, objective={
        "maximise": metrics, "clean_at_least": {"baseline": "off_the_shelf", "minus": 0.25}
    })  # fmt: skip
    sure = np.array([[100, 0, 0]] * 20)
    half = np.concatenate([sure[:10], sure[:10, [1, 0, 2]]])
    with Ledger(tmp_path / "ledger") as ledger:
        searcher = StudySearcher(limited, ledger, "session-000", LABELS)
        for counts in (sure, sure, half):
            drawn = searcher.suggest("any")
            ledger.record_epoch(drawn["number"], 1, {"acr": 9.0}, counts)
            ledger.close_trial(drawn["number"], "complete")
        rows = {row.number: row for row in ledger.trials()}
        limit, settled = searcher.proposal._clean_limit(rows)
        told = searcher.proposal._told(rows[2], limit)
    assert settled
    assert limit == pytest.approx(0.75, abs=0.01)
    assert told.values == pytest.approx([0.5, 0.5], abs=0.01)
    assert told.constraints["clean"] == pytest.approx(0.25, abs=0.01)


def test_a_grid_runs_every_combination_once(study: Study, tmp_path: Path) -> None:
    space = {"finetuning.num_noises": {"choices": [2, 4]}, "finetuning.lora.r": {"choices": [2, 4, 8]}}
    study = with_(study, trials=6, sampler={"name": "grid"}, space=space)
    with Ledger(tmp_path / "a") as one, Ledger(tmp_path / "b") as two:
        drawn, again = parameters(drive(study, one, False)), parameters(drive(study, two, True, restarts=5))
    assert drawn == again
    expected = {(noises, rank) for noises in (2, 4) for rank in (2, 4, 8)}
    assert {(trial["finetuning.num_noises"], trial["finetuning.lora.r"]) for trial in drawn[2:]} == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_failed_configuration_is_not_drawn_again(study: Study, sampler: str) -> None:
    """Of two configurations one failed: only the other is left; where both failed, a draw still ends."""
    space = {"finetuning.num_noises": {"choices": [2, 4]}}
    study = with_(study, sampler={"name": sampler, "startup": 2}, space=space)
    two, four = {"finetuning.num_noises": 2}, {"finetuning.num_noises": 4}
    assert {draw(study, index, [], [])["finetuning.num_noises"] for index in range(12)} == {2, 4}
    assert all(draw(study, index, [], [two]) == four for index in range(12))
    assert draw(study, 0, [], [two, four]) in (two, four)


def ended_run(folder: Path, study: Study) -> Path:
    folder.mkdir()
    (folder / "study.json").write_text(study.model_dump_json())
    with Ledger(folder / "ledger.sqlite") as ledger:
        drive(study, ledger, False)
    return folder


def test_a_warm_start_is_learnt_from_and_no_trial_of_the_study(study: Study, tmp_path: Path) -> None:
    before = ended_run(tmp_path / "before", study)
    after = with_(study, seed=1, warm_start=[str(before)])
    with Ledger(tmp_path / "cold") as cold, Ledger(tmp_path / "warm") as warm:
        usual = parameters(drive(with_(study, seed=1), cold, False))
        informed = parameters(drive(after, warm, False))
        assert len(warm.trials()) == len(study.baselines) + study.trials
        searcher = StudySearcher(after, warm, "session-001", LABELS)
    with Ledger(before / "ledger.sqlite") as ledger:
        complete = [row for row in ledger.trials() if row.baseline is None and row.state == "complete"]
    assert [found for found, _ in searcher.proposal.warm] == [row.parameters for row in complete]
    assert informed != usual


def test_a_run_that_is_not_comparable_is_refused_with_what_differs(study: Study, tmp_path: Path) -> None:
    before = ended_run(tmp_path / "before", study)
    base = study.base.model_dump(mode="json")
    base["sigma"] = 0.25
    base["finetuning"]["epochs"] += 1
    other = with_(study, base=base)
    narrow = study.model_dump(mode="json")["space"] | {"finetuning.adv_weight": {"low": 100, "high": 200}}
    with pytest.raises(UsageError, match=r"different: sigma, finetuning\.epochs$"):
        check_warm_start(other, before)
    with pytest.raises(UsageError, match=r"outside this study's space: finetuning\.adv_weight = "):
        check_warm_start(with_(study, space=narrow), before)
    check_warm_start(with_(study, seed=3), before)


def test_a_warm_start_is_checked_when_the_file_is_read(study: Study, tmp_path: Path) -> None:
    before = ended_run(tmp_path / "before", study)
    text = DIGITS.read_text().replace("samples: 48", "samples: 40")
    file = tmp_path / "study.yaml"
    file.write_text(f"{text}\nwarm_start: [{before}]\n")
    line = len(text.splitlines()) + 2
    with pytest.raises(UsageError, match=rf"study\.yaml:{line}:14: warm_start\[0\]: got .*different: validation$"):
        load_study(file)


def test_the_fingerprint_is_of_what_a_warm_start_holds_not_of_where(study: Study, tmp_path: Path) -> None:
    before = ended_run(tmp_path / "before", study)
    shutil.copytree(before, tmp_path / "moved")
    longer = ended_run(tmp_path / "longer", with_(study, trials=study.trials + 1))
    here, there, more = (with_(study, warm_start=[str(run)]) for run in (before, tmp_path / "moved", longer))
    assert fingerprint(here) == fingerprint(there)
    assert len({fingerprint(here), fingerprint(more), fingerprint(study)}) == 3


def test_a_driver_takes_a_name_that_no_other_had(tmp_path: Path) -> None:
    """Also where Tune's folders were lost: Train goes on by itself from checkpoints of an equal name."""
    assert _session(tmp_path) == "session-000"
    (tmp_path / "tune" / "session-000").mkdir(parents=True)
    assert _session(tmp_path) == "session-001"
    (tmp_path / "training" / "trial-0003-session-1001").mkdir(parents=True)
    assert _session(tmp_path) == "session-1002"
