"""MLflow gets everything once, whatever is repeated, interrupted or down."""

import json
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cadis_ray.certification.certificates import Certificates
from cadis_ray.data.settings import Data
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.models.settings import Classifier, Denoiser
from cadis_ray.results.mlflow.outbox import Outbox
from cadis_ray.results.mlflow.sync import sync
from cadis_ray.results.report.page import write_report
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.sections import Distribution, Resources, Tracking
from cadis_ray.study.study import Study

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MLflow's own imports warn of is not ours
    from mlflow import MlflowClient

# MLflow's own use of SQLAlchemy and Starlette.
pytestmark = [pytest.mark.tracking, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

WEIGHT, RECIPE = "finetuning.adv_weight", "finetuning.recipe"


def study(uri: str | None = None) -> Study:
    base = Configuration(
        data=Data(name="digits", train=200, seed=7),
        sigma=0.25,
        denoiser=Denoiser(family="improved_diffusion", checkpoint="d.safetensors", config={"image_size": 8}),
        classifier=Classifier(library="timm", name="vit_tiny_patch16_224", checkpoint="c.safetensors"),
    )
    return Study(
        name="tiny",
        trials=3,
        base=base,
        space={WEIGHT: Distribution(low=0.5, high=8, log=True)},
        baselines={"off_the_shelf": {RECIPE: "none"}},
        resources=Resources(workers_per_trial=2, gpus_per_worker=0.5),
        tracking=Tracking(uri=uri),
    )


def votes(trial: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([trial, epoch]).integers(0, 65, (20, 11))


def record(ledger: Ledger, number: int, first: int, last: int) -> None:
    for epoch in range(first, last):
        metrics = {"acr": 0.2 + number / 10 + epoch / 100, "loss": 1 / (1 + epoch), "seconds": 4.0}
        ledger.record_epoch(number, epoch, metrics, votes(number, epoch))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a baseline, a finished, a failed and a running trial."""
    checkpoint = tmp_path / "run" / "training" / "epoch-0002"
    checkpoint.mkdir(parents=True)
    for name in ("adapter.safetensors", "meta.json", "optimizer.pkl"):
        (checkpoint / name).write_text(name)
    (tmp_path / "run" / "study.yaml").write_text("name: tiny\n")
    (tmp_path / "run" / "certificates").mkdir()
    (tmp_path / "run" / "certificates" / "trial-0000.jsonl").write_text(json.dumps({"data_sha256": 16 * "abcd"}) + "\n")
    with Ledger(tmp_path / "run" / "ledger.db") as ledger:
        for second, commit in ((2.0, "later"), (1.0, "earlier")):
            made_by = {"commit": commit, "versions": {"torch": "2"}, "hardware": {"gpus": ["H200"]}}
            ledger.set_meta(f"driver {second}", json.dumps(made_by))
        ledger.open_trial(0, "off_the_shelf", "off_the_shelf", {RECIPE: "none"})
        record(ledger, 0, 0, 1)
        ledger.close_trial(0, "complete", trainable_parameters=0)
        ledger.open_trial(1, "trial-0000", None, {WEIGHT: 2.5})
        record(ledger, 1, 1, 3)
        ledger.close_trial(1, "complete", checkpoint="training/epoch-0002", trainable_parameters=321)
        ledger.open_trial(2, "trial-0001", None, {WEIGHT: 7.5})
        ledger.close_trial(2, "failed", reason="loss is nan")
        ledger.open_trial(3, "trial-0002", None, {WEIGHT: 1.5})
        record(ledger, 3, 1, 2)
    return tmp_path / "run"


def outcome(run_dir: Path, ledger: Ledger) -> StudyResult:
    trials, certificates = [], {}
    for row in ledger.trials():
        estimate = (
            None if row.state == "failed" else Estimate(0.25 + row.number / 8, 0.5, 0.75, {0.25: 0.5}, 10_000, 20, 64)
        )
        trials.append(
            TrialResult(row.number, row.name, row.baseline is not None, row.state, row.reason, row.parameters, estimate)
        )
    for name, radius in [("off_the_shelf", 0.25), ("trial-0000", 0.5)]:
        ones = np.ones(4, dtype=int)
        radii = np.array([radius, radius, 0.75, 0.0])
        predict = np.array([1, 1, 1, -1])
        certificates[name] = Certificates(
            name, "protocol", 0.25, 100, 1000, 0.001, np.arange(4), ones, predict, radii, predict == 1, ones * 0.5,
            np.zeros((4, 11), int), np.zeros((4, 11), int), ones * 0.5,
        )  # fmt: skip
    return StudyResult("tiny", run_dir, (0.0, 0.25, 0.5), (WEIGHT,), trials, "trial-0000", certificates)


def read(uri: str) -> dict[str, Any]:
    """Everything in the experiment: run name -> run, with ``points``: every stored (key, step, value), sorted."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id]):
        histories = (client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
        points = sorted((p.key, p.step, p.value) for history in histories for p in history)
        name = str(run.info.run_name)
        assert name not in found
        found[name] = (run, points)
    return found


def artifacts(run_dir: Path, run: Any) -> dict[str, Path]:
    """Path below the run's artifacts -> file."""
    folder = run_dir / "mlartifacts" / run.info.run_id / "artifacts"
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def points_of(ledger: Ledger, number: int) -> list[tuple[str, int, float]]:
    """What every epoch measured, and once a trial has ended what it took: 4 s an epoch on twice half a GPU."""
    epochs, row = ledger.epochs(number), ledger.trials()[number]
    points = [(key, e.epoch, value) for e in epochs for key, value in e.metrics.items()]
    last, seconds = (epochs[-1].epoch if epochs else 0), 4.0 * len(epochs)
    ended = [("training_seconds", last, seconds), ("gpu_seconds", last, seconds)]
    return sorted(points + (ended if row.state != "running" else []))


def test_everything_is_in_mlflow_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "cadis_ray.results.mlflow.sync.log_model", lambda *_: None
    )  # the winner of this run has no weights
    uri = f"sqlite:///{run_dir}/mlflow.db"
    with Ledger(run_dir / "ledger.db") as ledger:
        sync(ledger, study(), run_dir)
        seen = read(uri)
        assert set(seen) == {"run", "off_the_shelf", "trial-0000", "trial-0001", "trial-0002"}
        statuses = {name: run.info.status for name, (run, _) in seen.items()}
        assert statuses == {
            "run": "RUNNING", "off_the_shelf": "FINISHED", "trial-0000": "FINISHED", "trial-0001": "FAILED",
            "trial-0002": "RUNNING",
        }  # fmt: skip
        for row in ledger.trials():
            run, points = seen[row.name]
            assert points == points_of(ledger, row.number)
            assert run.data.tags["mlflow.parentRunId"] == seen["run"][0].info.run_id
        parameters = seen["trial-0000"][0].data.params
        assert parameters[WEIGHT] == "2.5"
        assert (parameters["sigma"], parameters["finetuning.lora.r"]) == ("0.25", "4")
        assert (parameters["denoiser.config.image_size"], parameters["trainable_parameters"]) == ("8", "321")
        assert seen["off_the_shelf"][0].data.params[RECIPE] == "none"
        assert seen["trial-0001"][0].data.tags["cadis_ray.reason"] == "loss is nan"
        files = artifacts(run_dir, seen["trial-0000"][0])
        checkpoint = {"checkpoint/adapter.safetensors", "checkpoint/meta.json"}
        assert set(files) == {"counts.safetensors", "configuration.json"} | checkpoint
        assert json.loads(files["configuration.json"].read_text())["finetuning"]["adv_weight"] == 2.5
        for run, _ in seen.values():
            used = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
            assert {context: json.loads(d.profile)["images"] for context, d in used.items()} == {
                "training": 200, "validation": 400
            }  # fmt: skip
            assert json.loads(used["training"].source)["seed"] == 7
            assert used["training"].digest != used["validation"].digest
        tags = seen["run"][0].data.tags
        assert tags["mlflow.source.git.commit"] == "later"
        assert json.loads(tags["cadis_ray.hardware"]) == {"gpus": ["H200"]}
        assert json.loads(tags["cadis_ray.versions"]) == {"torch": "2"}
        counts = load_file(files["counts.safetensors"])
        assert sorted(counts) == ["epoch-0001", "epoch-0002"]
        np.testing.assert_array_equal(counts["epoch-0002"], votes(1, 2))

        # The driver goes on, is killed before it could mark what MLflow took, and all is sent again.
        record(ledger, 3, 2, 4)
        ledger.close_trial(3, "pruned")
        ledger._connection.execute("DELETE FROM logged")
        result = outcome(run_dir, ledger)
        write_report(result)
        for _ in range(2):
            sync(ledger, study(), run_dir, result, "FINISHED")
        seen = read(uri)
        assert {name: run.info.status for name, (run, _) in seen.items()} == statuses | {
            "run": "FINISHED", "trial-0002": "KILLED"
        }  # fmt: skip
        run, points = seen["trial-0002"]
        assert [p for p in points if p in points_of(ledger, 3)] == points_of(ledger, 3)
        run, points = seen["trial-0000"]
        final = {key: value for key, step, value in points if (key, step, value) not in points_of(ledger, 1)}
        assert final == {
            "acr_at_10000_estimate": 0.375, "acr_at_10000_estimate_se": 0.5, "clean_estimate": 0.75,
            "certified_accuracy_0.25_at_10000_estimate": 0.5, "acr_at_1000_certified": 0.4375,
            "certified_accuracy_0_at_1000_certified": 0.75, "certified_accuracy_0.25_at_1000_certified": 0.75,
            "certified_accuracy_0.5_at_1000_certified": 0.75,
        }  # fmt: skip
        assert len(points) == len(final) + len(points_of(ledger, 1))
        (tested,) = (i.dataset for i in run.inputs.dataset_inputs if i.tags[0].value == "testing")
        assert tested.digest == (16 * "abcd")[:36]
        whole, totals = seen["run"][0].data, {"trials_complete": 2, "trials_failed": 1, "trials_pruned": 1}
        assert whole.metrics == final | totals
        assert whole.tags["cadis_ray.winner"] == "trial-0000"
        files = artifacts(run_dir, run)
        np.testing.assert_array_equal(load_file(files["votes.safetensors"])["estimation"], np.zeros((4, 11)))
        assert "trial-0000.jsonl" in files
        assert files["certificates.tsv"].read_text() == (run_dir / "certificates" / "trial-0000.tsv").read_text()
        assert "<svg" in files["certified_accuracy.svg"].read_text()
        files = artifacts(run_dir, seen["run"][0])
        figures = {f"figures/{path.name}" for path in (run_dir / "figures").iterdir()}
        assert set(files) == {"study.yaml", "report.html", "report.md", "certificates.tsv", "drivers.json"} | figures
    assert not list(run_dir.glob("mlruns"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_costs_one_warning(run_dir: Path):
    said: list[str] = []
    uri = f"http://token@127.0.0.1:{free_port()}"
    outbox = Outbox(run_dir / "ledger.db", study(uri), run_dir, said.append)
    assert not outbox.close(None, "KILLED", limit=20)
    assert len(said) == 1
    assert "127.0.0.1" in said[0]
    assert "token" not in said[0]
    with Ledger(run_dir / "ledger.db") as ledger:
        assert ledger.logged() == set()


def test_a_server_that_never_answers_is_left_at_the_limit(run_dir: Path):
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        outbox = Outbox(run_dir / "ledger.db", study(uri), run_dir, said.append)
        assert not outbox.close(None, "KILLED", limit=0.5)
        assert time.monotonic() - began < 5
    assert len(said) == 1
    assert "not done after 0.5 s" in said[0]
