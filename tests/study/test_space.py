"""Draws stay inside the space, conditions hold, and a past trial can be described to Optuna again."""

import math

import optuna
import pytest

from cadis_ray.study.sections import Distribution
from cadis_ray.study.space import distributions, grid, suggest

SPACE = {
    "finetuning.adv_weight": Distribution(low=0.25, high=4, log=True),
    "finetuning.base_lr": Distribution(low=-1, high=1),
    "finetuning.epochs": Distribution(low=1, high=64, integer=True, log=True),
    "a.child": Distribution(low=1, high=3, integer=True, when={"z.parent": ("lora", None)}),
    "b.grandchild": Distribution(choices=(True, "x", 2.5), when={"a.child": 2}),
    "z.parent": Distribution(choices=("lora", "full", None)),
}


def study(seed: int = 0, sampler: type = optuna.samplers.RandomSampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=sampler(seed=seed))


def draws(count: int, space: dict[str, Distribution] = SPACE) -> list[dict]:
    drawn_from = study()
    return [suggest(drawn_from.ask(), space) for _ in range(count)]


def test_draws_cover_the_space_and_only_it() -> None:
    drawn = draws(400)
    weights = [parameters["finetuning.adv_weight"] for parameters in drawn]
    assert 0.25 <= min(weights) < 0.28
    assert 3.6 < max(weights) <= 4
    # log-uniform: the middle of [1/4, 4] in the logarithm is 1, in value it is 2.1
    assert math.fsum(weight < 1 for weight in weights) / 400 == pytest.approx(0.5, abs=0.1)
    epochs = {parameters["finetuning.epochs"] for parameters in drawn}
    assert {type(epoch) for epoch in epochs} == {int}
    assert {1, 2, 3} <= epochs <= set(range(1, 65))
    assert sum(parameters["finetuning.base_lr"] < 0 for parameters in drawn) == pytest.approx(200, abs=40)
    assert {parameters["z.parent"] for parameters in drawn} == {"lora", "full", None}


def test_a_conditional_parameter_exists_exactly_where_its_condition_holds() -> None:
    drawn = draws(200)
    for parameters in drawn:
        assert ("a.child" in parameters) == (parameters["z.parent"] in ("lora", None))
        assert ("b.grandchild" in parameters) == (parameters.get("a.child") == 2)
    assert 10 < sum("b.grandchild" in parameters for parameters in drawn) < 100


def test_draws_do_not_depend_on_the_order_of_the_file() -> None:
    assert draws(20, dict(reversed(SPACE.items()))) == draws(20)


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_a_rebuilt_study_goes_on_as_the_one_it_was_rebuilt_from(sampler: type) -> None:
    def value(parameters: dict) -> float:
        return -((math.log(parameters["finetuning.adv_weight"]) - 1) ** 2) - (parameters["z.parent"] == "full")

    original, rebuilt = study(3, sampler), study(3, sampler)
    for _ in range(15):
        trial = original.ask()
        parameters = suggest(trial, SPACE)
        described = distributions(SPACE, parameters)
        assert described == trial.distributions
        original.tell(trial, value(parameters))
        rebuilt.add_trial(
            optuna.trial.create_trial(params=parameters, distributions=described, value=value(parameters))
        )
    assert [trial.params for trial in rebuilt.trials] == [trial.params for trial in original.trials]
    assert suggest(rebuilt.ask(), SPACE).keys() <= SPACE.keys()


def test_a_parameter_outside_the_space_is_refused() -> None:
    with pytest.raises(KeyError, match="mask"):
        distributions(SPACE, {"finetuning.mask": "none"})


def test_a_grid_has_every_combination_that_its_conditions_allow() -> None:
    space = {
        "r": Distribution(choices=(2, 4), when={"adapter": "lora"}),
        "adapter": Distribution(choices=("lora", "full")),
        "m": Distribution(choices=(1, 2, 3)),
    }
    found = grid(space)
    expected = [{"adapter": "full", "m": m} for m in (1, 2, 3)]
    expected += [{"adapter": "lora", "m": m, "r": r} for m in (1, 2, 3) for r in (2, 4)]
    assert sorted(map(str, (sorted(c.items()) for c in found))) == sorted(
        map(str, (sorted(c.items()) for c in expected))
    )
    assert grid(dict(reversed(space.items()))) == found
    with pytest.raises(ValueError, match="a grid needs choices"):
        grid({"x": Distribution(low=0, high=1)})
