"""Images in [0, 1] with integer labels, in named, seeded splits."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from cadis_ray import config
from cadis_ray.data.digits import read_digits


@dataclass(frozen=True)
class Split:
    """``images`` (N, C, H, W) float32 in [0, 1]; ``labels`` (N,) int64; ``ids`` (N,) int64, places in the data set."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor

    def first(self, count: int) -> "Split":
        """The first ``count`` images of the seeded order; ValueError when there are fewer."""
        if count > len(self.ids):
            raise ValueError(f"{count} images asked for, the split has {len(self.ids)}")
        return Split(self.images[:count], self.labels[:count], self.ids[:count])

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W), float32 in [0, 1], of rows (B,)."""
        return self.images[rows]

    def digest(self) -> str:
        """SHA-256 of ids, labels and images."""
        found = hashlib.sha256()
        for part in (self.ids, self.labels, self.images):
            found.update(part.numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class DataSet:
    """Three splits without a common image: the search sees ``train`` and ``validation``, the certificate ``test``."""

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        ids = torch.cat([self.train.ids, self.validation.ids, self.test.ids])
        assert len(ids.unique()) == len(ids), "an image lies in two splits: the certificate would not be fresh"


def load(settings: config.Data) -> DataSet:
    """Read the data set and split it: the order is a permutation by ``settings.seed``, test first, then validation."""
    images, labels = read_digits()
    order = np.random.Generator(np.random.Philox(settings.seed)).permutation(len(images))
    ends = np.cumsum([settings.test, settings.validation])
    parts = [torch.from_numpy(np.sort(part)) for part in np.split(order, ends)]
    test, validation, train = (Split(images[ids], labels[ids], ids) for ids in parts)
    return DataSet("digits", 10, train, validation, test)
