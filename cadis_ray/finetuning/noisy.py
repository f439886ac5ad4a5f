"""Noisy images, made when they are asked for: what recipes without a denoiser train and count on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cadis_ray.base_classifier import add_noise
from cadis_ray.smoothing.noise import Stream, gaussian


@dataclass(frozen=True)
class Noisy:
    """2 (x + sigma noise) - 1 of N images, indexed as the denoised pool: ``noisy[samples, rows]`` is (S, R, C, H, W).

    ``ids`` (N,) int64 address the noise of ``stream``, samples ``first`` .. ``first + samples - 1``; ``read(rows)``
    gives the images in [0, 1]. float32 and not clamped. Noise on the same addresses is that of the denoised pool.
    """

    read: Callable[[Tensor], Tensor]
    ids: Tensor
    sigma: float
    seed: int
    stream: Stream
    first: int
    samples: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.samples, len(self.ids)

    def __getitem__(self, index: tuple[slice, np.ndarray]) -> np.ndarray:
        draws, rows = range(self.samples)[index[0]], torch.as_tensor(index[1])
        images, ids = self.read(rows), self.ids[rows]
        drawn = [
            gaussian(self.seed, self.stream, ids, torch.full_like(ids, self.first + draw), images.shape[1:])
            for draw in draws
        ]
        return add_noise(images, torch.stack(drawn), self.sigma).numpy()
