"""Rules about a study's search: which sampler supports what, and what an objective refers to."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cadis_ray.interface.section import got
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.messages import Finding, findings, section
from cadis_ray.study.sections import Distribution, Objective, Resources, Sampler
from cadis_ray.study.space import grid
from cadis_ray.study.yaml import KeyPath

RELATIVE = ("gp", "nsga2", "cma_es")  # they model parameters that every trial has, and draw the others at random


def search_findings(raw: Any, values: Mapping[str, Any], bad: set[KeyPath]) -> Iterator[Finding]:
    """What is wrong between the search's own sections; silent on a section that ``bad`` touches."""
    if not isinstance(raw, dict):
        return
    faulty = {path[0] for path in bad if path}
    if "objective" not in faulty:
        objective = Objective.model_validate(section(raw, "objective"))
        yield from _objective(objective, section(raw, "baselines"), values.get("certification.radii"))
        if section(raw, "sampler").get("name") == "cma_es" and len(objective.metrics) > 1:
            yield Finding(("sampler", "name"), "got cma_es, which knows one metric; need nsga2, tpe or gp for two")
        scheduler = section(raw, "scheduler").get("name", "none")
        if scheduler != "none" and objective.metrics != ("acr",):
            text = f"got {scheduler!r}; need 'none': {scheduler} compares trials by acr alone"
            yield Finding(("scheduler", "name"), text)
    if section(raw, "scheduler").get("name") == "racing" and "space" not in faulty:
        for path in ("finetuning.epochs", "finetuning.stop_after"):
            if path in section(raw, "space"):
                text = "is searched; need one value where the scheduler is racing: it compares after the same epoch"
                yield Finding(("space", path), text, at_key=True)
    if "finalists" not in faulty:
        images, available = section(raw, "finalists").get("images"), values.get("data.validation")
        if images is not None and available is not None and images > available:
            yield Finding(("finalists", "images"), f"got {images}; need at most data.validation = {available}")
    if not faulty & {"space", "sampler", "trials"}:
        yield from _sampler(raw, Sampler.model_validate(section(raw, "sampler")))
    if "resources" not in faulty:
        yield from _resources(Resources.model_validate(section(raw, "resources")))
    if "warm_start" not in faulty:
        for place, folder in enumerate(raw.get("warm_start", ())):
            if not Path(folder).is_absolute() or not RunFolder(Path(folder)).ledger.is_file():
                text = f"got {got(folder)}; need the absolute path of a run's folder, with ledger.sqlite in it"
                yield Finding(("warm_start", place), text)


def _objective(objective: Objective, baselines: Mapping[str, Any], radii: Any) -> Iterator[Finding]:
    if len(set(objective.metrics)) < len(objective.metrics):
        yield Finding(("objective", "maximise"), "got one metric twice; need two different ones")
    for metric in objective.metrics:
        if not isinstance(metric, str) and radii is not None and metric.certified_accuracy not in radii:
            listed = ", ".join(f"{radius:g}" for radius in radii)
            text = f"got radius {metric.certified_accuracy:g}; need one of certification.radii: {listed}"
            yield Finding(("objective", "maximise"), text)
    limit = objective.clean_at_least
    if limit is not None and limit.baseline not in baselines:
        text = f"got {got(limit.baseline)}; need the name of a baseline: {', '.join(baselines) or 'there is none'}"
        yield Finding(("objective", "clean_at_least", "baseline"), text)


def _resources(resources: Resources) -> Iterator[Finding]:
    if resources.min_actors > resources.actors:
        text = f"got {resources.min_actors}; need at most resources.actors = {resources.actors}"
        yield Finding(("resources", "min_actors"), text)
    if (resources.min_workers_per_trial or 0) > resources.workers_per_trial:
        text = f"got {resources.min_workers_per_trial}; need at most resources.workers_per_trial = "
        yield Finding(("resources", "min_workers_per_trial"), text + str(resources.workers_per_trial))
    if resources.data_parallel == "fsdp" and resources.workers_per_trial < 2:
        text = f"got fsdp, where resources.workers_per_trial = {resources.workers_per_trial}; need 2 or more to share"
        yield Finding(("resources", "data_parallel"), text)
    for key in ("gpus_per_worker", "gpus_per_actor"):
        if (gpus := getattr(resources, key)) > 1 and not gpus.is_integer():
            yield Finding(("resources", key), f"got {gpus:g}; need a whole number, or a share of one GPU")


def _sampler(raw: Any, sampler: Sampler) -> Iterator[Finding]:
    given, name = section(raw, "space"), sampler.name
    if name == "cma_es" and sampler.population < 4:
        text = f"got {sampler.population}; need 4 or more where the sampler is cma_es: it learns from the better half"
        yield Finding(("sampler", "population"), text)
    if any(findings(Distribution, part) for part in given.values()):
        return
    space = {path: Distribution.model_validate(part) for path, part in given.items()}
    if name in RELATIVE:
        for path, part in space.items():
            if part.when:
                text = f"sampler {name} models no conditional parameter; need sampler tpe or random"
                yield Finding(("space", path, "when"), text, at_key=True)
    if name != "grid":
        return
    ranges = [path for path, part in space.items() if part.choices is None]
    for path in ranges:
        yield Finding(("space", path), "got a range; need choices where the sampler is grid")
    if raw.get("warm_start"):
        yield Finding(("warm_start",), "got runs; need none where the sampler is grid: it learns nothing")
    if not ranges and all(parent in space for part in space.values() for parent in part.when):
        size = len(grid(space))
        if raw.get("trials") != size:
            yield Finding(("trials",), f"got {raw.get('trials')}; need {size}, the combinations of the grid")
