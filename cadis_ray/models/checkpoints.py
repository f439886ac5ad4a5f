"""Reading and writing weights. The only module that calls ``torch.load``, and only with ``weights_only=True``."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cadis_ray.errors import DataError
from cadis_ray.storage.files import digest, write_atomically
from cadis_ray.storage.references import resolve

PICKLED = (".pt", ".pth", ".tar", ".bin")
SHOWN = 3


def read_checkpoint(path: str | Path) -> Any:
    """Whatever the file holds, on the CPU: a dict of tensors from ``.safetensors``, plain data from a pickle.

    Nothing in the file is executed. Raises DataError for an unknown suffix, a damaged file, or a pickle that holds
    anything but tensors and plain data; the message names the foreign objects.
    """
    found = resolve(path)
    if found.suffix == ".safetensors":
        try:
            return load_file(found)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{found}: not a readable safetensors file ({error})") from error
    if found.suffix not in PICKLED:
        raise DataError(f"{found}: cannot read {found.suffix or 'a file without suffix'}; "
                        f"allowed are .safetensors {' '.join(PICKLED)}")  # fmt: skip
    try:
        return torch.load(found, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _foreign_objects(found, str(error))
        if not foreign:
            raise DataError(f"{found}: not a readable checkpoint; is it complete? ({_first_line(error)})") from error
        raise DataError(
            f"{found}: holds {', '.join(foreign)}; loading that could run code, so it is refused. Where you trust the "
            "file, save its tensors alone: safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{found}: not a readable checkpoint; is it complete? ({_first_line(error)})") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: its top level, or what stands under ``state_dict`` or ``model``.

    Raises DataError as ``read_checkpoint``, or if there is no mapping from names to tensors.
    """
    held = read_checkpoint(path)
    nested = [held.get("state_dict"), held.get("model")] if isinstance(held, Mapping) else []
    for candidate in (held, *nested):
        if isinstance(candidate, Mapping) and candidate:
            state = {str(key): value for key, value in candidate.items() if isinstance(value, Tensor)}
            if len(state) == len(candidate):
                return state
    shown = ", ".join(map(str, list(held)[:8])) if isinstance(held, Mapping) else type(held).__name__
    raise DataError(f"{path}: no state dict at the top level, under state_dict or under model; the file has {shown}")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Copies ``state`` into ``module``; every key and every shape must agree, else DataError and nothing is copied.

    The message counts what is missing, unexpected and of another shape, shows the first of each, and says so where
    a prefix of the keys is the only difference. ``where`` names the source in the message.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if expected == given:
        module.load_state_dict(dict(state))
        return
    missing = [f"{key} {list(expected[key])}" for key in expected if key not in given]
    unexpected = [f"{key} {list(given[key])}" for key in given if key not in expected]
    differing = [f"{key} {list(given[key])} instead of {list(expected[key])}"
                 for key in expected if given.get(key, expected[key]) != expected[key]]  # fmt: skip
    lines = [f"{where}: the weights are of another architecture ({len(given)} keys, {len(expected)} expected)"]
    for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing)):
        if items:
            more = ", ..." if len(items) > SHOWN else ""
            lines.append(f"  {len(items)} {what}: {', '.join(items[:SHOWN])}{more}")
    if prefix := _prefix(expected, given):
        lines.append(
            f"  only the prefix {prefix!r} differs: remove it from every key of the file; "
            f"of a classifier, say classifier.prefix: {prefix}"
        )
    elif prefix := _prefix(given, expected):
        lines.append(f"  only the prefix {prefix!r} differs: put it before every key of the file")
    raise DataError("\n".join(lines))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return digest(resolve(path))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors and text metadata; ``path`` is at every moment absent, the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bytes first: save_file itself writes to a name, not to an open file.
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with write_atomically(path) as file:
        file.write(save(held, metadata=dict(metadata or {})))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _foreign_objects(path: Path, message: str) -> list[str]:
    """Names of the globals a pickle asks for; read from its opcodes where torch can, else from torch's message."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip file, or damaged: torch's own refusal names the first object
        return re.findall(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", message)[:1]


def _prefix(shorter: Mapping[str, tuple[int, ...]], longer: Mapping[str, tuple[int, ...]]) -> str | None:
    """The prefix ending in a dot that turns ``shorter`` into ``longer``, if there is one."""
    first = next(iter(shorter), "")
    for key in longer:
        prefix = key.removesuffix(first)
        if prefix.endswith(".") and {prefix + k: shape for k, shape in shorter.items()} == dict(longer):
            return prefix
    return None
