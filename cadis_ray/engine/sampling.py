"""Optuna's samplers: what one trial draws, given what it may know of the others."""

import warnings
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cadis_ray.config import Study
from cadis_ray.space import suggest

REDRAWS = 20  # a small space may have nothing else left


def draw(study: Study, index: int, past: list[FrozenTrial], failed: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters of searched trial ``index``, a function of the arguments alone.

    A configuration among ``failed`` is drawn again at most REDRAWS times, from further seeds.
    """
    known = optuna.create_study(directions=[StudyDirection.MAXIMIZE] * len(study.objective.metrics))
    if study.sampler.name == "nsga2":
        _mark_generations(study, past)
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
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=sampler.startup)


def _mark_generations(study: Study, past: list[FrozenTrial]) -> None:
    """Number the complete trials by generations of ``population``: the rebuilt study has lost Optuna's own marks."""
    key = optuna.samplers.NSGAIISampler._get_generation_key()
    complete = [trial for trial in past if trial.state == TrialState.COMPLETE]
    for place, trial in enumerate(complete):
        trial.system_attrs = trial.system_attrs | {key: place // study.sampler.population}
