"""From the study's search space to Optuna: drawing a trial's parameters, and describing a past one's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cadis_ray.study.sections import Distribution

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

Space = Mapping[str, Distribution]


def suggest(trial: "BaseTrial", space: Space) -> dict[str, Any]:
    """Draw a value for each parameter whose ``when`` holds, by dotted path.

    Parents come first, else the paths' own order, so that a seed's draws do not depend on the file's order.
    """
    parameters: dict[str, Any] = {}
    for path in _parents_first(space):
        if all(_holds(parameters, parent, wanted) for parent, wanted in space[path].when.items()):
            parameters[path] = _draw(trial, path, space[path])
    return parameters


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of the choices, each once, in an order that does not depend on the file's.

    A parameter whose ``when`` does not hold is left out of a combination. Raises ValueError for a range.
    """
    combinations: list[dict[str, Any]] = [{}]
    for path in _parents_first(space):
        choices, conditions = space[path].choices, space[path].when
        if choices is None:
            raise ValueError(f"{path} is a range: a grid needs choices")
        combinations = [
            {**known, **added}
            for known in combinations
            for added in (
                [{path: choice} for choice in choices]
                if all(_holds(known, parent, wanted) for parent, wanted in conditions.items())
                else [{}]
            )
        ]
    return combinations


def distributions(space: Space, parameters: Mapping[str, Any]) -> "dict[str, BaseDistribution]":
    """Optuna's distributions of the parameters that one trial has, for ``optuna.trial.create_trial``.

    Raises KeyError for a parameter that the space lacks.
    """
    return {path: _described(space[path]) for path in parameters}


def _draw(trial: "BaseTrial", path: str, distribution: Distribution) -> Any:
    if distribution.choices is not None:
        return trial.suggest_categorical(path, distribution.choices)
    low, high = _ends(distribution)
    if distribution.integer:
        return trial.suggest_int(path, int(low), int(high), log=distribution.log)
    return trial.suggest_float(path, low, high, log=distribution.log)


def _described(distribution: Distribution) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if distribution.choices is not None:
        return CategoricalDistribution(distribution.choices)
    low, high = _ends(distribution)
    if distribution.integer:
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(low, high, log=distribution.log)


def _ends(distribution: Distribution) -> tuple[float, float]:
    low, high = distribution.low, distribution.high
    if low is None or high is None:
        raise ValueError("a distribution needs low and high, or choices: load studies with config.load_study")
    return low, high


def _holds(parameters: Mapping[str, Any], parent: str, wanted: Any) -> bool:
    values = wanted if isinstance(wanted, tuple) else (wanted,)
    return parent in parameters and parameters[parent] in values


def _parents_first(space: Space) -> list[str]:
    order: dict[str, None] = {}

    def visit(path: str) -> None:
        for parent in sorted(space[path].when):
            visit(parent)
        order.setdefault(path)

    for path in sorted(space):
        visit(path)
    return list(order)
