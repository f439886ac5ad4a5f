"""The study file, typed, and how a file becomes a ``Study``.

Its sections are in ``sections``, ``trial_sections`` and ``search_sections``, rules between fields in ``rules``, where
they apply in ``checks``, the words of messages in ``explain``. None of these imports torch, ray or mlflow, nor NumPy
and SciPy before a file is checked: ``--help`` and ``--dry-run`` depend on it.
"""

import os.path
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cadis_ray import rules, strict_yaml
from cadis_ray.errors import UsageError
from cadis_ray.explain import Schema, dotted, findings, section, with_value
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.interface.section import A_LIST, Count, Name, Section
from cadis_ray.search_sections import Distribution, Objective, Resources, Sampler, Scheduler, Tracking
from cadis_ray.smoothing.settings import Finalists
from cadis_ray.storage.identity import identity, with_checkpoints
from cadis_ray.storage.references import LOCAL, PACKAGE, shipped_config


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


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Checkpoints and folders become absolute paths (relative ones start at the study file's folder), and a denoiser
    that ships with the package gets its constructor arguments. Raises UsageError with a line for every problem:
    ``FILE:LINE:COLUMN: KEY.PATH: got X; need Y. Did you mean Z?``
    """
    from cadis_ray.checks import place, rule_findings, warm_start_findings  # they need this module's types

    path = Path(path)
    document = strict_yaml.parse(path)
    raw = _completed(document.data, path.resolve().parent)
    found = findings(Study, raw)
    found += rule_findings(raw, {finding.path for finding in found})
    problems = [*document.problems, *(place(finding, document.marks) for finding in found)]
    if problems:
        raise strict_yaml.usage_error(document.name, problems)
    study = Study.model_validate(raw)
    if problems := [place(finding, document.marks) for finding in warm_start_findings(study)]:
        raise strict_yaml.usage_error(document.name, problems)
    return study


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


def fingerprint(study: Study) -> str:
    """SHA-256 of all that changes results: the study without name, tolerated failures, tracking and resources (but for
    the concurrent trials), with the content of its checkpoints and of the runs it learns from instead of their paths.

    Raises UsageError if one of them cannot be read.
    """
    content = study.model_dump(mode="json", exclude={"name", "tolerated_failures", "resources", "tracking"})
    if study.warm_start:
        from cadis_ray.warm_start import warm_digest

        content["warm_start"] = [warm_digest(Path(folder)) for folder in study.warm_start]
    content["concurrent_trials"] = study.resources.concurrent_trials  # the sampler's view depends on it
    return identity(content)


def _maximum(study: Study, path: str) -> int:
    base = reduce(getattr, path.split("."), study.base)
    return max(*trial_values(study, path), *(changes.get(path, base) for changes in study.baselines.values()), 1)


def _completed(raw: Any, folder: Path) -> Any:
    """The study with what its file leaves out: the checkpoints' folder, the config of a shipped denoiser."""

    def absolute(checkpoint: str) -> str:
        if checkpoint.startswith(PACKAGE):
            return checkpoint
        local = LOCAL if checkpoint.startswith(LOCAL) else ""
        return local + os.path.normpath(folder / checkpoint.removeprefix(local))

    raw = with_checkpoints(raw, absolute)
    data = section(section(raw, "base"), "data")
    if isinstance(path := data.get("path"), str) and "://" not in path:
        data["path"] = os.path.normpath(folder / path)
    denoiser = section(section(raw, "base"), "denoiser")
    if isinstance(checkpoint := denoiser.get("checkpoint"), str) and denoiser.get("config") is None:
        denoiser["config"] = shipped_config(checkpoint)
    return raw
