"""What a plan takes on given hardware: hours, storage and price, from its stages' counts and reached rates."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, prod
from statistics import fmean
from typing import NamedTuple

from cadis_ray.errors import UsageError
from cadis_ray.smoothing.settings import schedule
from cadis_ray.study.plan import Stage, plan, training, training_set, validation
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import Study, baselines, trial_values, trial_with

STATED = (0.2, 0.5)  # of the peak, where nothing was measured: what vision networks reach with and without care
START_SECONDS, STAGE_SECONDS = 15.0, 10.0  # of Ray; of the processes of a stage, until they have imported torch
TRIAL_SECONDS = {False: 2.0, True: 18.0}  # between trials: in its own process; with workers


class Range(NamedTuple):
    """From the best to the worst that is expected."""

    low: float
    high: float

    @classmethod
    def of(cls, combine: Callable[[Iterable[float]], float], ranges: Iterable["Range"]) -> "Range":
        """Combine all low ends, and all high ends: ``sum``, ``max`` or ``prod``."""
        return cls(*map(combine, zip(*ranges, strict=True)))

    def over(self, divisor: float, more: float = 0) -> "Range":
        """Divide both ends, and add ``more``."""
        return Range(self.low / divisor + more, self.high / divisor + more)


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


class Timing(NamedTuple):
    """A stage's ``busy`` unit-seconds of computing, and ``wall`` seconds with all else, on ``units`` at a time."""

    name: str
    busy: Range
    wall: Range
    units: float


@dataclass(frozen=True)
class Forecast:
    """A study's stages on ``count`` units of a ``kind``; ``storage``: bytes of its run's folder at the most."""

    kind: str
    count: int
    stages: tuple[Timing, ...]
    storage: dict[str, int]
    gflops: tuple[float, float]

    @property
    def hours(self) -> Range:
        """Unit-hours of computing."""
        return Range.of(sum, (stage.busy for stage in self.stages)).over(3600)

    @property
    def wall(self) -> Range:
        """Hours by the clock."""
        return Range.of(sum, (stage.wall for stage in self.stages)).over(3600, START_SECONDS / 3600)

    @property
    def price(self) -> Range:
        """USD: all units from the start to the end, at the lowest price and shortest time and the other way round."""
        return Range.of(prod, (self.wall, HARDWARE[self.kind].price)).over(1 / self.count)


def parse_hardware(text: str) -> tuple[str, int]:
    """Read ``h200=8`` as ("h200", 8). Raises UsageError with the kinds there are."""
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

    base, resources, rates, images = study.base, study.resources, HARDWARE[kind], training_set(study)
    trial, actor = _units(resources, kind, count)
    abreast, actors = min(resources.concurrent_trials, count // trial), min(resources.actors, count // actor) * actor
    adapter = "full" if "full" in trial_values(study, "finetuning.adapter") else base.finetuning.adapter
    flops = flops_of(trial_with(study, fmean, adapter=adapter), images.shape)

    def busy(stage: Stage, classifier: str = "float32", denoiser: str = "float32") -> Range:
        denoised, classified = stage.denoiser_calls * flops.denoiser, stage.classifier_calls.worth * flops.classifier
        reached = zip(getattr(rates, denoiser), getattr(rates, classifier), strict=True)
        return Range(*(denoised / one + classified / other for one, other in reached))

    def acted(stage: Stage, found: Range) -> Timing:
        return Timing(stage.name, found, found.over(actors, STAGE_SECONDS), actors)

    pool, _, _, finalists, certification, kept = plan(study, images, flops.trained)
    trained = [trial_with(study, fmean)] * study.trials + baselines(study)
    parts = [(busy(training(one, images), one.finetuning.precision), busy(validation(one))) for one in trained]
    each = [Range.of(sum, pair) for pair in parts]
    search, longest = Range.of(sum, each).over(abreast * trial), Range.of(max, each).over(trial)
    between = ceil(len(each) / abreast) * TRIAL_SECONDS[resources.workers_per_trial > 0] + STAGE_SECONDS
    precision, samples = base.certification.precision, schedule(study.finalists.samples)
    recount = busy(finalists, precision, precision)
    # How many images go on beyond the first samples only their votes tell.
    recount = Range(recount.low * min(samples) / max(samples), recount.high)
    timings = (
        acted(pool, busy(pool)),
        Timing("search", Range.of(sum, each), Range.of(max, (search, longest)).over(1, between), abreast * trial),
        acted(finalists, recount),
        acted(certification, busy(certification, precision, precision)),
    )
    storage = {stage.name: stage.bytes for stage in (pool, kept)}
    return Forecast(kind, count, timings, storage, (flops.denoiser / 1e9, flops.classifier / 1e9))


def lines(found: Forecast) -> list[str]:
    """Tell the forecast as plain text."""
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


def _units(resources: Resources, kind: str, count: int) -> tuple[float, float]:
    """Tell how many GPUs or cores one trial and one actor take; refuse a study that ``count`` of them do not suit."""
    workers = max(resources.workers_per_trial, 1)
    units = {"trial": workers * resources.gpus_per_worker, "actor": resources.gpus_per_actor}
    if (kind == "cpu") == any(units.values()):
        asked = "ask for GPUs" if any(units.values()) else "ask for no GPU, so that it would be idle"
        raise UsageError(f"--hardware {kind}: the study's resources {asked}; change gpus_per_worker and gpus_per_actor")
    if kind == "cpu":
        units = {"trial": workers * resources.cpus_per_worker, "actor": resources.cpus_per_actor}
    for key, need in units.items():
        if not need:
            name = "gpus_per_worker" if key == "trial" else "gpus_per_actor"
            raise UsageError(f"--hardware {kind}: the study's resources.{name} is 0: that part would run on CPUs")
        if need > count:
            raise UsageError(f"--hardware {kind}={count}: one {key} of the study's resources needs {need:g} of them")
    return units["trial"], units["actor"]


def _show(found: Range, divisor: float, unit: str) -> str:
    low, high = (f"{value / divisor:,.0f}" if value >= 100 * divisor else f"{value / divisor:.2g}" for value in found)
    return f"{low} to {high} {unit}"
