"""The study, typed: what varies, what runs beside it, and what each trial can have."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.interface.section import A_LIST, Count, Name, Section
from cadis_ray.smoothing.settings import Finalists
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study import rules
from cadis_ray.study.messages import Schema, dotted, findings, with_value
from cadis_ray.study.sections import Distribution, Objective, Resources, Sampler, Scheduler, Tracking


class Study(Section):
    """One study file. ``warm_start``: folders of compatible runs, whose complete trials the sampler learns from."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    trials: Count
    tolerated_failures: Annotated[int, Field(ge=0)] = 2
    base: Configuration
    space: dict[str, Distribution]
    baselines: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    objective: Objective = Objective()
    sampler: Sampler = Sampler()
    warm_start: Annotated[tuple[str, ...], A_LIST] = ()
    scheduler: Scheduler = Scheduler()
    finalists: Finalists = Finalists()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()


def configuration(study: Study, parameters: Mapping[str, Any]) -> Configuration:
    """The base with values set at dotted paths. Raises UsageError for an unknown path or a refused value."""
    return changed(study.base, parameters)


def changed(base: Configuration, parameters: Mapping[str, Any]) -> Configuration:
    """``base`` with values set at dotted paths. Raises UsageError for an unknown path or a refused value."""
    raw = base.model_dump()
    for path, value in parameters.items():
        if problem := Schema.of(Configuration).path_problem(path):
            raise UsageError(f"{path}: {problem}")
        raw = with_value(raw, tuple(path.split(".")), value)
    if found := findings(Configuration, raw):
        raise UsageError("\n".join(f"{dotted(finding.path)}: {finding.text}" for finding in found))
    return Configuration.model_validate(raw)


def baselines(study: Study) -> list[Configuration]:
    """Make the configurations of the baselines."""
    return [configuration(study, changes) for changes in study.baselines.values()]


def searched_paths(study: Study) -> tuple[str, ...]:
    """Dotted paths of the searched parameters, in the order of the study file."""
    return tuple(study.space)


def trial_values(study: Study, path: str) -> tuple[Any, ...]:
    """What a trial can have at a dotted path: every choice, both ends of a range, or the base's value."""
    distribution = study.space.get(path)
    base = reduce(getattr, path.split("."), study.base)
    if distribution is None:
        return (base,)
    return rules.extremes(distribution) + ((base,) if distribution.when else ())


def trial_with(study: Study, pick: Callable[[Iterable[Any]], float], **settings: Any) -> Configuration:
    """Make a trial with what ``pick``, ``max`` or a mean, makes of each searched count's values, and ``settings``."""
    names = ("epochs", "num_noises", "attack_steps")
    counts = {name: pick(trial_values(study, f"finetuning.{name}")) for name in names}
    return study.base.model_copy(update={"finetuning": study.base.finetuning.model_copy(update=counts | settings)})


def max_num_noises(study: Study) -> int:
    """The largest M of any trial or baseline: noises per image and epoch in the denoised pool."""
    return _maximum(study, "finetuning.num_noises")


def max_epochs(study: Study) -> int:
    """The largest number of epochs that any trial or baseline takes: epochs in the denoised pool."""
    epochs = _maximum(study, "finetuning.epochs")
    path = "finetuning.stop_after"
    stops = [*trial_values(study, path)]
    stops += [changes[path] for changes in study.baselines.values() if path in changes]
    return epochs if None in stops else min(epochs, max(stops))


def _maximum(study: Study, path: str) -> int:
    base = reduce(getattr, path.split("."), study.base)
    return max(*trial_values(study, path), *(changes.get(path, base) for changes in study.baselines.values()), 1)


def read_study(run_dir: Path) -> Study:
    """The study of a run. Raises UsageError where the folder is not a run."""
    path = RunFolder(run_dir).resolved
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"{run_dir}: not a run's folder: {path.name} cannot be read ({error.strerror})") from error
    try:
        return Study.model_validate_json(text)
    except ValueError as error:
        raise IntegrityError(f"{path}: changed since the run began: {error}") from error
