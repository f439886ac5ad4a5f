"""What a study learns from runs that ended before it."""

import hashlib
import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.errors import UsageError
from cadis_ray.storage.identity import identity
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.space import distributions
from cadis_ray.study.study import Study, read_study

VARIABLE = ("finetuning", "base_classifier", "black_box")
COMPARED = ("data", "sigma", "denoiser", "classifier", "validation", "certification")


def check_warm_start(study: Study, folder: Path) -> None:
    """Raises UsageError for a run that this study cannot learn from, with all that differs."""
    different = _differences(study, read_study(folder))
    if different:
        raise UsageError(f"not comparable with this study; different: {', '.join(different)}")
    for name, (parameters, _) in complete_trials(folder).items():
        if outside := _outside(study, parameters):
            raise UsageError(f"{name} is outside this study's space: {outside}")


def warm_digest(folder: Path) -> str:
    """SHA-256 of what a study learns from a run: parameters and counts of its complete searched trials."""
    found = hashlib.sha256()
    for parameters, counts in complete_trials(folder).values():
        text = json.dumps([parameters, counts.shape], sort_keys=True)
        found.update(text.encode() + counts.astype("<i4").tobytes())
    return found.hexdigest()


def complete_trials(folder: Path) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Parameters and last counts (N, K + 1) of a run's complete searched trials, by name."""
    path = RunFolder(folder).ledger
    if not path.is_file():  # opening it would make it
        raise UsageError(f"{folder}: not a run's folder: ledger.sqlite is missing")
    with Ledger(path) as ledger:
        rows = [row for row in ledger.trials() if row.baseline is None and row.state == "complete"]
        return {row.name: (row.parameters, ledger.epochs(row.number)[-1].counts) for row in rows}


def _differences(one: Study, other: Study) -> list[str]:
    ours, theirs = one.base.model_dump(mode="json"), other.base.model_dump(mode="json")
    different = [key for key in COMPARED if identity({key: ours[key]}) != identity({key: theirs[key]})]
    for path in sorted(one.space.keys() ^ other.space.keys()):
        different.append(f"{path} (searched in one only)")
    for path in sorted(one.space.keys() & other.space.keys()):
        if one.space[path].when != other.space[path].when:
            different.append(f"{path} (when)")
    always_drawn = {path for path, part in one.space.items() if not part.when}
    for path in [leaf for key in VARIABLE for leaf in _leaves(ours[key], key)]:
        values = [reduce(lambda node, key: node[key], path.split("."), base) for base in (ours, theirs)]
        if path not in always_drawn and values[0] != values[1]:
            different.append(path)
    return different


def _leaves(node: Any, path: str) -> list[str]:
    if not isinstance(node, dict):
        return [path]
    return [leaf for key in node for leaf in _leaves(node[key], f"{path}.{key}")]


def _outside(study: Study, parameters: dict[str, Any]) -> str:
    described = distributions(study.space, parameters)
    outside = []
    for path, value in parameters.items():
        try:
            inside = described[path]._contains(described[path].to_internal_repr(value))
        except ValueError:  # a choice that is not among the choices
            inside = False
        if not inside:
            outside.append(f"{path} = {value}")
    return ", ".join(outside)
