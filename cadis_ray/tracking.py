"""A run in MLflow: one experiment a study, a parent run, a nested run for each trial and baseline.

``sync`` may be repeated at any time: runs are found again by tag, a metric point carries the time of its
ledger row, so that the store takes it for the same point, and the ledger remembers what was taken. No other
module uses MLflow; it is imported late, in the thread that needs it, since that takes seconds.
"""

import hashlib
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from safetensors.numpy import save

from cadis_ray.config import Study, configuration
from cadis_ray.ledger import Ledger, TrialRow
from cadis_ray.report import figures
from cadis_ray.report.files import certificates_tsv
from cadis_ray.report.table import one_line
from cadis_ray.results import StudyResult
from cadis_ray.smoothing.metrics import acr, certified_accuracy

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
ENDS: dict[str, Status] = {"complete": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
RUN, TRIAL, STATE, REASON = (f"cadis_ray.{key}" for key in ("run", "trial", "state", "reason"))
PARENT = "mlflow.parentRunId"
PARAMETERS_PER_BATCH, VALUE_LENGTH = 100, 6000  # MLflow's own limits
SYNC_SECONDS = 5.0


def sync(
    ledger: Ledger,
    study: Study,
    run_dir: Path,
    result: StudyResult | None = None,
    status: Status = "RUNNING",
) -> None:
    """Bring MLflow up to the ledger; with a ``result`` also final metrics, figures, certificates and reports.

    Call it with a result after ``write_report``, whose files it sends. Where: ``study.tracking.uri``, or SQLite
    at ``run_dir/mlflow.db`` with artifacts below ``run_dir/mlartifacts``; experiment: ``study.tracking.experiment``
    or the study's name. ``status`` is the parent run's. Raises whatever MLflow raises; what was taken before that
    is not sent again.
    """
    client, experiment_id = _connect(study, run_dir.resolve())
    identity = ledger.meta("tracking") or uuid.uuid4().hex
    ledger.set_meta("tracking", identity)
    known = _known_runs(client, experiment_id, identity)
    rows, logged = ledger.trials(), ledger.logged()

    def run(trial: str, parent: str | None = None, started: float | None = None) -> "_Run":
        if trial not in known:
            tags = {RUN: identity, TRIAL: trial} | ({PARENT: parent} if parent else {})
            start = int(1000 * started) if started else None
            name = trial or run_dir.resolve().name
            known[trial] = client.create_run(experiment_id, start, tags, name).info.run_id
        return _Run(client, ledger, known[trial], logged)

    parent = run("", started=rows[0].started if rows else None)
    asked = study.model_dump(mode="json", exclude={"resources", "tracking"})
    parent.parameters("study", dict(_flat(asked)))
    for row in rows:
        one = run(row.name, parent.id, row.started)
        _sync_trial(one, row, study, run_dir)
        if row.state != "running":
            one.end(row)
        if result and row.state != "running":
            _sync_final(one, row, result)
    if result:
        for name in ("study.yaml", "result.json", "report.html", "report.md", "certificates.tsv"):
            parent.file(run_dir / name)
        for path in sorted((run_dir / "figures").glob("*.svg")):
            parent.file(path, "figures")
    parent.status(status)


class Outbox:
    """Keeps MLflow up to date from a daemon thread while the study runs, and never delays or fails it.

    The thread has a ledger connection of its own. The first failure becomes one ``warn`` line, said from that
    thread; the ledger keeps what was not taken, and the next ``sync`` of the run sends it.
    """

    def __init__(self, ledger_path: Path, study: Study, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._study, self._run_dir, self._ledger_path = study, run_dir, ledger_path
        self._warn, self._warned = warn, False
        self._closing = threading.Event()
        self._final: tuple[StudyResult | None, Status] = (None, "RUNNING")
        self._drained = False
        self._thread = threading.Thread(target=self._work, name="mlflow-outbox", daemon=True)
        self._thread.start()

    def close(self, result: StudyResult | None, status: Status, limit: float) -> bool:
        """Send the rest within ``limit`` seconds; whether all of it was taken."""
        self._final = (result, status)
        self._closing.set()
        self._thread.join(limit)
        if not self._drained:
            self._complain(f"not done after {limit:g} s")
        return self._drained

    def _work(self) -> None:
        with self._forgiven(), Ledger(self._ledger_path) as ledger:
            while not self._closing.wait(SYNC_SECONDS):
                with self._forgiven():
                    sync(ledger, self._study, self._run_dir)
            sync(ledger, self._study, self._run_dir, *self._final)
            self._drained = True

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracking server does, the study goes on
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            uri = self._study.tracking.uri or "the run directory"
            message = f"MLflow at {uri} does not take everything ({one_line(problem)[:300]})."
            secret = urlsplit(uri).netloc.rpartition("@")[0]
            self._warn(
                (message.replace(secret, "***") if secret else message)
                + " The study goes on; its ledger keeps what is missing, and resuming the run sends it."
            )


class _Run:
    """One MLflow run; what the ledger has marked as ``logged`` is not sent again."""

    def __init__(self, client: "MlflowClient", ledger: Ledger, run_id: str, logged: set[str]) -> None:
        self.client, self.ledger, self.id, self.logged = client, ledger, run_id, logged

    def once(self, key: str, send: Callable[[], object]) -> None:
        """Send and mark; a crash between the two sends again what the store takes for the same."""
        mark = f"{self.id}/{key}"
        if mark not in self.logged:
            send()
            self.ledger.mark_logged(mark)
            self.logged.add(mark)

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


def _sync_trial(run: _Run, row: TrialRow, study: Study, run_dir: Path) -> None:
    """Parameters and epochs of a trial; its evidence once it has ended."""
    if f"{run.id}/end" in run.logged:
        return
    resolved = configuration(study, row.parameters).model_dump(mode="json")
    run.parameters("resolved", dict(_flat(resolved)))
    epochs = run.ledger.epochs(row.number)
    for epoch in epochs:
        run.metrics(f"epoch/{epoch.epoch}", epoch.metrics, epoch.recorded, epoch.epoch)
    if row.state == "running":
        return
    if row.trainable_parameters is not None:
        run.parameters("model", {"trainable_parameters": row.trainable_parameters})
    counts = {f"epoch-{epoch.epoch:04d}": epoch.counts for epoch in epochs}
    if counts:
        run.artifact("counts.safetensors", save(counts))
    if row.checkpoint:
        for path in sorted((run_dir / row.checkpoint).glob("*")):
            if path.suffix in (".safetensors", ".json"):  # nothing that could run code when it is loaded
                run.file(path, "checkpoint")


def _sync_final(run: _Run, row: TrialRow, result: StudyResult) -> None:
    """The estimate and the certificates of an ended trial; each metric's name says at which n it holds."""
    ended, step = row.ended or row.started, run.ledger.last_epoch(row.number) or 0
    estimates = {trial.name: trial.estimate for trial in result.trials}
    if e := estimates.get(row.name):
        name = f"acr_at_{e.n}_estimate"
        values = {name: e.acr, f"{name}_se": e.se, "clean_estimate": e.clean}
        values |= {f"certified_accuracy_{r:g}_at_{e.n}_estimate": v for r, v in e.certified_accuracy.items()}
        run.metrics("estimate", values, ended, step)
    if c := result.certificates.get(row.name):
        values = {f"acr_at_{c.n}_certified": acr(c.radius, c.correct)}
        for r in result.radii:
            share = certified_accuracy(c.radius, c.correct, r)
            values[f"certified_accuracy_{r:g}_at_{c.n}_certified"] = share
        run.metrics("certificates", values, ended, step)
        run.artifact("certificates.tsv", certificates_tsv(c).encode())
        run.artifact("certified_accuracy.svg", figures.svg(figures.certified_accuracy(result)).encode())


def _connect(study: Study, run_dir: Path) -> "tuple[MlflowClient, str]":
    # MLflow has no other switch for these. A server that is down costs seconds, and nobody is told of this run.
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they announce each step of making a new database
        logging.getLogger(name).setLevel(logging.ERROR)
    uri, experiment = study.tracking.uri, study.tracking.experiment or study.name
    scheme = urlsplit(uri or "").scheme
    artifacts = run_dir / "mlartifacts"
    if uri and scheme.startswith("sqlite"):
        database = Path(uri.split(":///", 1)[-1]).resolve()
        uri, artifacts = f"sqlite:///{database}", database.parent / "mlartifacts"
    client = MlflowClient(uri or f"sqlite:///{run_dir / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    if found:
        return client, found.experiment_id
    # A server stores artifacts in a place of its own; a bare database would take the working directory.
    location = None if scheme in ("http", "https") else artifacts.as_uri()
    return client, client.create_experiment(experiment, artifact_location=location)


def _known_runs(client: "MlflowClient", experiment_id: str, identity: str) -> dict[str, str]:
    """Trial name ('' for the parent) -> MLflow run id, of the runs of one run directory."""
    known, token = {}, None
    while True:
        page = client.search_runs([experiment_id], f"tags.`{RUN}` = '{identity}'", page_token=token)
        known |= {run.data.tags[TRIAL]: run.info.run_id for run in page}
        token = page.token
        if not token:
            return known


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
