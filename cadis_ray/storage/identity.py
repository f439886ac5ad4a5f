"""What names a run, a model and a vote: hashes of settings, with the content of files instead of their paths."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from cadis_ray.errors import UsageError
from cadis_ray.storage.files import digest
from cadis_ray.storage.references import LOCAL, checkpoint_file

# Keys whose values are files or folders, of a section or as a dotted path; of the names only those so marked.
PLACES = {"checkpoint": "", "classifier.checkpoint": "", "name": LOCAL, "classifier.name": LOCAL}


def identity(content: dict[str, Any]) -> str:
    """SHA-256 of plain data that came from a study, with the content of its checkpoints instead of their paths.

    Raises UsageError if a checkpoint cannot be read.
    """
    canonical = json.dumps(with_checkpoints(content, _digest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def with_checkpoints(raw: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A copy with ``change`` applied to each checkpoint or folder: of the base, a baseline, a choice or a condition."""
    if isinstance(raw, dict):
        return {name: with_checkpoints(value, change, key if name == "choices" else name)
                for name, value in raw.items()}  # fmt: skip
    if isinstance(raw, list):
        return [with_checkpoints(item, change, key) for item in raw]
    return change(raw) if isinstance(raw, str) and key in PLACES and raw.startswith(PLACES[key]) else raw


def _digest(checkpoint: str) -> str:
    try:
        return digest(checkpoint_file(checkpoint))
    except OSError as error:
        raise UsageError(f"{checkpoint}: cannot be read: {error.strerror}") from None
