"""A study as one call: what it gives, raises and leaves as it was."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cadis_ray
from cadis_ray.engine import run as run_module
from cadis_ray.errors import CadisError, DataError, ExitCode, IntegrityError, TrialsFailed, UsageError
from cadis_ray.interface.signals import Interrupted, handlers
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.lock import RunLock
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study
from tests.helpers.engine import Cluster, small_study, write_study
from tests.helpers.finished import NAME, write_finished
from tests.helpers.places import DIGITS


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets what takes the place of Ray: a function of the ledger, or an error; MLflow is not told."""

    class Silent:
        def __init__(self, *_: object) -> None: ...
        def close(self, *_: object) -> None: ...

    monkeypatch.setattr(run_module, "Outbox", Silent)
    monkeypatch.setattr(run_module, "write_report", lambda result: None)
    monkeypatch.chdir(tmp_path)

    def install(act) -> None:
        monkeypatch.setattr(run_module, "finish_study", act)

    return install


def fake(winner: str | None):
    """Ends a study with one trial, complete if it won, else failed."""

    def act(study: Study, run_dir: Path, ledger: Ledger, *_: object) -> StudyResult:
        state = "complete" if winner else "failed"
        ledger.open_trial(0, NAME, None, {})
        if winner:
            ledger.record_epoch(0, 1, {"acr": 0.25, "acr_se": 0.5, "clean": 0.9}, np.full((20, 11), 3))
        ledger.close_trial(0, state)
        trial = TrialResult(0, NAME, False, state, None, {}, None)
        return StudyResult(study.name, run_dir, (0.0,), (), [trial], winner, {})

    return act


def failing(error: BaseException):
    def act(*_: object) -> StudyResult:
        raise error

    return act


def ending(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_a_run_that_ends_well_is_loaded_and_then_only_loaded(stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(fake(NAME))
    before = handlers()
    run = cadis_ray.run_study(DIGITS)
    assert run.trials.loc[NAME, "state"] == "complete"
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("digits-")
    assert ending(folder)["status"] == "done"
    assert handlers() == before
    assert capsys.readouterr().out == ""
    stage(failing(AssertionError("started again")))
    assert cadis_ray.run_study(str(DIGITS), out=str(folder)).trials.equals(run.trials)


def test_a_done_run_needs_no_ray(tmp_path: Path) -> None:
    run = cadis_ray.run_study(DIGITS, out=write_finished(tmp_path / "run"))
    assert run.models.index.tolist() == [NAME]


def test_failures_are_raised_and_written_down(stage) -> None:
    out = Path("run")
    before = handlers()
    refused = DataError("digits: damaged")
    stage(failing(refused))
    with pytest.raises(DataError) as caught:
        cadis_ray.run_study(DIGITS, out=out)
    assert caught.value is refused
    assert (ending(out)["exit_code"], ending(out)["reason"]) == (5, "digits: damaged")
    stage(failing(ZeroDivisionError("oh")))
    with pytest.raises(CadisError, match=r"ZeroDivisionError: oh\..*the same call goes on") as caught:
        cadis_ray.run_study(DIGITS, out=out)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.exit_code == ending(out)["exit_code"] == ExitCode.INTERNAL
    stage(fake(None))
    with pytest.raises(TrialsFailed, match="no trial was completed"):
        cadis_ray.run_study(DIGITS, out=out)
    assert ending(out)["exit_code"] == TrialsFailed.exit_code == ExitCode.TRIALS_FAILED
    assert cadis_ray.load(out).trials.loc[NAME, "state"] == "failed"
    assert handlers() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"address": "auto"}, "address: got 'auto'"), ({"out": "s3://bucket/run"}, "not a URI"),
     ({"study_file": "nowhere.yaml"}, "nowhere.yaml")],
)  # fmt: skip
def test_wrong_arguments_start_nothing(stage, arguments: dict[str, Any], said: str) -> None:
    stage(failing(AssertionError("started")))
    with pytest.raises(UsageError, match=said):
        cadis_ray.run_study(**{"study_file": DIGITS, **arguments})
    assert not Path("runs").exists()


def test_a_run_that_another_driver_holds(stage) -> None:
    stage(fake(NAME))
    open_folder(load_study(DIGITS), DIGITS.read_text(), Path("run"))
    with RunLock("run/lock"), pytest.raises(IntegrityError, match="in use by another driver"):
        cadis_ray.run_study(DIGITS, out="run")
    assert not Path("run/result.json").exists()


def test_a_signal_stops_the_study_and_is_passed_on(stage) -> None:
    before = handlers()

    def interrupted(*_: object) -> StudyResult:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    stage(interrupted)
    with pytest.raises(KeyboardInterrupt):
        cadis_ray.run_study(DIGITS, out="run")
    assert (ending(Path("run"))["status"], ending(Path("run"))["exit_code"]) == ("interrupted", 130)
    assert handlers() == before
    stage(failing(RuntimeError("wrapped")))
    with pytest.raises(CadisError):
        cadis_ray.run_study(DIGITS, out="run")
    assert handlers() == before
    stage(failing(Interrupted(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        cadis_ray.run_study(DIGITS, out="run")


def test_another_thread_runs_a_study(stage) -> None:
    stage(fake(NAME))
    found: list = []
    before = handlers()
    thread = threading.Thread(target=lambda: found.append(cadis_ray.run_study(DIGITS, out="run")))
    thread.start()
    thread.join()
    assert found[0].trials.loc[NAME, "state"] == "complete"
    assert handlers() == before


ON_RAY = """
import signal, sys
import cadis_ray
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
run = cadis_ray.run_study(sys.argv[1], out=sys.argv[2], address=sys.argv[3])
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
print(run.result.winner)
"""


@pytest.mark.ray
def test_on_ray(cluster: Cluster, tmp_path: Path) -> None:
    study = small_study() | {"trials": 1, "finalists": {"count": 1, "samples": [4]}}
    study["baselines"] = {"off_the_shelf": {"finetuning.recipe": "none"}}
    file = write_study(tmp_path / "small.yaml", study)
    command = [sys.executable, "-c", ON_RAY, file, tmp_path / "run", cluster.address]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trial-0000\n"
    assert "search: 2/2 done" in done.stderr
