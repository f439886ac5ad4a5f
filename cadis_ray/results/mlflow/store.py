"""Where MLflow keeps a study: the store's address, its runs found again by tag, and what was sent to one of them."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
ENDS: dict[str, Status] = {"complete": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
RUN, TRIAL, STATE, REASON, WINNER = (f"cadis_ray.{key}" for key in ("run", "trial", "state", "reason", "winner"))
PARENT = "mlflow.parentRunId"
PARAMETERS_PER_BATCH, VALUE_LENGTH = 100, 6000  # MLflow's own limits


def address(study: Study, run_dir: Path) -> str:
    """The store's URI: ``study.tracking.uri``, MLflow's own environment variable, or SQLite in the run's folder.

    It may hold a password: say it only through ``without_secrets``.
    """
    uri = study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and urlsplit(uri).scheme.startswith("sqlite"):
        return f"sqlite:///{Path(uri.split(':///', 1)[-1]).resolve()}"
    return uri or f"sqlite:///{RunFolder(run_dir.resolve()).mlflow}"


def without_secrets(text: str, uri: str) -> str:
    """``text`` with what a URI holds of user and password blotted out."""
    parts = urlsplit(uri)
    user, at, _ = parts.netloc.rpartition("@")
    secrets = {user + at, parts.password or "", user if parts.scheme.startswith("http") else ""}
    secrets |= {value for key, values in parse_qs(parts.query).items() if "password" in key.lower() for value in values}
    for secret in sorted(secrets | {unquote(secret) for secret in secrets}, key=len, reverse=True):
        text = text.replace(secret, "***" + at if secret.endswith("@") else "***") if secret else text
    return text


def quiet() -> None:
    """MLflow gives up soon, announces nothing and tells nobody of this run."""
    # It has no other switch for these. A server that is down costs seconds.
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    for name in ("mlflow", "alembic"):  # they announce each step of making a new database
        logging.getLogger(name).setLevel(logging.ERROR)


def client_of(uri: str) -> "MlflowClient":
    """A client of the tracking server, and of the registry with it, at ``uri``."""
    quiet()
    from mlflow import MlflowClient

    quiet()  # importing it sets its loggers again
    return MlflowClient(uri, uri)


def connect(study: Study, run_dir: Path) -> "tuple[MlflowClient, str]":
    """A client and the id of the study's experiment, which is made where it is missing."""
    uri, experiment = address(study, run_dir), study.tracking.experiment or study.name
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    if found:
        return client, found.experiment_id
    scheme = urlsplit(uri).scheme
    beside = Path(uri.removeprefix("sqlite:///")).parent if scheme == "sqlite" else run_dir.resolve()
    artifacts = RunFolder(beside).mlflow_artifacts
    # A server stores artifacts in a place of its own; a bare database would take the working directory.
    location = None if scheme in ("http", "https") else artifacts.as_uri()
    return client, client.create_experiment(experiment, artifact_location=location)


def known_runs(client: "MlflowClient", experiment_id: str, identity: str) -> dict[str, str]:
    """Trial name ('' for the parent) -> MLflow run id, of the runs of one run directory."""
    known, token = {}, None
    while True:
        page = client.search_runs([experiment_id], f"tags.`{RUN}` = '{identity}'", page_token=token)
        known |= {run.data.tags[TRIAL]: run.info.run_id for run in page}
        token = page.token
        if not token:
            return known


class TrackedRun:
    """One MLflow run; what the ledger has marked as ``logged`` is not sent again."""

    def __init__(self, client: "MlflowClient", ledger: Ledger, run_id: str, logged: set[str]) -> None:
        self.client, self.ledger, self.id, self.logged = client, ledger, run_id, logged

    def once(self, key: str, send: Callable[[], object]) -> None:
        """Send and mark; a crash between the two sends again what the store takes for the same."""
        if not self.has(key):
            send()
            mark = f"{self.id}/{key}"
            self.ledger.mark_logged(mark)
            self.logged.add(mark)

    def has(self, key: str) -> bool:
        return f"{self.id}/{key}" in self.logged

    def parameters(self, key: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        made = [Param(name, str(value)[:VALUE_LENGTH]) for name, value in values.items()]
        for part, first in enumerate(range(0, len(made), PARAMETERS_PER_BATCH)):
            batch = made[first : first + PARAMETERS_PER_BATCH]
            self.once(f"parameters/{key}/{part}", partial(self.client.log_batch, self.id, params=batch))

    def metrics(self, key: str, values: Mapping[str, float], seconds: float, step: int) -> None:
        from mlflow.entities import Metric

        made = [Metric(name, float(value), int(1000 * seconds), step) for name, value in values.items()]
        self.once(f"metrics/{key}", lambda: self.client.log_batch(self.id, metrics=made))

    def tags(self, key: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        made = [RunTag(name, value[:VALUE_LENGTH]) for name, value in values.items()]
        self.once(f"tags/{key}", lambda: self.client.log_batch(self.id, tags=made))

    def input(self, name: str, digest: str, context: str, source: str, profile: str) -> None:
        """A data set and the part of it that was used; ``digest``: at most 36 characters."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        held = Dataset(name, digest, "local", source, profile=profile)
        tagged = DatasetInput(held, [InputTag("mlflow.data.context", context)])
        self.once(f"input/{context}/{digest}", lambda: self.client.log_inputs(self.id, [tagged]))

    def artifact(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            path.write_bytes(content)
            self.file(path)

    def file(self, path: Path, folder: str | None = None) -> None:
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            key = f"artifact/{folder}/{path.name}/{digest}"
            self.once(key, lambda: self.client.log_artifact(self.id, str(path), folder))

    def end(self, row: TrialRow) -> None:
        def send() -> None:
            self.client.set_tag(self.id, STATE, row.state)
            if row.reason:
                self.client.set_tag(self.id, REASON, row.reason[:VALUE_LENGTH])
            ended = int(1000 * row.ended) if row.ended else None
            self.client.set_terminated(self.id, ENDS[row.state], ended)

        self.once("end", send)

    def status(self, status: Status) -> None:
        if status == "RUNNING":
            self.client.update_run(self.id, status=status)
        else:
            self.client.set_terminated(self.id, status)
