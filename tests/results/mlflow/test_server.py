"""A server that dies in the middle of a study costs nothing of it."""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cadis_ray.compare import sync
from cadis_ray.results.mlflow.store import TRIAL, client_of
from cadis_ray.storage.run_folder import RunFolder

pytestmark = [
    pytest.mark.tracking,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own use of SQLAlchemy
]


def points(told: Any) -> dict[str, list[tuple[str, int, float]]]:
    """Trial name -> every stored (key, step, value)."""
    client = client_of(told.uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        name = run.data.tags[TRIAL]
        assert name not in found, "a run was created twice"
        histories = (client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
        found[name] = sorted((p.key, p.step, p.value) for history in histories for p in history)
    return found


def test_every_trial_and_every_point_is_there_once(told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(told.warned) == 1
    assert f"python -m cadis_ray.compare sync {told.run_dir}" in told.warned[0]
    assert "locked" not in told.warned[0]
    with RunFolder(told.run_dir).open_ledger() as ledger:
        assert 0 < told.taken_before < len(ledger.logged())
        expected: dict[str, list[tuple[str, int, float]]] = {"": []}
        for row in ledger.trials():
            own = [(key, e.epoch, value) for e in ledger.epochs(row.number) for key, value in e.metrics.items()]
            expected[row.name] = sorted([*own, ("gpu_seconds", 3, 0.0), ("training_seconds", 3, 7.5)])
    assert len(expected) == 33
    assert points(told) == expected
    sync(told.run_dir)
    assert "0 things were missing" in capsys.readouterr().out
    assert points(told) == expected


def test_artifacts_come_back_from_the_server_as_they_were(told: Any, tmp_path: Any) -> None:
    client = client_of(told.uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TRIAL}` = 'trial-0031'")
    counts = load_file(client.download_artifacts(run.info.run_id, "counts.safetensors", str(tmp_path)))
    assert np.array_equal(counts["epoch-0003"], np.random.default_rng([31, 3]).integers(0, 65, (20, 11)))
    assert (run.info.status, run.data.params["finetuning.adv_weight"]) == ("FINISHED", "4.375")
