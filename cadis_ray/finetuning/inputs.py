"""Denoised training images of one epoch: all in memory, in files, or made when they are asked for.

Whatever holds them is read as ``images[:M, rows]`` -> (M, B, C, H, W) float16 in [-1, 1]; a NumPy array (M, N, C, H, W)
will do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cadis_ray.data import Split
from cadis_ray.data.augmentation import Augmentation
from cadis_ray.finetuning.base_classifier import load_view
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.smoothing.noise import Stream, add_noise, gaussian

EPOCH_BITS = 16  # a training sample is epoch * 2**16 + index of the noise


class Denoised(Protocol):
    """Denoised images of an epoch, read by the first M noises and rows (B,)."""

    def __getitem__(self, key: tuple[slice, np.ndarray], /) -> np.ndarray | Tensor: ...


@dataclass(frozen=True)
class Filed:
    """Of each noise one file, an array (N, C, H, W) float16, of which only the rows asked for are read."""

    files: Sequence[Path]

    def __getitem__(self, key: tuple[slice, np.ndarray], /) -> np.ndarray:
        noises, rows = key
        return np.stack([np.load(file, mmap_mode="r")[rows] for file in self.files[noises]])


@dataclass(frozen=True)
class Denoising:
    """The frozen denoiser on a split's images, on ``device``: what fills the pool, and what does without it."""

    denoise: Callable[[Tensor, Tensor], Tensor]
    seed: int
    augmentation: Augmentation
    device: str

    @torch.inference_mode()
    def draw(self, split: Split, rows: Tensor, stream: Stream, sample: int) -> Tensor:
        """Rows (B,) of the split under one draw of noise: (B, C, H, W) float16 in [-1, 1], on the device.

        The images of the training stream are augmented, as those of the sample's epoch.
        """
        epoch = sample >> EPOCH_BITS
        augmented = stream == Stream.TRAINING
        seen = split.augmented(rows, epoch, self.seed, self.augmentation) if augmented else split.read(rows)
        images, samples = seen.to(self.device), torch.full_like(rows, sample)
        noise = gaussian(self.seed, stream, split.ids[rows], samples, images.shape[1:], self.device)
        return self.denoise(images, noise).half()


@dataclass(frozen=True)
class Fresh:
    """Denoised when they are asked for, with the noise and the rounding that the pool has."""

    denoising: Denoising
    train: Split
    epoch: int

    def __getitem__(self, key: tuple[slice, np.ndarray], /) -> Tensor:
        noises, rows = key[0].stop, torch.as_tensor(key[1])
        first = self.epoch << EPOCH_BITS
        drawn = [self.denoising.draw(self.train, rows, Stream.TRAINING, first + index) for index in range(noises)]
        return torch.stack(drawn)


def make_denoising(configuration: Configuration, seed: int, device: str) -> Denoising:
    """With the configuration's denoiser, loaded. Raises as ``load_denoiser``."""
    denoise = load_view(configuration, "denoised", device)
    return Denoising(denoise, seed, configuration.data.augmentation, device)


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
