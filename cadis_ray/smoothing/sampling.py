"""Sampling the smoothed classifier: votes of f(x + noise) for a block of samples of several images at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.votes import count_votes

Classify = Callable[[Tensor], Tensor]


@torch.inference_mode()
def sample_votes(
    images: Tensor,
    ids: Tensor,
    denoise: Callable[[Tensor, Tensor], Tensor],
    classifiers: Sequence[Classify],
    *,
    num_classes: int,
    seed: int,
    stream: Stream,
    start: int,
    size: int,
    batch_size: int,
) -> Tensor:
    """Votes (F, N, K + 1), int64, of F classifiers for samples [start, start + size) of N images.

    ``images`` (N, C, H, W) in [0, 1], on the device to compute on; ``ids`` (N,) int64 address their noise.
    ``denoise(images, noise)`` adds sigma times the standard normal noise and gives what the classifiers take; it runs
    once for all of them. Batches mix images: the result depends on neither ``batch_size`` nor the company of an image.

    A certificate is void if ``denoise`` or a classifier lets one sample of a batch influence another.
    """
    votes = torch.zeros(len(classifiers), len(ids), num_classes + 1, dtype=torch.int64, device=images.device)
    pairs = torch.arange(len(ids) * size, device=images.device)
    for chunk in pairs.split(batch_size):
        rows, samples = chunk // size, chunk % size + start
        noise = gaussian(seed, stream, ids.to(images.device)[rows], samples, images.shape[1:])
        denoised = denoise(images[rows], noise)
        for counts, classifier in zip(votes, classifiers, strict=True):
            counts += count_votes(classifier(denoised), rows, len(ids))
    return votes
