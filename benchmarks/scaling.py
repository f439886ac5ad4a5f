"""How certification scales: measured with 1 and 2 workers of one thread each, simulated from there to 64.

    python benchmarks/scaling.py [--samples 10000] [--slow 0.05] [--factor 4]

Prints JSON lines. ``operations``: GFLOP a second of CPU time that networks reach on one thread, the rates behind
``--hardware cpu=N``. ``measured``: digits, every worker a Ray Data actor on the same images; its rate is that between
the first block that arrives and the last, so without the start of Ray. ``simulated``: whoever is free takes the next
block, in the order in which certification hands them out, each with a duration measured on one worker; a share
``--slow`` of the workers takes ``--factor`` times as long. As many blocks as the CIFAR-10 studies certify for a model.
Efficiency: the least time in which the workers could do it all over the time that it takes.
"""

import argparse
import heapq
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadis_ray.certification.pending import BLOCK, IMAGES_PER_ITEM
from cadis_ray.certification.request import Model, Request
from cadis_ray.engine import certification
from cadis_ray.engine.certification import count_models
from cadis_ray.engine.cluster import cluster
from cadis_ray.finetuning.base_classifier import load_finetuned
from cadis_ray.interface.progress import Progress
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.study.flops import flops_of
from cadis_ray.study.load import load_study
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import changed

DIGITS = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
IMAGES = 40
CERTIFIED, SAMPLES = 1000, 100_000  # of the CIFAR-10 studies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000, help="an image with two workers, half of it with one")
    parser.add_argument("--slow", type=float, default=0.05, help="share of the workers that are slow")
    parser.add_argument("--factor", type=float, default=4.0, help="how many times as long these take")
    arguments = parser.parse_args()
    say(what="operations", **operations())
    rates, durations = {}, np.empty(0)
    for workers in (1, 2):
        rates[workers], found = measured(workers, arguments.samples)
        durations = found if workers == 1 else durations
        say(what="measured", workers=workers, samples_per_second=round(rates[workers]))
    say(what="two workers against one", factor=round(rates[2] / rates[1], 3))
    blocks = CERTIFIED // IMAGES_PER_ITEM * SAMPLES // BLOCK
    drawn = np.random.default_rng(0).choice(durations, blocks)
    for workers in (1, 2, 4, 8, 16, 32, 64):
        even = np.ones(workers)
        slow = np.where(np.arange(workers) < round(arguments.slow * workers), arguments.factor, 1.0)
        say(
            what="simulated", workers=workers, blocks=blocks, efficiency=round(efficiency(drawn, even), 4),
            with_stragglers=round(efficiency(drawn, slow), 4), slow_workers=int((slow > 1).sum()),
        )  # fmt: skip


def operations() -> dict[str, float]:
    """GFLOP a second of CPU time: the denoiser, the classifier forward, and forward and backward."""
    torch.set_num_threads(1)
    base = changed(load_study(DIGITS).base, {"finetuning.recipe": "none"})
    model, flops = base.denoiser, flops_of(base, (1, 8, 8))
    denoiser = load_denoiser(model.family, model.checkpoint, model.config)
    classifier = load_finetuned(base, None)
    images = torch.rand(64, 1, 8, 8)
    noise = torch.randn_like(images)

    def rate(work: Callable[[], object], operations: float) -> float:
        work()
        began = time.process_time()
        for _ in range(50):
            work()
        return round(50 * len(images) * operations / (time.process_time() - began) / 1e9, 1)

    with torch.inference_mode():
        found = {
            "denoiser": rate(lambda: denoiser.denoise(images, noise, base.sigma), flops.denoiser),
            "forward": rate(lambda: classifier(images), flops.classifier),
        }
    classifier.requires_grad_(True)
    return found | {"training": rate(lambda: classifier(images).sum().backward(), 3 * flops.classifier)}


def measured(workers: int, samples: int) -> tuple[float, np.ndarray]:
    """Samples a second, and the seconds of every whole block within its actor but for each actor's first."""
    base = changed(load_study(DIGITS).base, {
        "finetuning.recipe": "none", "certification.images": IMAGES, "certification.n0": 100,
        "certification.n": workers * samples // 2 - 100,
    })  # fmt: skip
    resources = Resources(actors=workers, min_actors=workers, batch_size=500)
    arrivals: list[tuple[float, int, float]] = []
    on_actors = certification.on_actors

    def watched(*given: Any) -> Iterator[dict[str, Any]]:
        for block in on_actors(*given):
            arrivals.append((time.perf_counter(), int(block["samples"]), float(block["seconds"])))
            yield block

    certification.on_actors = watched
    try:
        with cluster("local", resources), tempfile.TemporaryDirectory() as folder, Progress() as progress:
            request = Request(base, {"off the shelf": Model(base, None)}, 0)
            count_models(request, CountsStore(Path(folder)), progress, resources, np.zeros(IMAGES))
    finally:
        certification.on_actors = on_actors
    times, sizes, seconds = map(np.array, zip(*arrivals, strict=True))
    whole = sizes == IMAGES_PER_ITEM * BLOCK
    # Every worker's first block arrives after the start of Ray, and the last ones when not all are busy any more.
    first, last = workers - 1, len(times) - workers
    return float(sizes[first + 1 : last + 1].sum() / (times[last] - times[first])), seconds[whole][workers:]


def efficiency(durations: Sequence[float] | np.ndarray, slowness: Sequence[float] | np.ndarray) -> float:
    """Of ``len(slowness)`` workers that take blocks (B,) in their order, whoever is free: the least time in which they
    could do all, if blocks could be divided at will, over the time that it takes. Worker i needs ``slowness[i]`` times
    a block's duration."""
    free = [(0.0, worker) for worker in range(len(slowness))]
    end = 0.0
    for duration in durations:
        began, worker = heapq.heappop(free)
        ended = began + duration * slowness[worker]
        heapq.heappush(free, (ended, worker))
        end = max(end, ended)
    return float(np.sum(durations) / np.sum(1 / np.asarray(slowness)) / end)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
