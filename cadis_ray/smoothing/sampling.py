"""Sampling the smoothed classifier: votes of f(x + noise) for a block of samples of several images at once."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.votes import count_votes

Classify = Callable[[Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]
SMALLEST, LARGEST = 64, 8192  # batches worth trying
GAIN = 1.03  # a batch of twice the size must be this much faster per sample
LONG = 1.0  # seconds


@torch.inference_mode()
def sample_votes(
    images: Tensor,
    ids: Tensor,
    denoise: Denoise,
    classifiers: Sequence[Classify],
    *,
    num_classes: int,
    seed: int,
    stream: Stream,
    start: int,
    size: int,
    batch_size: int,
    wanted: Tensor | None = None,
) -> Tensor:
    """Votes (F, N, K + 1), int64, of F classifiers for samples [start, start + size) of N images.

    ``images`` (N, C, H, W) in [0, 1], on the device to compute on; ``ids`` (N,) int64 address their noise.
    ``denoise(images, noise)`` adds sigma times the standard normal noise and gives what the classifiers take; it runs
    once for all of them. ``wanted`` (F, N) bool: which classifier counts which image, None: all; the others' votes are
    zeros. Batches mix images, and are halved where the device's memory runs out: the result depends on neither
    ``batch_size`` nor the company of an image.

    A certificate is void if ``denoise`` or a classifier lets one sample of a batch influence another.
    """
    votes = torch.zeros(len(classifiers), len(ids), num_classes + 1, dtype=torch.int64, device=images.device)
    ids, first, end = ids.to(images.device), 0, len(ids) * size
    while first < end:
        pairs = torch.arange(first, min(first + batch_size, end), device=images.device)
        rows, samples = pairs // size, pairs % size + start
        try:
            noise = gaussian(seed, stream, ids[rows], samples, images.shape[1:])
            denoised = denoise(images[rows], noise)
            counted = [
                _counted(classifier, denoised, rows, len(ids), None if wanted is None else wanted[index])
                for index, classifier in enumerate(classifiers)
            ]
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            continue
        for total, counts in zip(votes, counted, strict=True):
            if counts is not None:
                total += counts
        first += len(pairs)
    return votes


def _counted(
    classifier: Classify, denoised: Tensor, rows: Tensor, num_rows: int, wanted: Tensor | None
) -> Tensor | None:
    if wanted is not None and not (kept := wanted[rows]).all():
        denoised, rows = denoised[kept], rows[kept]
    return count_votes(classifier(denoised), rows, num_rows) if len(rows) else None


@torch.inference_mode()
def fastest_batch(images: Tensor, denoise: Denoise, classifiers: Sequence[Classify]) -> int:
    """The batch size with the most samples per second here: doubled from 64 until two in a row gain nothing.

    What takes a second gains nothing from being larger.

    ``images`` as for ``sample_votes``. Timed on samples of the search's stream, which are thrown away.
    """
    num_classes = classifiers[0](denoise(images[:1], torch.zeros_like(images[:1]))).shape[1]
    best, best_rate, size = SMALLEST, 0.0, SMALLEST
    took: list[float] = []
    while size <= min(4 * best, LARGEST) and min(took, default=0) < LONG:
        took = []
        while len(took) < 3 and sum(took) < LONG:  # the first is a warm-up; other processes disturb the others
            started = time.perf_counter()
            votes = sample_votes(
                images[:1], torch.zeros(1, dtype=torch.int64), denoise, classifiers, num_classes=num_classes,
                seed=0, stream=Stream.SEARCH, start=0, size=size, batch_size=size,
            )  # fmt: skip
            votes.cpu()  # waits for the device
            took.append(time.perf_counter() - started)
        rate = size / min(took)
        if rate > best_rate * GAIN:
            best, best_rate = size, rate
        size *= 2
    return best
