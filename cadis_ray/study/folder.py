"""The folder of a run: its name, which follows from the study, and the study in it."""

import re
from pathlib import Path
from typing import Any

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.identity import former, identity
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study, read_study
from cadis_ray.study.warm_start import warm_digest

NOT_RESULTS = {"name", "tolerated_failures", "resources", "tracking"}


def fingerprint(study: Study) -> str:
    """SHA-256 of all that changes results, where it is not the default.

    Not part of it: name, tolerated failures, tracking, resources but for the concurrent trials, and paths: the content
    of checkpoints and of the runs it learns from stands for theirs, and a run keeps the digest of its images. Raises
    UsageError if a file cannot be read.
    """
    content = study.identified(exclude=NOT_RESULTS)
    content["base"]["data"].pop("path", None)
    return identity(content | _learnt_and_concurrent(study))


def whole_fingerprint(study: Study) -> str:
    """The name of runs made while whole sections were hashed, defaults and the path of the data too."""
    content = study.model_dump(mode="json", exclude=NOT_RESULTS)
    return identity(former(content | _learnt_and_concurrent(study)))


def _learnt_and_concurrent(study: Study) -> dict[str, Any]:
    """What the sampler's view of past trials depends on besides its own section."""
    learnt = {"warm_start": [warm_digest(Path(folder)) for folder in study.warm_start]} if study.warm_start else {}
    return learnt | {"concurrent_trials": study.resources.concurrent_trials}


def default_folder(study: Study) -> Path:
    """``runs/NAME-HASH`` here: the same study finds its run again. Inside a Ray job, whose working directory is a copy
    that Ray deletes, ``~/cadis_ray`` takes the place of here."""
    here = Path.cwd()
    root = Path.home() / "cadis_ray" if "runtime_resources" in here.parts else here
    now = root / "runs" / f"{study.name}-{fingerprint(study)[:8]}"
    if now.exists() or not list(now.parent.glob(f"{study.name}-????????")):
        return now  # without hashing the checkpoints again
    before = now.with_name(f"{study.name}-{whole_fingerprint(study)[:8]}")
    return before if RunFolder(before).resolved.exists() else now


def open_folder(study: Study, text: str, run_dir: Path) -> None:
    """Make the run's folder with the study in it, as given and resolved; one that holds another study is refused."""
    files = RunFolder(run_dir)
    if files.resolved.exists():
        stored = read_study(run_dir)
        if fingerprint(stored) != fingerprint(study):
            raise UsageError(f"{run_dir} holds another study ({stored.name}); give another --out, or none")
        return
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UsageError(f"{run_dir} exists and is not a run of this program; give another --out, or none")
    write_whole(files.study, text)
    write_whole(files.resolved, study.model_dump_json(indent=2) + "\n")


def check_place(out: str | Path | None, address: str) -> None:
    """Refuse a run's folder that is a URI, and a cluster that nobody named. Raises UsageError."""
    if address == "auto":
        raise UsageError("address: got 'auto', which takes whatever cluster is found; need 'local' or HOST:PORT")
    if out is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):
        raise UsageError(f"out: got {out}; must be a folder, not a URI: it holds a SQLite file; mount what is shared")


def done(run_dir: Path) -> dict[str, Any] | None:
    """The content of result.json of a run that is done, else None: where it is damaged, the run is to write it anew."""
    try:
        result = RunFolder(run_dir).ending()
    except IntegrityError:
        return None
    return result if result.get("status") == "done" else None
