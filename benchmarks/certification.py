"""Samples per second of certification, against a plain one-image-at-a-time CERTIFY loop on the same weights.

    python benchmarks/certification.py [--device cpu] [--model digits] [--samples 40000] [--workers 2]
    python benchmarks/certification.py --reference CHECKOUT_OF_FT-CADIS
    python benchmarks/certification.py --model cifar10 --samples 64 --reference CHECKOUT_OF_FT-CADIS

Prints JSON lines. The plain loop is that of Cohen et al.'s programs: one image, batches of 400, ``torch.randn``, the
batch's classes counted on the CPU; it runs with torch's default threads and with one, on the CPU. ``sampling`` is our
loop in this process. For digits ``engine`` is the whole of it, Ray Data actors of one thread each; its rate is that
between the first block that arrives and the last, so without the start of Ray, whose seconds stand beside it. Other
models have random weights of the released sizes: speed does not depend on them. ``--reference`` is a checkout of the
authors' program: its UNet and its diffusion code denoise with the same weights, in the loop of its certify.py.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cadis_ray.certification.request import Model, Request
from cadis_ray.engine import certification
from cadis_ray.engine.certification import count_models
from cadis_ray.engine.cluster import cluster
from cadis_ray.interface.progress import Progress
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier
from cadis_ray.models.denoisers.architecture import architecture
from cadis_ray.models.denoisers.diffusion import Denoiser, load_denoiser
from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.sampling import Denoise, fastest_batch, sample_votes
from cadis_ray.study.load import load_study
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import changed

DIGITS = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
PLAIN_BATCH = 400
# (family, side of the images, classes, classifier, sigma): sizes of the papers' models.
RELEASED = {
    "cifar10": ("improved_diffusion", 32, 10, "vit_base_patch16_224", 0.5),
    "imagenet": ("guided_diffusion", 224, 1000, "vit_base_patch16_384", 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=["digits", *RELEASED], default="digits")
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' program")
    arguments = parser.parse_args()
    device, samples = torch.device(arguments.device), arguments.samples
    images, denoiser, classifier, sigma = models(arguments.model, device)
    default = torch.get_num_threads()
    loops: dict[str, Denoise] = {"plain loop": partial(denoiser.denoise, sigma=sigma)}
    if arguments.reference:
        loops["official program"] = official(arguments.reference, arguments.model, denoiser, sigma)
        noise = torch.randn_like(images)
        with torch.inference_mode():
            apart = [denoise(images, noise).float() for denoise in loops.values()]
        print(json.dumps({"what": "official program", "largest_difference": float((apart[0] - apart[1]).abs().max())}))
    best = dict.fromkeys(loops, 0.0)
    for what, denoise in loops.items():
        for threads in (default, 1) if device.type == "cpu" else (default,):
            torch.set_num_threads(threads)
            rate = plain(images[0], denoise, classifier, samples)
            best[what] = max(best[what], rate)
            say(what, rate, threads=threads, batch=PLAIN_BATCH)
    torch.set_num_threads(1 if arguments.model == "digits" else default)
    flops, peak = flops_of(images, denoiser, classifier, sigma), matmul_peak(device)
    rate = sampling(images, denoiser, classifier, sigma, samples, flops=flops, peak=peak)
    if arguments.model == "digits":
        shared_denoiser(images, denoiser, classifier, sigma, samples // 4)
        rate = engine(samples, arguments.workers)
    for what, theirs in best.items():
        print(json.dumps({"what": f"against the {what} at its best", "factor": round(rate / theirs, 2)}))


def models(name: str, device: torch.device) -> tuple[Tensor, Denoiser, Classifier, float]:
    """Images (N, C, H, W) in [0, 1], and what is sampled on them."""
    if name == "digits":
        base = changed(load_study(DIGITS).base, {"finetuning.recipe": "none"})
        model = base.denoiser
        denoiser = load_denoiser(model.family, model.checkpoint, model.config)
        classifier = load_classifier(**base.classifier.model_dump())
        classifier.requires_grad_(False)
        return torch.rand(8, 1, 8, 8).to(device), denoiser.to(device), classifier.to(device), base.sigma
    family, side, classes, classifier, sigma = RELEASED[name]
    network = load_classifier("timm", classifier, None, {"num_classes": classes}, "half")
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    denoiser = load_denoiser(family).to(device, precision)
    return torch.rand(8, 3, side, side).to(device), denoiser, network.to(device), sigma


def plain(image: Tensor, denoise: Denoise, classifier: nn.Module, samples: int) -> float:
    """Samples per second of CERTIFY as it is usually written, after a warm-up of one batch."""

    @torch.inference_mode()
    def counts(samples: int) -> list[int]:
        found = [0] * 1000
        while samples > 0:
            batch = min(PLAIN_BATCH, samples)
            samples -= batch
            repeated = image.repeat(batch, 1, 1, 1)
            for answer in classifier(denoise(repeated, torch.randn_like(repeated))).argmax(1).cpu():
                found[int(answer)] += 1
        return found

    counts(min(PLAIN_BATCH, samples))
    return samples / seconds(lambda: counts(samples))


def official(checkout: Path, model: str, denoiser: Denoiser, sigma: float) -> Denoise:
    """The authors' UNet, q_sample and p_sample, float32, with the weights of ``denoiser``."""
    sys.path.insert(0, str(checkout))
    family = RELEASED[model][0] if model in RELEASED else "improved_diffusion"
    program = importlib.import_module(f"third_party.{family}.script_util")
    if model == "digits":  # create_model knows no images of 8 pixels
        arch = architecture(family, load_study(DIGITS).base.denoiser.config)
        network = importlib.import_module(f"third_party.{family}.unet").UNetModel(
            arch.in_channels, arch.num_channels, arch.in_channels, arch.num_res_blocks, tuple(arch.attention_ds),
            channel_mult=[width // arch.num_channels for width in arch.widths], num_heads=arch.num_heads,
            use_scale_shift_norm=arch.use_scale_shift_norm,
        )  # fmt: skip
        diffusion = program.create_gaussian_diffusion(
            steps=arch.diffusion_steps, noise_schedule=arch.noise_schedule, rescale_timesteps=arch.rescale_timesteps
        )
    else:
        settings = {
            name: value for name, value in vars(importlib.import_module("denoiser")).items() if name.endswith("_Args")
        }
        arguments = next(value for name, value in settings.items() if name.lower().startswith(family))()
        names = program.model_and_diffusion_defaults().keys()
        network, diffusion = program.create_model_and_diffusion(**program.args_to_dict(arguments, names))
    network.load_state_dict(denoiser.network.state_dict())
    device = next(denoiser.parameters()).device
    network.to(device).eval()
    t = denoiser.timestep(sigma)

    def denoise(images: Tensor, noise: Tensor) -> Tensor:
        steps = torch.full((len(images),), t, device=device)
        x_t = diffusion.q_sample(x_start=2 * images - 1, t=steps, noise=noise)
        return diffusion.p_sample(network, x_t, steps, clip_denoised=True)["pred_xstart"]

    return denoise


def sampling(
    images: Tensor, denoiser: Denoiser, classifier: Classifier, sigma: float, samples: int, *, flops: float, peak: float
) -> float:
    """Our loop in this process, and the share of its time outside the networks."""
    denoise = partial(denoiser.denoise, sigma=sigma)
    batch = fastest_batch(images, denoise, [classifier])
    count = partial(sample, images, denoise, samples=samples // len(images), batch=batch)
    rate = samples / seconds(lambda: count([classifier]))
    with timed(denoiser.network, classifier) as inside:
        whole = seconds(lambda: count([classifier]))
    outside = 1 - sum(inside) / whole
    say("sampling", rate, threads=torch.get_num_threads(), batch=batch, share_outside_networks=round(outside, 3),
        share_of_matmul_peak=round(rate * flops / peak, 3), gflop_per_sample=round(flops / 1e9, 4))  # fmt: skip
    return rate


def shared_denoiser(images: Tensor, denoiser: Denoiser, classifier: Classifier, sigma: float, samples: int) -> None:
    """What three checkpoints counted together cost, against one."""
    denoise = partial(denoiser.denoise, sigma=sigma)
    cost = {}
    for number in (1, 3):
        passed: list[int] = []

        def count(_: nn.Module, inputs: Any, passed: list[int] = passed) -> None:
            passed.append(len(inputs[0]))

        handle = denoiser.network.register_forward_pre_hook(count)
        took = seconds(partial(sample, images, denoise, [classifier] * number, samples // len(images), 256))
        handle.remove()
        cost[number] = (sum(passed), took)
    print(json.dumps({
        "what": "three checkpoints together, against one",
        "denoiser_calls": round(cost[3][0] / cost[1][0], 3), "seconds": round(cost[3][1] / cost[1][1], 3),
    }))  # fmt: skip


def engine(samples: int, workers: int) -> float:
    """Certification by Ray Data actors of one thread each."""
    images = 40
    base = changed(load_study(DIGITS).base, {
        "finetuning.recipe": "none", "certification.images": images, "certification.n0": 100,
        "certification.n": workers * samples // images - 100,
    })  # fmt: skip
    resources = Resources(actors=workers)
    arrivals: list[tuple[float, int]] = []
    on_actors = certification.on_actors

    def watched(*arguments: Any) -> Iterator[dict[str, Any]]:
        for block in on_actors(*arguments):
            arrivals.append((time.perf_counter(), int(block["samples"])))
            yield block

    certification.on_actors = watched
    with cluster("local", resources), tempfile.TemporaryDirectory() as folder, Progress() as progress:
        began = time.perf_counter()
        request = Request(base, {"off the shelf": Model(base, None)}, 0)
        count_models(request, CountsStore(Path(folder)), progress, resources, torch.zeros(images).numpy())
    # Every worker's first block arrives after the start of Ray: what came with them is not in the rate.
    times, sizes = zip(*arrivals, strict=True)
    rate = sum(sizes[workers:]) / (times[-1] - times[workers - 1])
    say("engine", rate, workers=workers, start_seconds=round(times[0] - began, 1), samples=sum(sizes))
    return rate


def sample(images: Tensor, denoise: Callable, classifiers: list[Classifier], samples: int, batch: int) -> None:
    sample_votes(
        images, torch.arange(len(images)), denoise, classifiers, num_classes=classifiers[0](images[:1]).shape[1],
        seed=0, stream=Stream.AUDIT, start=0, size=samples, batch_size=batch,
    ).cpu()  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def timed(*modules: nn.Module) -> Iterator[list[float]]:
    """Seconds of every forward pass; the device is waited for on both sides."""
    found: list[float] = []
    starts: list[float] = []

    def clock(inputs: Any) -> float:
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    handles = [m.register_forward_pre_hook(lambda _, inputs: starts.append(clock(inputs))) for m in modules]
    handles += [
        m.register_forward_hook(lambda _, inputs, __: found.append(clock(inputs) - starts.pop())) for m in modules
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def flops_of(images: Tensor, denoiser: Denoiser, classifier: Classifier, sigma: float) -> float:
    """Floating-point operations of the networks for one sample."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        classifier(denoiser.denoise(images[:1], torch.randn_like(images[:1]), sigma))
    return float(counter.get_total_flops())


def matmul_peak(device: torch.device) -> float:
    """Operations per second of a large matrix product: bf16 on a GPU, float32 on the CPU with the present threads."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=kind)

    def product() -> None:
        for _ in range(5):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    return 5 * 2 * size**3 / seconds(product)


def say(what: str, rate: float, **more: Any) -> None:
    print(json.dumps({"what": what, "samples_per_second": float(f"{rate:.4g}"), **more}), flush=True)


if __name__ == "__main__":
    main()
