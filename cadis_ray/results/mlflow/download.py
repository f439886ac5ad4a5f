"""Ended runs of an MLflow experiment, brought back as folders that the comparison reads."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from cadis_ray.errors import EnvironmentProblem, UsageError
from cadis_ray.results.mlflow.store import PARENT, TRIAL, client_of, without_secrets
from cadis_ray.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

NEEDED = ("study.json", "result.json")
CERTIFICATES = "certificates.tsv"


def bring(uri: str, experiment: str, names: Collection[str], folder: Path) -> dict[str, Path]:
    """A folder in ``folder`` for each ended run of the experiment, by name, in the order of their start.

    ``names``: only these runs; empty: all that have ended. A name that several runs have is followed by the run's id.
    Raises UsageError where the experiment or a run is not there or has not ended, EnvironmentProblem where MLflow at
    ``uri`` cannot be read.
    """
    try:
        client = client_of(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            there = ", ".join(sorted(one.name for one in client.search_experiments()))
            raise UsageError(f"--experiment: got {experiment!r}; MLflow has {there}")
        ended = _ended(client, found.experiment_id)
        chosen = {name: run_id for name, run_id in ended.items() if not names or name in names}
        if missing := sorted(set(names) - set(chosen)) or ([] if chosen else ["none"]):
            have = ", ".join(ended) or "none"
            raise UsageError(f"--runs: got {', '.join(missing)}; runs of {experiment} that have ended: {have}")
        return {
            name: _bring(client, found.experiment_id, run_id, folder / str(number))
            for number, (name, run_id) in enumerate(chosen.items())
        }
    except UsageError:
        raise
    except Exception as error:  # MLflow's stores raise what their libraries raise
        problem = f"MLflow at {uri} cannot be read: {error}"
        raise EnvironmentProblem(without_secrets(problem, uri)) from None


def _ended(client: "MlflowClient", experiment_id: str) -> dict[str, str]:
    """Name -> id of the runs whose results are there."""
    parents = client.search_runs([experiment_id], f"tags.`{TRIAL}` = ''", order_by=["attributes.start_time"])
    runs = [
        run.info for run in parents if set(NEEDED) <= {file.path for file in client.list_artifacts(run.info.run_id)}
    ]
    names = [str(run.run_name) for run in runs]
    return {
        name if names.count(name) == 1 else f"{name} {run.run_id}": run.run_id
        for name, run in zip(names, runs, strict=True)
    }


def _bring(client: "MlflowClient", experiment_id: str, run_id: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in NEEDED:
        client.download_artifacts(run_id, file, str(folder))
    for trial in client.search_runs([experiment_id], f"tags.`{PARENT}` = '{run_id}'", max_results=50_000):
        if CERTIFICATES in {file.path for file in client.list_artifacts(trial.info.run_id)}:
            kept = RunFolder(folder).certificates(trial.data.tags[TRIAL])
            kept.parent.mkdir(exist_ok=True)
            Path(client.download_artifacts(trial.info.run_id, CERTIFICATES, str(folder))).rename(kept)
    return folder
