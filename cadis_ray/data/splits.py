"""Training, validation and test images of a study, as tensors."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cadis_ray.data.augmentation import Augmentation, augment
from cadis_ray.data.collection import read_collection
from cadis_ray.data.digits import read_digits
from cadis_ray.data.images import Images, Part
from cadis_ray.data.settings import Data
from cadis_ray.data.subsets import test_rows, training_rows


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of ``source``: ``rows`` (N,) int64 say which, ``labels`` (N,) int64, ``ids`` (N,) int64, unique in
    the data set. The order is sorted where it is trained on, otherwise seeded: any first ones are a fair subset."""

    source: Images
    rows: Tensor
    labels: Tensor
    ids: Tensor

    def first(self, count: int) -> "Split":
        """The first ``count`` images; ValueError when there are fewer."""
        if count > len(self.ids):
            raise ValueError(f"{count} images asked for, the split has {len(self.ids)}")
        return Split(self.source, self.rows[:count], self.labels[:count], self.ids[:count])

    def read(self, rows: Tensor | np.ndarray) -> Tensor:
        """Images (B, C, H, W), float32 in [0, 1], of rows (B,) of the split; DataError names one that is broken."""
        return _unit(self.source.read(self._places(rows), torch.get_num_threads()))

    def augmented(self, rows: Tensor | np.ndarray, epoch: int, seed: int, kind: Augmentation) -> Tensor:
        """As ``read``, augmented: a function of (seed, epoch, image id) and nothing else."""
        if kind == "none":
            return self.read(rows)
        ids, shape = self.ids[torch.as_tensor(rows)], self.source.shape
        if kind != "imagenet":
            return augment(self.read(rows), ids, epoch, seed, kind)
        whole = self.source.whole(self._places(rows), torch.get_num_threads())
        return augment([_unit(image) for image in whole], ids, epoch, seed, kind, shape[1:])

    @property
    def images(self) -> Tensor:
        """All images at once, read anew at every use: for sets that fit into memory."""
        return self.read(torch.arange(len(self.ids)))

    def digest(self) -> str:
        """SHA-256 of ids, labels and images, of encoded ones their bytes and how they are resized."""
        found = hashlib.sha256()
        for part in (self.ids, self.labels):
            found.update(part.numpy().tobytes())
        for piece in self.source.content(self.rows.numpy()):
            found.update(piece)
        return found.hexdigest()

    def _places(self, rows: Tensor | np.ndarray) -> np.ndarray:
        return self.rows[torch.as_tensor(rows)].numpy()


@dataclass(frozen=True, eq=False)
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


def load(settings: Data) -> DataSet:
    """The data set and its splits, a function of ``settings`` and the files.

    Validation images are a seeded slice of the training images, test images the data set's own; of digits, which has
    no test images of its own, both are. Ids are places in the data set's own order, test images after all training
    images, whatever is used of them. Raises DataError for bad data, UsageError where there are too few images.
    """
    if settings.name == "digits":
        return _digits(settings)
    found = read_collection(settings)
    total, classes = len(found.train.labels), len(found.classes)
    validation, train = training_rows(total, settings.validation, settings.train, settings.seed)
    test = test_rows(settings.test_subset, found.test.labels, settings.test, classes, settings.seed)
    splits = (_split(found.train, train), _split(found.train, validation), _split(found.test, test, total))
    return DataSet(settings.name, classes, *splits)


def _digits(settings: Data) -> DataSet:
    digits = read_digits()
    order = np.random.Generator(np.random.Philox(settings.seed)).permutation(len(digits.labels))
    test, validation, rest = np.split(order, np.cumsum([settings.test, settings.validation]))
    splits = (_split(digits, np.sort(rows)) for rows in (rest[: settings.train], validation, test))
    return DataSet("digits", 10, *splits)


def _split(part: Part, rows: np.ndarray, first_id: int = 0) -> Split:
    places = torch.from_numpy(rows)
    return Split(part.images, places, torch.from_numpy(part.labels[rows]), places + first_id)


def _unit(pixels: np.ndarray) -> Tensor:
    images = torch.from_numpy(pixels)
    return images.float().div_(255) if images.dtype == torch.uint8 else images
