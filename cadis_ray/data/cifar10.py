"""CIFAR-10 (Krizhevsky 2009) in the three forms people have: Python batches, binary batches, Parquet."""

import io
import pickle
from functools import lru_cache
from typing import Any

import numpy as np
from pyarrow import fs

from cadis_ray.data.images import Collection, Part, Pixels, check_range
from cadis_ray.data.parquet import read_parquet
from cadis_ray.data.storage import Root, files, folders, open_root, read, some
from cadis_ray.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
TRAIN, TEST = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
UNPACKED = ("", "cifar-10-batches-py/", "cifar-10-batches-bin/")  # the archive's own folder may lie between
Arrays = tuple[np.ndarray, np.ndarray]  # images (N, 3, 32, 32) uint8, labels (N,) int64


def read_cifar10(path: str) -> Collection:
    """Training and test images in the data set's own order, from the first form that ``path`` holds.

    Python batches (never executed), binary batches, or Parquet in the Hugging Face layout. Raises DataError naming the
    file, and the image where one is to blame.
    """
    root = open_root(path)
    for folder in UNPACKED:
        there = files(root, folder)
        for suffix, parse in (("", _python_batch), (".bin", _binary_batch)):
            if not any(name + suffix in there for name in TRAIN + TEST):
                continue
            if missing := [name + suffix for name in TRAIN + TEST if name + suffix not in there]:
                raise DataError(f"{folder}{missing[0]}: not there; need all six batches")
            parts = ([parse(root, folder + name + suffix) for name in names] for names in (TRAIN, TEST))
            return Collection(CLASSES, *(_part(batches) for batches in parts))
    shards = [info for info in root.get_file_info(fs.FileSelector("")) if info.extension == "parquet"]
    if not shards:
        found = some([f"{name}/" for name in folders(root)] + files(root)) or "nothing"
        raise DataError(f"need data_batch_1...5 and test_batch, the same with .bin, or train-*.parquet and "
                        f"test-*.parquet; found {found}")  # fmt: skip
    return _from_parquet(path, tuple(sorted((info.path, info.size, info.mtime_ns) for info in shards)))


@lru_cache(maxsize=1)
def _from_parquet(path: str, state: tuple[tuple[str, int, int], ...]) -> Collection:
    """Decoded once a process; ``state`` tells a changed file."""
    found = read_parquet(open_root(path), None)
    if len(found.classes) > len(CLASSES):
        raise DataError(f"{len(found.classes)} classes; CIFAR-10 has 10")
    parts = []
    for part in (found.train, found.test):
        if part.images.shape != SHAPE:
            raise DataError(f"images {part.images.shape}; CIFAR-10 has {SHAPE}; is data.name parquet meant?")
        rows = np.arange(len(part.labels))
        pixels = [part.images.read(rows[start : start + 1000]) for start in range(0, len(rows), 1000)]
        parts.append(Part(Pixels(np.concatenate(pixels)), part.labels))
    return Collection(CLASSES, *parts)


class _Batch(pickle.Unpickler):
    """Gives what the official batches hold, dicts, lists, numbers, texts and uint8 arrays, and calls nothing else.

    Only names written in C: a pickle can set attributes of what it finds, which those do not allow.
    """

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"a pickle with code objects ({module}.{name}); refused")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _python_batch(root: Root, name: str) -> Arrays:
    try:
        batch = _Batch(io.BytesIO(read(root, name)), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise DataError(f"{name}: not a CIFAR-10 Python batch: {error}") from None
    fields = batch if isinstance(batch, dict) else {}
    data, labels = (fields.get(key.encode(), fields.get(key)) for key in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{name}: need data, an array (N, {PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{name}: need labels, a list of whole numbers")
    if data.dtype != np.uint8:
        if data.dtype.kind == "f":
            check_range(data, f"{name} ")
        raise DataError(f"{name}: pixels are {data.dtype}; need uint8 from 0 to 255")
    return _checked(name, data, np.array(labels))


def _binary_batch(root: Root, name: str) -> Arrays:
    content = np.frombuffer(read(root, name), np.uint8)
    if not len(content) or len(content) % (1 + PIXELS):
        raise DataError(f"{name}: {len(content)} bytes; need a multiple of {1 + PIXELS}, a label and an image each")
    records = content.reshape(-1, 1 + PIXELS)
    return _checked(name, records[:, 1:], records[:, 0])


def _checked(name: str, data: np.ndarray, labels: np.ndarray) -> Arrays:
    if len(labels) != len(data):
        raise DataError(f"{name}: {len(data)} images and {len(labels)} labels")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if len(wrong):
        raise DataError(f"{name} image {wrong[0]}: label {labels[wrong[0]]}; need 0...9 ({len(wrong)} such images)")
    return data.reshape(-1, *SHAPE), labels.astype(np.int64)


def _part(batches: list[Arrays]) -> Part:
    images, labels = zip(*batches, strict=True)
    return Part(Pixels(np.concatenate(images)), np.concatenate(labels))
