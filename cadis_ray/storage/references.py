"""How a study names weights and configurations: a path, a file of this package, or a model of a hub."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from cadis_ray.errors import DataError

EMBEDDED = Path(str(files("cadis_ray"))) / "models" / "embedded"
PACKAGE, LOCAL, HUB = "package:", "local-dir:", "hf-hub:"


def resolve(path: str | Path) -> Path:
    """Path of ``package:FILE`` or of a file or folder on disk. Raises DataError if it does not exist."""
    text = str(path)
    found = checkpoint_file(text).expanduser()
    if text.startswith(PACKAGE):
        names = sorted(file.name for file in EMBEDDED.iterdir() if not file.name.startswith((".", "_")))
        if text.removeprefix(PACKAGE) not in names:
            raise DataError(f"{text}: no such file in this package; it has {', '.join(names) or 'none'}")
    if not found.exists():
        raise DataError(f"{text}: no such file")
    return found


def checkpoint_file(checkpoint: str) -> Path:
    """The file of a checkpoint, of ``package:FILE`` one that ships with the package; the folder of ``local-dir:``."""
    if checkpoint.startswith(PACKAGE):
        return EMBEDDED / checkpoint.removeprefix(PACKAGE)
    return Path(checkpoint.removeprefix(LOCAL))


def shipped() -> list[str]:
    """The checkpoints that ship with the package, as a study names them."""
    return sorted(PACKAGE + file.name for file in EMBEDDED.glob("*.safetensors"))


def shipped_config(checkpoint: str) -> dict[str, Any] | None:
    """Constructor arguments of a shipped checkpoint: the key ``config`` of the JSON beside it, if there is one."""
    if checkpoint not in shipped():
        return None
    sidecar = checkpoint_file(checkpoint).with_suffix(".json")
    return json.loads(sidecar.read_text())["config"] if sidecar.is_file() else None
