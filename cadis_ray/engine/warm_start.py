"""What a study learns from runs that ended before it."""

from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.config import Study, identity
from cadis_ray.errors import UsageError
from cadis_ray.ledger import Ledger
from cadis_ray.results import Estimate
from cadis_ray.run import read_study
from cadis_ray.space import distributions
from cadis_ray.summary import estimate_from

VARIABLE = ("finetuning", "base_classifier", "black_box")
COMPARED = ("data", "sigma", "denoiser", "classifier", "validation", "certification")


def warm_trials(study: Study, labels: np.ndarray) -> list[tuple[dict[str, Any], Estimate]]:
    """Parameters and estimates of the complete searched trials of ``study.warm_start``, in its order.

    Raises UsageError for a run that is not comparable, with all that differs.
    """
    return [pair for folder in study.warm_start for pair in _trials(study, Path(folder), labels)]


def _trials(study: Study, folder: Path, labels: np.ndarray) -> list[tuple[dict[str, Any], Estimate]]:
    other, path = read_study(folder), folder / "ledger.sqlite"
    if not path.is_file():  # opening it would make it
        raise UsageError(f"{folder}: not a run's folder: ledger.sqlite is missing")
    different = _differences(study, other)
    pairs = []
    with Ledger(path) as ledger:
        for row in ledger.trials():
            if row.baseline is not None or row.state != "complete":
                continue
            if not different and (outside := _outside(study, row.parameters)):
                raise UsageError(f"warm_start {folder}: {row.name} is outside this study's space: {outside}")
            pairs.append((row.parameters, ledger.epochs(row.number)[-1].counts))
    if different:
        raise UsageError(f"warm_start {folder}: not comparable with this study; different: {', '.join(different)}")
    return [(parameters, estimate_from(study.base, labels, counts)) for parameters, counts in pairs]


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
