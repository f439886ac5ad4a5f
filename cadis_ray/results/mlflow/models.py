"""The winner in MLflow: a logged model of its run, and a version of a registered model where the study names one."""

import tempfile
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.models import Model

from cadis_ray.results.export.write import CARD, whole_folder, write_smoothed
from cadis_ray.results.mlflow.store import TrackedRun
from cadis_ray.results.study import StudyResult
from cadis_ray.storage.ledger import TrialRow
from cadis_ray.study.study import Study

NAME, READY = "smoothed_classifier", "READY"


def log_model(run: TrackedRun, experiment_id: str, study: Study, result: StudyResult, row: TrialRow) -> None:
    """Log the smoothed classifier of a run's trial as a pyfunc, once; a version of ``tracking.registered_model``.

    It loads from ``models:/ID``. An upload that was cut off is taken up again under the same id.
    """
    client, register = run.client, study.tracking.registered_model
    if run.has("model") and (register is None or run.has(f"registered/{register}")):
        return
    logged = _logged(run, experiment_id) or client.create_logged_model(
        experiment_id, NAME, run.id, model_type="cadis_ray.smoothed"
    )

    def send() -> None:
        if str(logged.status) != READY:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "model"
                described = Model(run_id=run.id, model_id=logged.model_id)
                write_pyfunc(folder, study, result, row, described)
                client.log_model_artifacts(logged.model_id, str(folder))
            client.finalize_logged_model(logged.model_id, "READY")
        held = client.get_run(run.id).outputs
        if not any(output.model_id == logged.model_id for output in (held.model_outputs if held else [])):
            client.log_outputs(run.id, [LoggedModelOutput(logged.model_id, run.ledger.last_epoch(row.number) or 0)])

    run.once("model", send)
    if register:
        run.once(f"registered/{register}", lambda: _register(run, logged, register))


def write_pyfunc(out: Path, study: Study, result: StudyResult, row: TrialRow, described: Model | None = None) -> None:
    """Write a model as a pyfunc to ``out``, which must not exist; ``described``: the logged model that it is.

    Raises UsageError for a trial that has no weights.
    """
    from cadis_ray.results.mlflow.pyfunc import save  # MLflow warns of the class whenever it is imported

    with whole_folder(out) as temporary:
        card = write_smoothed(temporary / "smoothed", study, result, row)
        save(temporary / "made", temporary / "smoothed", card.rename(temporary / CARD), described)


def _logged(run: TrackedRun, experiment_id: str) -> LoggedModel | None:
    """The run's logged model, where a sync before this one made it."""
    return next(iter(run.client.search_logged_models([experiment_id], f"source_run_id = '{run.id}'")), None)


def _register(run: TrackedRun, logged: LoggedModel, name: str) -> None:
    client = run.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    if not any(version.run_id == run.id for version in client.search_model_versions(f"name = '{name}'")):
        # Without a server MLflow looks a models:/ source up in its process's default store, not in this one.
        served = client.tracking_uri.startswith("http")
        source = f"models:/{logged.model_id}" if served else logged.artifact_location
        client.create_model_version(name, source, run.id, model_id=logged.model_id)
