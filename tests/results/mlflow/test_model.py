"""The winner in MLflow: one logged model however often it is sent, one version of the registered one."""

import json
from pathlib import Path

import pytest
import yaml

from cadis_ray.results.mlflow.store import client_of
from cadis_ray.results.mlflow.sync import sync
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.load import load_study
from cadis_ray.study.sections import Tracking
from tests.helpers.places import DIGITS

pytestmark = pytest.mark.tracking


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_winner_is_logged_and_registered_once(tmp_path: Path) -> None:
    tracking = Tracking(registered_model="robust-digits")
    study = load_study(DIGITS).model_copy(update={"tracking": tracking})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.open_trial(0, "off_the_shelf", "off_the_shelf", {"finetuning.recipe": "none"})
        ledger.close_trial(0, "complete")
        trial = TrialResult(0, "off_the_shelf", True, "complete", None, {}, None)
        result = StudyResult("digits", tmp_path, (0.0,), (), [trial], "off_the_shelf", {})
        sync(ledger, study, tmp_path, result, "FINISHED")
        ledger._connection.execute("DELETE FROM logged WHERE key LIKE '%/model' OR key LIKE '%/registered%'")
        sync(ledger, study, tmp_path, result, "FINISHED")
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (logged,) = client.search_logged_models([experiment.experiment_id])
    assert (str(logged.status), logged.name) == ("READY", "smoothed_classifier")
    assert client.get_run(str(logged.source_run_id)).info.run_name == "off_the_shelf"
    (version,) = client.search_model_versions("name = 'robust-digits'")
    assert (version.source, version.run_id) == (logged.artifact_location, logged.source_run_id)
    folder = Path(logged.artifact_location.removeprefix("file://"))
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["model_id"] == logged.model_id
    assert {p["name"] for p in json.loads(described["signature"]["params"])} == {"n0", "n", "alpha", "seed", "ids"}
    assert described["saved_input_example_info"]["artifact_path"] == "input_example.json"
    assert "predict" in described["signature"]["outputs"]
    card = (folder / "artifacts" / "README.md").read_text()
    record = json.loads((folder / "artifacts" / "smoothed" / "smoothed.json").read_text())
    for fact in ("| sigma | 0.5,", "| denoiser's timestep | 1984,", record["model"], *record["sha256"].values()):
        assert fact in card
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file() and "code" not in path.parts}
    assert suffixes <= {"", ".md", ".json", ".safetensors", ".txt", ".yaml", ".py"}
