"""What a study takes on given hardware: hours, storage and price, from counts of operations and reached rates."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from cadis_ray.errors import UsageError
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.settings import FineTuning
from cadis_ray.smoothing.settings import schedule
from cadis_ray.study.plan import Plan, plan
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import Study, configuration, trial_values

STATED = (0.2, 0.5)  # of the peak, where nothing was measured: what vision networks reach with and without care
STATE_BYTES = 3 * 4  # a weight and AdamW's two moments, in a checkpoint
CHECKPOINTS = 2  # kept of a trial
START_SECONDS, STAGE_SECONDS = 15.0, 10.0  # of Ray; of the processes of a stage, until they have imported torch
TRIAL_SECONDS = {False: 2.0, True: 18.0}  # between trials: in its own process; with workers


class Range(NamedTuple):
    """From the best to the worst that is expected."""

    low: float
    high: float


class Hardware(NamedTuple):
    """One unit, a GPU or a core: operations a second that networks reach, and USD an hour, spot to on demand.

    Prices and peaks are list values (from memory, 2026-11-21, unverified): ask your provider.
    """

    float32: Range
    bf16: Range
    price: Range
    source: str


def _gpu(float32: float, bf16: float, price: Range) -> Hardware:
    share = f"nothing measured: {STATED[0]:.0%} to {STATED[1]:.0%} of the peak, {float32:g} and {bf16:g} TFLOP/s"
    reached = [Range(1e12 * peak * STATED[1], 1e12 * peak * STATED[0]) for peak in (float32, bf16)]
    return Hardware(reached[0], reached[1], price, f"{share} in float32 and bf16")


# The peaks are dense. Networks of digits and cifar10_small, one thread: benchmarks/RESULTS.md.
MEASURED = Range(56e9, 34e9)
HARDWARE = {
    "cpu": Hardware(MEASURED, MEASURED, Range(0.01, 0.1), "measured on a core of an AMD EPYC, benchmarks/RESULTS.md"),
    "l40s": _gpu(91.6, 362, Range(0.8, 2.2)),
    "a100": _gpu(19.5, 312, Range(1.0, 3.5)),
    "h100": _gpu(67, 989, Range(2.0, 6.0)),
    "h200": _gpu(67, 989, Range(2.5, 7.0)),
}


class Stage(NamedTuple):
    """``busy`` unit-seconds of computing, ``wall`` seconds with what is not computing, on ``units`` at a time."""

    name: str
    busy: Range
    wall: Range
    units: float


@dataclass(frozen=True)
class Forecast:
    """A study's stages on ``count`` units of a ``kind``; ``storage``: bytes of its run's folder at the most."""

    kind: str
    count: int
    stages: tuple[Stage, ...]
    storage: dict[str, int]
    gflops: tuple[float, float]

    @property
    def hours(self) -> Range:
        """Unit-hours of computing."""
        return Range(*(sum(stage.busy[end] for stage in self.stages) / 3600 for end in (0, 1)))

    @property
    def wall(self) -> Range:
        """Hours by the clock."""
        return Range(*((START_SECONDS + sum(stage.wall[end] for stage in self.stages)) / 3600 for end in (0, 1)))

    @property
    def price(self) -> Range:
        """USD: all units from the start to the end, at the lowest price and shortest time and the other way round."""
        return Range(*(self.wall[end] * self.count * HARDWARE[self.kind].price[end] for end in (0, 1)))


def parse_hardware(text: str) -> tuple[str, int]:
    """``h200=8`` -> ("h200", 8). Raises UsageError with the kinds there are."""
    kind, _, count = text.partition("=")
    if kind not in HARDWARE or not count.isdecimal() or int(count) < 1:
        raise UsageError(f"--hardware: got {text!r}; need KIND=COUNT, with KIND one of {', '.join(HARDWARE)}: h200=8")
    return kind, int(count)


def forecast(study: Study, kind: str, count: int) -> Forecast:
    """Predict a study on ``count`` units, all of one ``kind``.

    A searched number counts as the mean of its values, every image as attacked, no trial as stopped early, a
    sequential certificate as one with all its samples, and finalists with their first samples at least, all at most.
    Raises UsageError where the study's resources do not fit the hardware, or it has no use for it.
    """
    from cadis_ray.study.flops import flops_of  # torch takes seconds to import

    base, resources, counted = study.base, study.resources, plan(study)
    units = _units(resources, kind)
    places = {key: int(count // need) for key, need in units.items()}
    for key, need in units.items():
        if not places[key]:
            raise UsageError(f"--hardware {kind}={count}: one {key} of the study's resources needs {need:g} of them")
    adapter = "full" if "full" in trial_values(study, "finetuning.adapter") else base.finetuning.adapter
    widest = base.model_copy(update={"finetuning": base.finetuning.model_copy(update={"adapter": adapter})})
    flops, rates = flops_of(widest, counted.image_shape), HARDWARE[kind]

    def seconds(operations: float, precision: str) -> Range:
        return Range(*(operations / rate for rate in getattr(rates, precision)))

    actors, trials = min(resources.actors, places["actor"]), min(resources.concurrent_trials, places["trial"])
    pool = seconds(counted.pool_images * flops.denoiser, "float32")
    each = [
        _sum(
            seconds(_training(chosen, counted.train_images) * flops.classifier, chosen.finetuning.precision),
            seconds(_validation(chosen) * flops.classifier, "float32"),
            seconds(_denoising(chosen.finetuning, counted) * flops.denoiser, "float32"),
        )
        for chosen in _trials(study)
    ]
    samples = counted.certification_passes // counted.certified_models
    voters = sum(map(_calls_a_vote, [base, *(configuration(study, changes) for changes in study.baselines.values())]))
    first = counted.recount_passes * min(schedule(study.finalists.samples)) / counted.recount_samples
    # One pass of the denoiser serves all models; how many images go on beyond the first samples only their votes tell.
    operations = flops.denoiser / counted.recounted_models + flops.classifier
    precision = base.certification.precision
    recount = Range(
        seconds(first * operations, precision).low, seconds(counted.recount_passes * operations, precision).high
    )
    certification = seconds(samples * (flops.denoiser + voters * flops.classifier), precision)
    longest = Range(*(max(trial[end] for trial in each) / units["trial"] for end in (0, 1)))
    search = Range(*(sum(trial[end] for trial in each) for end in (0, 1)))
    between = ceil(len(each) / trials) * TRIAL_SECONDS[resources.workers_per_trial > 0] + STAGE_SECONDS
    return Forecast(
        kind,
        count,
        (
            _stage("denoised pool", pool, actors * units["actor"]),
            Stage(
                "search",
                search,
                Range(*(max(search[end] / trials / units["trial"], longest[end]) + between for end in (0, 1))),
                trials * units["trial"],
            ),
            _stage("finalists", recount, actors * units["actor"]),
            _stage("certification", certification, actors * units["actor"]),
        ),
        {
            "denoised pool": counted.pool_bytes,
            "checkpoints": CHECKPOINTS * len(each) * STATE_BYTES * flops.trained,
        },
        (flops.denoiser / 1e9, flops.classifier / 1e9),
    )


def lines(found: Forecast) -> list[str]:
    """The forecast as plain text."""
    stages = "; ".join(
        f"{stage.name} {_show(stage.busy, 3600, 'h')} on {stage.units:g} at a time" for stage in found.stages
    )
    unit = "core" if found.kind == "cpu" else "GPU"
    storage = ", ".join(f"{what} {size / 1e9:,.2f}" for what, size in found.storage.items())
    return [
        f"on {found.count} {found.kind}: {_show(found.hours, 1, f'{unit}-hours')} ({stages}), "
        f"{_show(found.wall, 1, 'hours')} by the clock",
        f"price: {_show(found.price, 1, 'USD')}, {_show(HARDWARE[found.kind].price, 1, 'USD')} an hour and {unit}",
        f"storage at the most: {sum(found.storage.values()) / 1e9:,.2f} GB ({storage})",
        f"operations of one image: denoiser {found.gflops[0]:,.3f} GFLOP, classifier {found.gflops[1]:,.3f}; a second: "
        f"{HARDWARE[found.kind].source}",
        "the forecast against what was measured: docs/scaling.md",
    ]


def _units(resources: Resources, kind: str) -> dict[str, float]:
    """GPUs or cores that one trial and one actor take."""
    workers = max(resources.workers_per_trial, 1)
    gpus = {"trial": workers * resources.gpus_per_worker, "actor": resources.gpus_per_actor}
    if (kind == "cpu") == any(gpus.values()):
        asked = "ask for GPUs" if any(gpus.values()) else "ask for no GPU, so that it would be idle"
        raise UsageError(f"--hardware {kind}: the study's resources {asked}; change gpus_per_worker and gpus_per_actor")
    if kind == "cpu":
        return {"trial": workers * resources.cpus_per_worker, "actor": resources.cpus_per_actor}
    if missing := [f"gpus_per_{'worker' if key == 'trial' else key}" for key, need in gpus.items() if not need]:
        raise UsageError(f"--hardware {kind}: the study's resources.{missing[0]} is 0: that part would run on CPUs")
    return gpus


def _trials(study: Study) -> Iterator[Configuration]:
    """What is trained: the searched trials, each with the mean of every searched count, and the baselines."""
    means = {}
    for name in ("num_noises", "attack_steps", "epochs"):
        values = trial_values(study, f"finetuning.{name}")
        means[name] = sum(values) / len(values)
    mean = study.base.finetuning.model_copy(update=means)
    yield from [study.base.model_copy(update={"finetuning": mean})] * study.trials
    yield from (configuration(study, changes) for changes in study.baselines.values())


def _training(chosen: Configuration, images: int) -> float:
    """Passes forward that a trial's training is worth: a loss is three, a step of the attack, whose weights need no
    gradient, two; behind a black box there are only those forward."""
    settings = chosen.finetuning
    if settings.recipe == "none":
        return 0.0
    if settings.recipe == "black_box_prompt":
        passes = 2.0 * settings.coordinator.averages
    else:
        passes = 3.0 + (settings.update_selection == "frozen")
    if settings.recipe == "ft_cadis" and settings.adv_weight > 0:
        passes += 3 + 2 * settings.attack_steps
    if settings.recipe == "smoothadv":
        passes += 2 * settings.attack_steps
    return images * settings.last_epoch * settings.num_noises * passes


def _calls_a_vote(chosen: Configuration) -> int:
    return chosen.base_classifier.local_noises if chosen.kind == "local_smoothing" else 1


def _validation(chosen: Configuration) -> float:
    counted = chosen.validation.images * max(schedule(chosen.validation.samples)) * _calls_a_vote(chosen)
    return max(chosen.finetuning.last_epoch, 1) * counted


def _denoising(settings: FineTuning, counted: Plan) -> float:
    """Training images that a trial denoises because the pool does not hold them."""
    trained = 0 if settings.recipe == "none" else settings.last_epoch
    return counted.train_images * max(trained - counted.pool_epochs, 0) * settings.num_noises


def _stage(name: str, busy: Range, units: float) -> Stage:
    return Stage(name, busy, Range(*(seconds / units + STAGE_SECONDS for seconds in busy)), units)


def _sum(*parts: Range) -> Range:
    return Range(*map(sum, zip(*parts, strict=True)))


def _show(found: Range, divisor: float, unit: str) -> str:
    low, high = (f"{value / divisor:,.0f}" if value >= 100 * divisor else f"{value / divisor:.2g}" for value in found)
    return f"{low} to {high} {unit}"
