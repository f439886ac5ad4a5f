"""Optuna's samplers: what one trial draws, given what it may know of the others."""

import warnings
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cadis_ray.study.space import suggest
from cadis_ray.study.study import Study

REDRAWS = 20  # a small space may have nothing else left


def draw(study: Study, index: int, past: list[FrozenTrial], failed: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters of searched trial ``index``, a function of the arguments alone.

    A configuration among ``failed`` is drawn again at most REDRAWS times, from further seeds.
    """
    known = optuna.create_study(directions=[StudyDirection.MAXIMIZE] * len(study.objective.metrics))
    if study.sampler.name == "nsga2":
        _mark_generations(study, past, optuna.samplers.NSGAIISampler._get_generation_key())
    elif study.sampler.name == "cma_es":
        past = _told_to_cma_es(study, past)
    known.add_trials(past)
    parameters: dict[str, Any] = {}
    for attempt in range(REDRAWS + 1):
        known.sampler = make_sampler(study, index, attempt)
        trial = known.ask()
        parameters = suggest(trial, study.space)
        if parameters not in failed:
            break
        known.tell(trial, state=TrialState.FAIL)
    return parameters


def make_sampler(study: Study, index: int, attempt: int = 0) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for one trial, seeded by the study, the trial's place in it and how often it was drawn."""
    entropy = [study.seed, index] + [attempt] * (attempt > 0)
    seed, sampler = int(np.random.SeedSequence(entropy).generate_state(1)[0]), study.sampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if sampler.name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if sampler.name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=sampler.startup)
        if sampler.name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=sampler.population)
        if sampler.name == "cma_es":
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=0, popsize=sampler.population, warn_independent_sampling=False
            )
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=sampler.startup)


def _mark_generations(study: Study, past: list[FrozenTrial], key: str) -> list[FrozenTrial]:
    """Number the complete trials by generations of ``population``: the rebuilt study has lost Optuna's own marks."""
    complete = [trial for trial in past if trial.state == TrialState.COMPLETE]
    for place, trial in enumerate(complete):
        trial.system_attrs = trial.system_attrs | {key: place // study.sampler.population}
    return complete


def _told_to_cma_es(study: Study, past: list[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials, with the distribution that CMA-ES learns from each whole generation kept where it looks.

    It keeps that with the trial that it draws next, which the rebuilt study has lost: so such a trial is drawn, and
    what it holds goes to the last of the generation. CMA-ES knows ranks alone and no constraints: an infeasible trial
    gets a value below that of all feasible ones, by its violation.
    """
    size, told = study.sampler.population, list[FrozenTrial]()
    sampler = make_sampler(study, 0)
    assert isinstance(sampler, optuna.samplers.CmaEsSampler)
    complete = _mark_generations(study, past, sampler._attr_key_generation)
    for trial in complete:
        missing = max((trial.constraints or {}).values(), default=0.0)
        trial.value = -missing if missing > 0 else trial.value
    for first in range(0, len(complete) - size + 1, size):
        told += complete[first : first + size]
        known = optuna.create_study(direction=StudyDirection.MAXIMIZE, sampler=make_sampler(study, first))
        known.add_trials(told)
        drawn = known.ask()
        suggest(drawn, study.space)
        attributes = known.get_trials(deepcopy=False)[-1].system_attrs
        learned = {key: value for key, value in attributes.items() if key.startswith(sampler._attr_key_optimizer)}
        told[-1].system_attrs = told[-1].system_attrs | learned
    return complete
