"""CERTIFY in this process: images and a classifier in, certificates out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cadis_ray.smoothing.bounds import certify
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
    classify: Classify,
    images: Tensor,
    ids: Tensor,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    num_classes: int,
    denoise: Callable[..., Tensor] | None = None,
    labels: Tensor | None = None,
    batch_size: int = 256,
    block: int = 500,
) -> Certified:
    """Certificates of the smoothed classifier by CERTIFY (Cohen et al. 2019): each fails with probability <= alpha.

    ``images`` (N, C, H, W) float32 in [0, 1], on the device to compute on; ``ids`` (N,) int64, all different, address
    their noise; ``sigma`` is in [0, 1] pixels. ``denoise(images, noise, sigma=sigma)`` adds sigma times the noise and
    gives what ``classify`` takes, as ``models.denoisers.Denoiser.denoise``; None: classify gets images + sigma * noise.
    n0 samples select the class, n others bound its probability, counted in blocks of ``block``; counts depend neither
    on that nor on ``batch_size``. With ``labels`` (N,) a model that is no better than a constant answer is refused.

    Raises DataError where ``check_images`` or ``preflight`` refuses, ValueError for arguments out of their ranges.
    A certificate speaks of this classify and this denoise. It is void if one sample influences another's answer, if
    the noise of (seed, ids) was seen when either was chosen, and of several answers if the best one is kept.
    """
    check_images(images, ids)
    noisy = partial(_add if denoise is None else denoise, sigma=sigma)
    preflight(classify, images, noisy, num_classes=num_classes, labels=labels, sigma=sigma)

    def counts(stream: Stream, n: int) -> NDArray[np.int64]:
        sampled = partial(
            sample_votes, images, ids, noisy, [classify], num_classes=num_classes, seed=seed, stream=stream,
            batch_size=batch_size,
        )  # fmt: skip
        sizes = {start: min(block, n - start) for start in range(0, n, block)}
        votes = [sampled(start=start, size=size)[0].cpu().numpy() for start, size in sizes.items()]
        return _merged(ids.cpu().numpy(), sizes, votes).totals(ids.cpu().numpy(), n)

    selection, estimation = counts(SELECTION, n0), counts(ESTIMATION, n)
    predict, radius, p_a_lower = certify(selection, estimation, alpha, sigma)
    return Certified(predict, radius, p_a_lower, selection, estimation)


def _add(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    return images + sigma * noise


def _merged(ids: NDArray[np.int64], sizes: dict[int, int], votes: list[NDArray[np.int64]]) -> Blocks:
    """Blocks sorted by image and start, as ``totals`` wants them; ``votes`` (N, K + 1) of each start."""
    order = np.argsort(ids)
    index = [(image, start, size) for image in ids[order].tolist() for start, size in sizes.items()]
    table = np.stack(votes, axis=1)[order]
    return Blocks(np.array(index, np.int64), table.reshape(-1, table.shape[-1]))
