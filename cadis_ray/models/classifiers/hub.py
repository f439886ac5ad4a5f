"""Folders as the Hugging Face hub lays them out: ``config.json``, weights, ``preprocessor_config.json``."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from cadis_ray.errors import DataError, EnvironmentProblem
from cadis_ray.storage.references import HUB, LOCAL, resolve

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DESCRIPTIONS = ["config.json", "preprocessor_config.json"]


def hub_folder(name: str, download: bool) -> Path | None:
    """The folder of ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME[@REVISION]``; None for any other name.

    A hub's folder is the one in its local cache. Nothing is fetched unless ``download``, and never code. A name
    without revision is another model once its owner changes it. Raises DataError where the folder is not there,
    EnvironmentProblem where the download fails.
    """
    if name.startswith(LOCAL):
        folder = resolve(name.removeprefix(LOCAL))
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: no config.json; need a folder with config.json and {WEIGHTS[0]}")
        return folder
    if not name.startswith(HUB):
        return None
    owner_and_name, _, revision = name.removeprefix(HUB).partition("@")
    try:
        for wanted in ([*DESCRIPTIONS, WEIGHTS[0]], [*DESCRIPTIONS, WEIGHTS[1]]):
            found = snapshot_download(
                owner_and_name, revision=revision or None, local_files_only=not download, allow_patterns=wanted
            )
            if _weights_in(Path(found)):
                break
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if download:
            raise EnvironmentProblem(f"{name}: cannot be downloaded: {reason}") from error
        raise DataError(
            f"{name}: not in the local hub cache ({reason}); set download: true, or give a folder as {LOCAL}FOLDER"
        ) from error
    return Path(found)


def folder_weights(folder: Path) -> Path:
    """The file of a folder's weights, safetensors first. Raises DataError if there is none."""
    if found := _weights_in(folder):
        return found
    raise DataError(f"{folder}: no weights; need one of {', '.join(WEIGHTS)}")


def read_description(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError for anything else."""
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(held, dict):
        raise DataError(f"{path}: holds no JSON object")
    return held


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
