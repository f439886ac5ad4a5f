"""CERTIFY and PREDICT in this process: images and a classifier in, certificates or classes out."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadis_ray.smoothing.bounds import certify, max_radius, predict
from cadis_ray.smoothing.counts import Blocks
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.preflight import check_images, preflight
from cadis_ray.smoothing.sampling import Classify, sample_votes

SELECTION, ESTIMATION = Stream.SELECTION, Stream.ESTIMATION


@dataclass(frozen=True)
class Certified:
    """Of N images: ``predict`` int64 (N,), -1 where it abstains; ``radius`` float64 (N,), l2, in [0, 1] pixels, 0.0
    where it abstains; ``p_a_lower`` float64 (N,); and the counts int64 (N, K + 1) that all of it follows from."""

    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    p_a_lower: NDArray[np.float64]
    selection: NDArray[np.int64]
    estimation: NDArray[np.int64]


def certify_images(
    classifier: Classify,
    images: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int | None = None,
    ids: Tensor | None = None,
    num_classes: int | None = None,
    denoise: Callable[..., Tensor] | None = None,
    labels: Tensor | None = None,
    batch_size: int = 256,
    block: int = 500,
) -> Certified:
    """Certify images by CERTIFY (Cohen et al. 2019): each certificate is false with probability at most ``alpha``.

    A certificate (class, radius) says: the majority vote of ``classifier`` over Gaussian noise is this class for every
    image closer than the radius in l2 distance, on pixels in [0, 1]. It speaks of this classifier and denoiser alone,
    and is void if

    - ``n`` was chosen, or the call repeated, after votes were seen, or the best of several answers is kept;
    - the noise of (``seed``, ``ids``) was seen before by whoever chose classifier, denoiser or images: leave ``seed``
      out, or take one that was never used;
    - an image was outside [0, 1] or normalised already, or pixels are clipped or rounded after the noise was added;
    - one sample of a batch influences another's votes. ``preflight`` refuses what it can see of that.

    Args:
        classifier: From float32 (B, C, H, W) to logits (B, K), K >= 2; a module in evaluation mode. What it gets is
            images + sigma * noise, not clipped, or what ``denoise`` makes of it.
        images: (N, C, H, W) float32 in [0, 1], on the classifier's device.
        sigma: Standard deviation of the noise, > 0, on pixels in [0, 1].
        n0: Samples an image that select the class, >= 1.
        n: Other samples an image that bound its probability, >= 1; radii stay below
            ``smoothing.bounds.max_radius(n, alpha, sigma)``.
        alpha: Probability with which one image's certificate may be false, in (0, 1).
        seed: Root of the noise, in [0, 2**32). None: a fresh one from the system's randomness.
        ids: (N,) int64 in [0, 2**32), all different: addresses of the images' noise. None: 0 to N - 1.
        num_classes: K. None: as many as the classifier's logits.
        denoise: ``denoise(images, noise, sigma=sigma)`` adds sigma times the standard normal noise and gives what the
            classifier takes, as ``models.denoisers.diffusion.Denoiser.denoise``.
        labels: (N,) int64. With 30 or more, a classifier no better than a constant answer is refused.
        batch_size: Samples at a time, >= 1; halved where the device's memory runs out. Changes no count.
        block: Samples of an image that are counted in one go, >= 1. Changes no count.

    Raises:
        DataError: An image is not in [0, 1], or ``preflight`` refuses the classifier.
        ValueError: An argument is out of its range.
    """
    max_radius(n, alpha, sigma)  # refuses what is out of range before the work, not after it
    count = _counting(classifier, images, ids, sigma, denoise, labels,
                      seed=seed, num_classes=num_classes, batch_size=batch_size, block=block)  # fmt: skip
    selection, estimation = count(SELECTION, n0), count(ESTIMATION, n)
    predict, radius, p_a_lower = certify(selection, estimation, alpha, sigma)
    return Certified(predict, radius, p_a_lower, selection, estimation)


def predict_images(
    classifier: Classify,
    images: Tensor,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    seed: int | None = None,
    ids: Tensor | None = None,
    num_classes: int | None = None,
    denoise: Callable[..., Tensor] | None = None,
    batch_size: int = 256,
) -> NDArray[np.int64]:
    """Predict classes by PREDICT (Cohen et al. 2019): int64 (N,), -1 where it abstains.

    Another class than the smoothed classifier's is returned with probability at most ``alpha`` an image. There is no
    radius: that takes ``certify_images``, whose selection with the same seed sees the same noise. ``n`` samples an
    image, >= 1; all other arguments, and what is raised, are those of ``certify_images``.
    """
    max_radius(n, alpha, sigma)
    count = _counting(classifier, images, ids, sigma, denoise, None,
                      seed=seed, num_classes=num_classes, batch_size=batch_size, block=n)  # fmt: skip
    return predict(count(SELECTION, n), alpha)


def _counting(
    classifier: Classify,
    images: Tensor,
    ids: Tensor | None,
    sigma: float,
    denoise: Callable[..., Tensor] | None,
    labels: Tensor | None,
    *,
    seed: int | None,
    num_classes: int | None,
    batch_size: int,
    block: int,
) -> Callable[[Stream, int], NDArray[np.int64]]:
    """Check the classifier on the images; gives what counts n samples an image of a stream: (N, K + 1)."""
    ids = torch.arange(len(images)) if ids is None else ids
    if min(batch_size, block) < 1:
        raise ValueError(f"batch_size and block must be >= 1, got {batch_size} and {block}")
    check_images(images, ids)
    noisy = partial(_add if denoise is None else denoise, sigma=sigma)
    sampled = partial(
        sample_votes, images, ids, noisy, [classifier], seed=secrets.randbits(32) if seed is None else seed,
        num_classes=preflight(classifier, images, noisy, num_classes=num_classes, labels=labels, sigma=sigma),
        batch_size=batch_size,
    )  # fmt: skip

    def count(stream: Stream, n: int) -> NDArray[np.int64]:
        if n < 1:
            raise ValueError(f"n0 and n must be >= 1, got {n}")
        sizes = {start: min(block, n - start) for start in range(0, n, block)}
        votes = [sampled(stream=stream, start=start, size=size)[0].cpu().numpy() for start, size in sizes.items()]
        return _merged(ids.cpu().numpy(), sizes, votes).totals(ids.cpu().numpy(), n)

    return count


def _add(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    return images + sigma * noise


def _merged(ids: NDArray[np.int64], sizes: dict[int, int], votes: list[NDArray[np.int64]]) -> Blocks:
    """Blocks sorted by image and start, as ``totals`` wants them; ``votes`` (N, K + 1) of each start."""
    order = np.argsort(ids)
    index = [(image, start, size) for image in ids[order].tolist() for start, size in sizes.items()]
    table = np.stack(votes, axis=1)[order]
    return Blocks(np.array(index, np.int64), table.reshape(-1, table.shape[-1]))
