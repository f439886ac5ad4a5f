"""A run in MLflow: one experiment a study, a parent run, a nested run for each trial and baseline.

``sync`` may be repeated at any time: runs are found again by tag, a metric point carries the time of its
ledger row, so that the store takes it for the same point, and the ledger remembers what was taken. MLflow is
imported late, in the thread that needs it, since that takes seconds.
"""

import hashlib
import json
import uuid
from pathlib import Path

from safetensors.numpy import save

from cadis_ray.certification.tsv import certificates_tsv
from cadis_ray.errors import CadisError, EnvironmentProblem
from cadis_ray.interface.text import one_line
from cadis_ray.results.mlflow.models import log_model
from cadis_ray.results.mlflow.store import (
    ENDS,
    PARENT,
    RUN,
    TRIAL,
    WINNER,
    Status,
    TrackedRun,
    address,
    connect,
    known_runs,
    without_secrets,
)
from cadis_ray.results.records import flat
from cadis_ray.results.report import figures
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.metrics import acr, certified_accuracy
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study, configuration

DIGEST_LENGTH = 36  # the longest that MLflow takes


def sync(
    ledger: Ledger,
    study: Study,
    run_dir: Path,
    result: StudyResult | None = None,
    status: Status = "RUNNING",
) -> None:
    """Bring MLflow up to the ledger; with a ``result`` also final metrics, figures, certificates and reports.

    Call it with a result after ``write_report``, whose files it sends. Where: ``store.address``; a bare SQLite file
    has its artifacts in ``mlartifacts`` beside it; experiment: ``study.tracking.experiment`` or the study's name.
    ``status`` is the parent run's. Raises whatever MLflow raises; what was taken before that is not sent again.
    """
    client, experiment_id = connect(study, run_dir.resolve())
    identity = ledger.meta("tracking") or uuid.uuid4().hex
    ledger.set_meta("tracking", identity)
    known = known_runs(client, experiment_id, identity)
    rows, logged = ledger.trials(), ledger.logged()

    def run(trial: str, parent: str | None = None, started: float | None = None) -> TrackedRun:
        if trial not in known:
            tags = {RUN: identity, TRIAL: trial} | ({PARENT: parent} if parent else {})
            start = int(1000 * started) if started else None
            name = trial or run_dir.resolve().name
            known[trial] = client.create_run(experiment_id, start, tags, name).info.run_id
        return TrackedRun(client, ledger, known[trial], logged)

    parent = run("", started=rows[0].started if rows else None)
    asked = study.model_dump(mode="json", exclude={"resources", "tracking"})
    parent.parameters("study", dict(flat(asked)))
    _inputs(parent, study)
    _sync_drivers(parent, ledger)
    for row in rows:
        one = run(row.name, parent.id, row.started)
        _sync_trial(one, row, study, run_dir)
        if row.state != "running":
            one.end(row)
        if result and row.state != "running":
            _sync_final(one, row, result, run_dir)
    if result:
        _sync_ending(parent, result, rows)
        folder = RunFolder(run_dir)
        for path in (folder.study, folder.resolved, folder.result, folder.report_html, folder.report_markdown,
                     folder.winner, folder.request):  # fmt: skip
            parent.file(path)
        for path in sorted(folder.figures.glob("*.svg")):
            parent.file(path, "figures")
    parent.status(status)
    for row in rows:
        if result and row.name == result.winner:
            # Last, for its weights may be large.
            log_model(run(row.name), experiment_id, study, result, row)


def send(ledger: Ledger, study: Study, run_dir: Path, result: StudyResult | None, status: Status) -> None:
    """``sync``, its failure in one message for the user, without a password. Raises EnvironmentProblem."""
    try:
        sync(ledger, study, run_dir, result, status)
    except CadisError:
        raise
    except Exception as error:
        uri = address(study, run_dir)
        problem = f"MLflow at {uri} does not take everything: {one_line(error)[:300]}; try again when it does"
        raise EnvironmentProblem(without_secrets(problem, uri)) from None


