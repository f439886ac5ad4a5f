"""Rules between the fields of a study, as functions of their values; ``checks`` says where they apply.

Each rule yields what is wrong, with its path within a configuration. Only what is certainly wrong is a rule.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadis_ray.data.sources import DATA_SETS, TEST_IMAGES, image_shape
from cadis_ray.interface.section import got
from cadis_ray.models.denoisers.architecture import Architecture, architecture
from cadis_ray.models.denoisers.schedule import make_schedule
from cadis_ray.smoothing.bounds import max_radius, samples_needed
from cadis_ray.storage.references import HUB, LOCAL, PACKAGE, checkpoint_file, shipped
from cadis_ray.study.messages import Finding, findings
from cadis_ray.study.yaml import KeyPath

if TYPE_CHECKING:
    from cadis_ray.study.sections import Distribution

MAX_DIFFUSION_STEPS = 100_000  # the schedule is an array of this length
Violations = Iterator[Finding]


def violations(values: Mapping[str, Any]) -> Violations:
    """What is wrong with a configuration, given by dotted paths; a rule with an unknown input is silent."""
    for rule, inputs in RULES:
        if all(path in values for path in inputs):
            yield from rule(*(values[path] for path in inputs))


def violations_in_space(values: Mapping[str, Any], extremes: Mapping[str, tuple[Any, ...]]) -> Violations:
    """The first violation of each rule over all combinations of the searched parameters' extreme values.

    Every rule is monotone in each number, so that the extremes suffice. A path that is searched comes first.
    """
    for rule, inputs in RULES:
        searched = [path for path in inputs if path in extremes]
        if searched and all(path in values for path in inputs):
            axes = [extremes.get(path, (values[path],)) for path in inputs]
            first = next((found for values_ in product(*axes) for found in rule(*values_)), None)
            if first is not None:
                known = ".".join(map(str, first.path)) in extremes
                yield Finding(first.path if known else tuple(searched[0].split(".")), first.text)


def distribution_violations(distribution: "Distribution", whole_numbers_only: bool) -> Violations:
    """What is wrong with one searched parameter by itself; paths are within the distribution."""
    low, high = distribution.low, distribution.high
    if distribution.choices is not None:
        if given := distribution.model_fields_set & {"low", "high", "log", "integer"}:
            yield Finding((), f"got choices and {', '.join(sorted(given))}; need choices, or low and high")
        if not distribution.choices:
            yield Finding(("choices",), "got an empty list; need at least one choice")
        for place, choice in enumerate(distribution.choices):
            if choice in distribution.choices[:place]:
                yield Finding(("choices", place), f"got {got(choice)} again; need different choices")
        return
    if low is None or high is None:
        yield Finding((), "need low and high, or choices")
        return
    if not low < high:
        yield Finding(("low",), f"got low {low} and high {high}; need low < high")
    if distribution.log and low <= 0:
        yield Finding(("low",), f"got {low}; need low > 0 where log is true")
    for name, end in (("low", low), ("high", high)):
        if distribution.integer and not whole_numbers_only and not end.is_integer():
            yield Finding((name,), f"got {end}; need a whole number where integer is true")
    if whole_numbers_only and not distribution.integer:
        yield Finding((), "need integer: true, because the parameter is a whole number")


def condition_violations(path: str, space: Mapping[str, "Distribution"], names: Collection[str]) -> Violations:
    """What is wrong with ``space[path].when``; ``names`` also has parameters that are wrong by themselves."""
    for parent, wanted in space[path].when.items():
        where = ("when", parent)
        if parent not in names:
            near = get_close_matches(parent, names, 1, cutoff=0.8)
            hint = f". Did you mean {near[0]}?" if near else ""
            yield Finding(where, f"not searched; need the path of a searched parameter{hint}", at_key=True)
        elif path in _ancestors(space, parent):
            yield Finding(where, "a parameter cannot depend on itself, directly or through others", at_key=True)
        elif parent in space:
            for value in wanted if isinstance(wanted, tuple) else (wanted,):
                if not _can_be(space[parent], value):
                    yield Finding(where, f"got {got(value)}; need a choice or whole number of {parent}")


def extremes(distribution: "Distribution") -> tuple[Any, ...]:
    """The choices, or both ends of the range."""
    if distribution.choices is not None:
        return distribution.choices
    ends = [end for end in (distribution.low, distribution.high) if end is not None]
    return tuple(int(end) if end.is_integer() else end for end in ends)


def _ancestors(space: Mapping[str, "Distribution"], path: str) -> set[str]:
    seen: set[str] = set()
    pending = [path]
    while pending:
        here = pending.pop()
        if here not in seen:
            seen.add(here)
            pending.extend(space[here].when if here in space else ())
    return seen


def _can_be(distribution: "Distribution", value: Any) -> bool:
    if distribution.choices is not None:
        return value in distribution.choices
    ends = extremes(distribution)
    return distribution.integer and isinstance(value, int) and len(ends) == 2 and ends[0] <= value <= ends[1]


def _splits(name: str, validation: int, test: int, train: int | None) -> Violations:
    if name not in DATA_SETS:
        return  # its files are counted when they are read
    total, taken = DATA_SETS[name].images, {"validation": validation}
    if name not in TEST_IMAGES:
        taken["test"] = test
    elif test > TEST_IMAGES[name]:
        yield Finding(("data", "test"), f"got {test}; need at most the {TEST_IMAGES[name]} test images of {name}")
    if sum(taken.values()) + (train or 1) > total:
        given = " and ".join(f"{split} {count}" for split, count in taken.items())
        if train is None:
            text = f"got {given}; need a sum below the {total} images of {name}"
        else:
            text = f"got {given} and train {train}; need a sum of at most the {total} images of {name}"
        yield Finding(("data", "validation"), text)


def _data_path(name: str, path: str | None) -> Violations:
    where = ("data", "path")
    if name == "digits":
        if path is not None:
            yield Finding(where, f"got {got(path)}; need none: digits is installed with the package")
    elif path is None:
        yield Finding(where, f"missing; need the folder or URI of {name}")
    elif "://" not in path and not Path(path).is_dir():
        yield Finding(where, f"got {path!r}, which is not there; need an existing folder or a URI, s3://BUCKET/FOLDER")


def _data_images(name: str, test: int, subset: str, augmentation: str, image_size: int | None) -> Violations:
    if name == "digits" and subset != "first":
        yield Finding(("data", "test_subset"), f"got {got(subset)}; need first: digits has no test images of its own")
    if name == "cifar10" and subset == "per_class" and test % 10:
        yield Finding(("data", "test"), f"got {test}; need a multiple of the 10 classes where test_subset is per_class")
    if name in DATA_SETS and image_size is not None:
        text = f"got {image_size}; need none: the images of {name} are used as they are, a classifier resizes by itself"
        yield Finding(("data", "image_size"), text)
    if augmentation == "imagenet" and image_size is None:
        yield Finding(("data", "augmentation"), "got text 'imagenet'; need data.image_size too, the side to crop to")


def _validation_images(images: int, available: int) -> Violations:
    if images > available:
        yield Finding(("validation", "images"), f"got {images}; need at most data.validation = {available}")


def _certification_images(images: int, available: int) -> Violations:
    if images > available:
        yield Finding(("certification", "images"), f"got {images}; need at most data.test = {available}")


def _radii(sigma: float, n: int, alpha: float, radii: tuple[float, ...]) -> Violations:
    ceiling = float(max_radius(n, alpha, sigma))
    beyond = [radius for radius in radii if radius >= ceiling]
    if not beyond:
        return
    asked = max(beyond)
    reach = f"n={n} at alpha={alpha} certifies no radius above {ceiling:.4g} ({ceiling / sigma:.4g} sigma)"
    try:
        needed = samples_needed(asked, sigma, alpha)
    except ValueError:
        text = f"got {asked}; no n certifies that at sigma={sigma}; {reach}"
        yield Finding(("certification", "radii"), text)
    else:
        yield Finding(("certification", "n"), f"got {n}; need n >= {needed} for radius {asked}: {reach}")


def _denoiser(
    sigma: float, family: Any, checkpoint: str, config: dict[str, Any] | None, name: str, image_size: int | None
) -> Violations:
    if family == "diffusers":
        if config is not None:
            yield Finding(("denoiser", "config"), "got arguments; need none: a pipeline's folder says its own")
        return  # its schedule is read with torch, its sigma checked then
    if config is None and checkpoint.startswith(PACKAGE) and checkpoint not in shipped():
        return  # its config is missing with it
    wrong = findings(Architecture, config) if config is not None else []
    yield from (Finding(("denoiser", "config", *path), text, at_key) for path, text, at_key in wrong)
    if wrong:
        return
    arch = architecture(family, config)
    if arch.diffusion_steps > MAX_DIFFUSION_STEPS:
        text = f"got {arch.diffusion_steps}; need at most {MAX_DIFFUSION_STEPS}"
        yield Finding(("denoiser", "config", "diffusion_steps"), text)
        return
    low, high = make_schedule(arch.noise_schedule, arch.diffusion_steps).sigma_range
    if not low <= sigma <= high:
        schedule = f"the denoiser's {arch.noise_schedule} schedule of {arch.diffusion_steps} steps"
        yield Finding(("sigma",), f"got {sigma}; need {low:.6g} <= sigma <= {high:.6g}, the range of {schedule}")
    shape = image_shape(name, image_size)
    if shape is None:
        return
    channels, *size = shape
    if arch.in_channels != channels:
        text = f"got {arch.in_channels} channels; need in_channels: {channels}, as {name} has"
        yield Finding(("denoiser", "config", "in_channels"), text)
    multiple = 2 ** (len(arch.widths) - 1)
    if any(side % multiple for side in size):
        text = f"{len(arch.widths)} levels need sides that are multiples of {multiple}, but {name} has {size}"
        yield Finding(("denoiser", "config", "channel_mult"), text)


def _missing_file(path: KeyPath, checkpoint: str) -> Violations:
    if checkpoint.startswith(PACKAGE):
        if checkpoint not in shipped():
            yield Finding(path, f"got {checkpoint!r}; need one of {', '.join(shipped()) or 'a path: none is shipped'}")
    elif not checkpoint_file(checkpoint).is_file():
        yield Finding(path, f"got {checkpoint!r}, which is not there; need an existing file")


def _denoiser_file(family: str, checkpoint: str) -> Violations:
    where = ("denoiser", "checkpoint")
    if family != "diffusers":
        yield from _missing_file(where, checkpoint)
    elif not all((checkpoint_file(checkpoint) / part).is_dir() for part in ("unet", "scheduler")):
        yield Finding(where, f"got {checkpoint!r}; need a pipeline's folder, with unet and scheduler in it")


def _classifier_files(library: str, name: str, checkpoint: str | None, download: bool) -> Violations:
    if name.startswith(LOCAL) and not (checkpoint_file(name) / "config.json").is_file():
        text = f"got {name!r}; need a folder with config.json and model.safetensors in it"
        yield Finding(("classifier", "name"), text)
    if checkpoint is not None:
        yield from _missing_file(("classifier", "checkpoint"), checkpoint)
    elif not (download or name.startswith((LOCAL, HUB)) or (library == "transformers" and "/" in name)):
        text = f"missing; need the file of the weights, or a name that brings them: {LOCAL}FOLDER, {HUB}OWNER/NAME"
        yield Finding(("classifier", "checkpoint"), text)


def _doubling(doubles_after: int | None, epochs: int) -> Violations:
    if doubles_after is not None and doubles_after >= epochs:
        text = f"got {doubles_after}; need less than epochs = {epochs}"
        yield Finding(("finetuning", "attack_radius_doubles_after"), text)


def _stopping(stop_after: int | None, epochs: int) -> Violations:
    if stop_after is not None and stop_after > epochs:
        yield Finding(("finetuning", "stop_after"), f"got {stop_after}; need at most epochs = {epochs}")


def _black_box(recipe: str, kind: str | None, endpoint: str | None, classes: int | None) -> Violations:
    if recipe != "black_box_prompt" and kind != "black_box":
        return
    if endpoint is None:
        yield Finding(("black_box", "endpoint"), "missing; need module:function or http(s)://... of the black box")
    if classes is None:
        yield Finding(("black_box", "classes"), "missing; need the number of classes that the black box tells apart")


RULES: tuple[tuple[Callable[..., Violations], tuple[str, ...]], ...] = (
    (_splits, ("data.name", "data.validation", "data.test", "data.train")),
    (_data_path, ("data.name", "data.path")),
    (_data_images, ("data.name", "data.test", "data.test_subset", "data.augmentation", "data.image_size")),
    (_validation_images, ("validation.images", "data.validation")),
    (_certification_images, ("certification.images", "data.test")),
    (_radii, ("sigma", "certification.n", "certification.alpha", "certification.radii")),
    (_denoiser, ("sigma", "denoiser.family", "denoiser.checkpoint", "denoiser.config", "data.name", "data.image_size")),
    (_denoiser_file, ("denoiser.family", "denoiser.checkpoint")),
    (_classifier_files, ("classifier.library", "classifier.name", "classifier.checkpoint", "classifier.download")),
    (_black_box, ("finetuning.recipe", "base_classifier.kind", "black_box.endpoint", "black_box.classes")),
    (_stopping, ("finetuning.stop_after", "finetuning.epochs")),
    (_doubling, ("finetuning.attack_radius_doubles_after", "finetuning.epochs")),
)
