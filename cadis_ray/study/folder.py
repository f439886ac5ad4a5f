"""The folder of a run: its name, which follows from the study, and the study in it."""

from pathlib import Path

from cadis_ray.errors import UsageError
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.identity import identity
from cadis_ray.storage.run_folder import RESOLVED, STUDY
from cadis_ray.study.study import Study, read_study
from cadis_ray.study.warm_start import warm_digest


def fingerprint(study: Study) -> str:
    """SHA-256 of all that changes results: the study without name, tolerated failures, tracking and resources (but for
    the concurrent trials), with the content of its checkpoints and of the runs it learns from instead of their paths.

    Raises UsageError if one of them cannot be read.
    """
    content = study.model_dump(mode="json", exclude={"name", "tolerated_failures", "resources", "tracking"})
    if study.warm_start:
        content["warm_start"] = [warm_digest(Path(folder)) for folder in study.warm_start]
    content["concurrent_trials"] = study.resources.concurrent_trials  # the sampler's view depends on it
    return identity(content)


def default_folder(study: Study) -> Path:
    """``runs/NAME-HASH`` here: the same study finds its run again. Inside a Ray job, whose working directory is a copy
    that Ray deletes, ``~/cadis_ray`` takes the place of here."""
    here = Path.cwd()
    root = Path.home() / "cadis_ray" if "runtime_resources" in here.parts else here
    return root / "runs" / f"{study.name}-{fingerprint(study)[:8]}"


def open_folder(study: Study, text: str, run_dir: Path) -> None:
    """Make the run's folder with the study in it, as given and resolved; one that holds another study is refused."""
    if (run_dir / RESOLVED).exists():
        stored = read_study(run_dir)
        if fingerprint(stored) != fingerprint(study):
            raise UsageError(f"{run_dir} holds another study ({stored.name}); give another --out, or none")
        return
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UsageError(f"{run_dir} exists and is not a run of this program; give another --out, or none")
    write_whole(run_dir / STUDY, text)
    write_whole(run_dir / RESOLVED, study.model_dump_json(indent=2) + "\n")