def _sync_trial(run: TrackedRun, row: TrialRow, study: Study, run_dir: Path) -> None:
    """Parameters and epochs of a trial; its evidence once it has ended."""
    if run.has("end"):
        return
    resolved = configuration(study, row.parameters).model_dump(mode="json")
    run.parameters("resolved", dict(flat(resolved)))
    _inputs(run, study)
    epochs = run.ledger.epochs(row.number)
    for epoch in epochs:
        run.metrics(f"epoch/{epoch.epoch}", epoch.metrics, epoch.recorded, epoch.epoch)
    if row.state == "running":
        return
    if row.trainable_parameters is not None:
        run.parameters("model", {"trainable_parameters": row.trainable_parameters})
    trained = sum(epoch.metrics.get("seconds", 0.0) for epoch in epochs)
    gpus = study.resources.gpus_per_worker * max(study.resources.workers_per_trial, 1)
    spent = {"training_seconds": trained, "gpu_seconds": gpus * trained}
    run.metrics("spent", spent, row.ended or row.started, epochs[-1].epoch if epochs else 0)
    run.artifact("configuration.json", (json.dumps(resolved, indent=2) + "\n").encode())
    counts = {f"epoch-{epoch.epoch:04d}": epoch.counts for epoch in epochs}
    if counts:
        run.artifact("counts.safetensors", save(counts))
    if row.checkpoint:
        for path in sorted(RunFolder(run_dir).checkpoint(row.checkpoint).glob("*")):
            if path.suffix in (".safetensors", ".json"):  # nothing that could run code when it is loaded
                run.file(path, "checkpoint")


def _inputs(run: TrackedRun, study: Study) -> None:
    """The images trained and counted on. The digest is of what was asked for, not of the pixels."""
    data, images = study.base.data, study.base.validation.images
    source = data.model_dump_json(exclude={"test", "test_subset"})
    for context, used in (("training", data.train or "all but the validation images"), ("validation", images)):
        profile = json.dumps({"split": context, "images": used})
        digest = hashlib.sha256(f"{source}{profile}".encode()).hexdigest()[:DIGEST_LENGTH]
        run.input(data.name, digest, context, source, profile)


def _sync_drivers(parent: TrackedRun, ledger: Ledger) -> None:
    """What ran the study: of several drivers the last one's commit, packages and machines, and a file of all."""
    drivers = {key: json.loads(text) for key, text in ledger.metas("driver ").items()}
    if not drivers:
        return
    last = drivers[max(drivers)]
    tags = {f"cadis_ray.{key}": json.dumps(value) for key, value in last.items() if key != "commit"}
    tags |= {"mlflow.source.name": "cadis_ray.tune", "mlflow.source.type": "LOCAL"}
    if last.get("commit"):
        tags["mlflow.source.git.commit"] = last["commit"]
    parent.tags(max(drivers), tags)
    parent.artifact("drivers.json", (json.dumps(drivers, indent=2) + "\n").encode())


def _sync_ending(parent: TrackedRun, result: StudyResult, rows: list[TrialRow]) -> None:
    """The winner, and its figures on the parent too, so that studies compare; what all trials took together."""
    ended = max((row.ended or row.started for row in rows), default=0.0)
    values = {f"trials_{state}": float(sum(row.state == state for row in rows)) for state in ENDS}
    if result.winner:
        winner = next(trial for trial in result.trials if trial.name == result.winner)
        values |= _final_metrics(winner, result)
        parent.tags(f"winner/{result.winner}", {WINNER: result.winner})
    parent.metrics(f"ending/{ended}", values, ended, 0)


def _sync_final(run: TrackedRun, row: TrialRow, result: StudyResult, run_dir: Path) -> None:
    """The estimate and the certificates of an ended trial; each metric's name says at which n it holds."""
    trial = next((trial for trial in result.trials if trial.name == row.name), None)
    if trial is None:
        return
    ended, step = row.ended or row.started, run.ledger.last_epoch(row.number) or 0
    run.metrics("final", _final_metrics(trial, result), ended, step)
    if c := result.certificates.get(row.name):
        run.artifact("certificates.tsv", certificates_tsv(c).encode())
        run.artifact("votes.safetensors", save({"idx": c.idx, "label": c.label, "selection": c.selection,
                                                "estimation": c.estimation}))  # fmt: skip
        run.artifact("certified_accuracy.svg", figures.svg(figures.certified_accuracy(result)).encode())
        evidence = RunFolder(run_dir).evidence(row.name)
        if evidence.is_file():
            run.file(evidence)
            with evidence.open() as lines:
                record = json.loads(lines.readline())
            profile = json.dumps({"split": "test", "images": len(c.idx), "sha256": record["data_sha256"]})
            run.input("test images", record["data_sha256"][:DIGEST_LENGTH], "testing", "{}", profile)


def _final_metrics(trial: TrialResult, result: StudyResult) -> dict[str, float]:
    values = {}
    if e := trial.estimate:
        name = f"acr_at_{e.n}_estimate"
        values = {name: e.acr, f"{name}_se": e.se, "clean_estimate": e.clean}
        values |= {f"certified_accuracy_{r:g}_at_{e.n}_estimate": v for r, v in e.certified_accuracy.items()}
    if c := result.certificates.get(trial.name):
        values[f"acr_at_{c.n}_certified"] = acr(c.radius, c.correct)
        for r in result.radii:
            share = certified_accuracy(c.radius, c.correct, r)
            values[f"certified_accuracy_{r:g}_at_{c.n}_certified"] = share
    return values
