"""A study of 32 concurrent trials whose MLflow server was killed in its middle, and is up again."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from cadis_ray.compare import sync
from cadis_ray.results.mlflow.outbox import Outbox
from cadis_ray.results.records import write_result
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study
from tests.helpers.mlflow_server import Server
from tests.helpers.places import DIGITS

TRIALS, EPOCHS = 32, 3


@dataclass
class Told:
    """The run, where it is tracked, and what was said about that."""

    run_dir: Path
    study: Study
    uri: str
    warned: list[str] = field(default_factory=list)
    taken_before: int = 0


def record(ledger: Ledger, epoch: int) -> None:
    for number in range(TRIALS):
        votes = np.random.default_rng([number, epoch]).integers(0, 65, (20, 11))
        metrics = {"acr": 0.2 + number / 100 + epoch / 50, "seconds": 2.5}
        ledger.record_epoch(number, epoch, metrics, votes)


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder = tmp_path_factory.mktemp("tracked")
    server = Server(folder)
    uri_line = f"\ntracking: {{uri: '{server.uri}'}}\n"
    (folder / "study.yaml").write_text(DIGITS.read_text() + uri_line)
    study = load_study(folder / "study.yaml")
    told = Told(folder / "run", study, server.uri)
    open_folder(study, (folder / "study.yaml").read_text(), told.run_dir)
    server.start()
    with pytest.MonkeyPatch.context() as patched, Ledger(told.run_dir / "ledger.sqlite") as ledger:
        patched.setattr("cadis_ray.results.mlflow.outbox.SYNC_SECONDS", 0.1)
        patched.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        for number in range(TRIALS):
            ledger.open_trial(number, f"trial-{number:04d}", None, {"finetuning.adv_weight": 0.5 + number / 8})
        outbox = Outbox(ledger.path, study, told.run_dir, told.warned.append)
        record(ledger, 1)
        until = time.monotonic() + 60
        while not any("metrics/epoch/1" in key for key in ledger.logged()):
            assert time.monotonic() < until
            assert outbox._thread.is_alive()
            time.sleep(0.02)
        server.kill()
        told.taken_before = len(ledger.logged())
        for epoch in range(2, EPOCHS + 1):
            record(ledger, epoch)
        for number in range(TRIALS):
            ledger.close_trial(number, "complete", trainable_parameters=321)
        write_result(told.run_dir, {"status": "interrupted", "exit_code": 143})
        assert not outbox.close(None, "KILLED", limit=30)
    server.start()
    sync(told.run_dir)
    yield told
    server.kill()
