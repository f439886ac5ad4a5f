"""From a study file to a checked study."""

import os.path
from pathlib import Path
from typing import Any

from cadis_ray.storage.identity import with_checkpoints
from cadis_ray.storage.references import LOCAL, PACKAGE, shipped_config
from cadis_ray.study import yaml
from cadis_ray.study.checks import place, rule_findings, warm_start_findings
from cadis_ray.study.messages import findings, section
from cadis_ray.study.study import Study


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Checkpoints and folders become absolute paths (relative ones start at the study file's folder), and a denoiser
    that ships with the package gets its constructor arguments. Raises UsageError with a line for every problem:
    ``FILE:LINE:COLUMN: KEY.PATH: got X; need Y. Did you mean Z?``
    """
    path = Path(path)
    document = yaml.parse(path)
    raw = _completed(document.data, path.resolve().parent)
    found = findings(Study, raw)
    found += rule_findings(raw, {finding.path for finding in found})
    problems = [*document.problems, *(place(finding, document.marks) for finding in found)]
    if problems:
        raise yaml.usage_error(document.name, problems)
    study = Study.model_validate(raw)
    if problems := [place(finding, document.marks) for finding in warm_start_findings(study)]:
        raise yaml.usage_error(document.name, problems)
    return study


def _completed(raw: Any, folder: Path) -> Any:
    """The study with what its file leaves out: the checkpoints' folder, the config of a shipped denoiser."""

    def absolute(checkpoint: str) -> str:
        if checkpoint.startswith(PACKAGE):
            return checkpoint
        local = LOCAL if checkpoint.startswith(LOCAL) else ""
        return local + os.path.normpath(folder / checkpoint.removeprefix(local))

    raw = with_checkpoints(raw, absolute)
    data = section(section(raw, "base"), "data")
    if isinstance(path := data.get("path"), str) and "://" not in path:
        data["path"] = os.path.normpath(folder / path)
    denoiser = section(section(raw, "base"), "denoiser")
    if isinstance(checkpoint := denoiser.get("checkpoint"), str) and denoiser.get("config") is None:
        denoiser["config"] = shipped_config(checkpoint)
    return raw
