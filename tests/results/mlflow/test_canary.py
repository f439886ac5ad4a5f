"""A name that is markup or a path, and an address with a password, do no harm and are said nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cadis_ray.compare import sync
from cadis_ray.errors import EnvironmentProblem, UsageError
from cadis_ray.results.mlflow.outbox import Outbox
from cadis_ray.results.mlflow.store import address, client_of, without_secrets
from cadis_ray.results.report.page import write_report
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from tests.helpers.places import DIGITS

pytestmark = pytest.mark.tracking

CANARY = "c4n4ry-hunter2"
MARKUP = "<script>alert('..')</script>"


def written(path: Path, **tracked: str) -> Path:
    text = DIGITS.read_text() + yaml.safe_dump({"tracking": tracked} if tracked else {})
    path.write_text(text.replace("{}\n", ""))
    return path


@pytest.mark.parametrize("name", [MARKUP, "../../etc", "a/b", "-rf", "A name", ""])
def test_a_study_s_name_that_is_markup_or_a_path_is_refused(tmp_path: Path, name: str) -> None:
    study = yaml.safe_load(DIGITS.read_text()) | {"name": name}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(UsageError, match="name: "):
        load_study(tmp_path / "s.yaml")


@pytest.mark.process
@pytest.mark.parametrize(
    "uri",
    [f"http://me:{CANARY}@host:5000", f"postgresql://me:{CANARY}@host/db", f"postgresql://host/db?password={CANARY}"],
)
def test_a_password_in_the_study_file_ends_it_before_anything_is_written(tmp_path: Path, uri: str) -> None:
    study = written(tmp_path / "study.yaml", uri=uri)
    command = [sys.executable, "-m", "cadis_ray.tune", study, "--out", tmp_path / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "holds a password" in done.stderr
    assert CANARY not in done.stderr + done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of SQLAlchemy
def test_an_address_with_a_password_is_never_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's own environment variable may hold one. Its server is down, so that every message there is is said."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@127.0.0.1:9")
    run_dir = tmp_path / MARKUP.replace("/", "")
    study = load_study(written(tmp_path / "study.yaml", experiment=MARKUP))
    open_folder(study, (tmp_path / "study.yaml").read_text(), run_dir)
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        ledger.open_trial(0, "trial-0000", None, {})
        ledger.close_trial(0, "failed", MARKUP)
    said: list[str] = []
    assert not Outbox(run_dir / "ledger.sqlite", study, run_dir, said.append).close(None, "KILLED", 20)
    with pytest.raises(EnvironmentProblem) as refused:
        sync(run_dir)
    trial = TrialResult(0, "trial-0000", False, "failed", MARKUP, {}, None)
    write_report(StudyResult(study.name, run_dir, (0.0,), (), [trial], None, {}))
    outputs = capfd.readouterr()
    heard = [*said, str(refused.value), outputs.out, outputs.err, caplog.text]
    assert "127.0.0.1:9" in said[0]
    assert CANARY not in "".join(heard)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]

    # Then it goes to a file: the experiment has that name, and nothing lies outside the run's folder.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(run_dir)
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", run_dir.name}
    assert client_of(address(study, run_dir)).get_experiment_by_name(MARKUP)
    report = (run_dir / "report.html").read_text()
    assert "<script" not in report
    assert "&lt;script&gt;" in report


def test_only_what_is_secret_is_blotted_out() -> None:
    uri = "http://name:p%40ss@name-server:5000/name"
    assert (
        without_secrets(f"{uri} refused p%40ss and p@ss", uri) == "http://***@name-server:5000/name refused *** and ***"
    )
    assert (
        without_secrets("at me, postgresql://me@host/db", "postgresql://me@host/db")
        == "at me, postgresql://***@host/db"
    )
    assert without_secrets("x?password=abc is abc", "postgresql://h/db?password=abc") == "x?password=*** is ***"
