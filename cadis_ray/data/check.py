"""What lies in a data set's folder, and what of it is broken. Without torch."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from cadis_ray.data.cifar10 import TEST, TRAIN, UNPACKED
from cadis_ray.data.collection import read_collection
from cadis_ray.data.decode import open_image
from cadis_ray.data.images import CHUNK, Blobs, Collection, Encoded
from cadis_ray.data.settings import Data
from cadis_ray.data.storage import files, open_root
from cadis_ray.errors import DataError
from cadis_ray.interface.progress import Progress

SHOWN = 10


@dataclass
class Found:
    """A data set: the name by which a study reads it, how many of its images have which size (height, width) and
    Pillow mode, and what is ``broken``."""

    layout: str
    collection: Collection
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report, without what is broken."""
        collection = self.collection
        train, test = (np.bincount(part.labels, minlength=len(collection.classes))
                       for part in (collection.train, collection.test))  # fmt: skip
        yield f"{self.layout}: {len(train)} classes, {train.sum()} training and {test.sum()} test images"
        width = max(map(len, (*collection.classes, "class")))
        yield f"{'class':{width}}  {'train':>8} {'test':>8}"
        for name, *counts in zip(collection.classes, train, test, strict=True):
            yield f"{name:{width}}  {counts[0]:8} {counts[1]:8}"
        common = [f"{height}x{width} ({count})" for (height, width), count in self.sizes.most_common(SHOWN)]
        yield f"height x width: {', '.join(common)}" + (", ..." if len(self.sizes) > SHOWN else "")
        if len(self.sizes) > 1:
            yield f"{len(self.sizes)} sizes: a study needs data.image_size"
        if other := [f"{mode} ({count})" for mode, count in self.modes.most_common() if mode != "RGB"]:
            yield f"not RGB, but read as RGB: {', '.join(other)}"


def look_at(path: str, progress: Progress) -> Found:
    """Decode every image of the data set at ``path``, a folder or URI.

    Raises DataError where its layout or its labels are wrong; images that cannot be decoded are in ``broken``, one
    a line with the file's name.
    """
    found = Found(layout := _layout(path), read_collection(Data(name=layout, path=path)))
    for name, part in (("training images", found.collection.train), ("test images", found.collection.test)):
        if isinstance(part.images, Encoded):
            _decode_all(name, part.images.blobs, len(part.labels), found, progress)
        else:
            found.sizes[part.images.shape[1:]] += len(part.labels)
    return found


def _layout(path: str) -> Literal["cifar10", "image_folder", "parquet"]:
    root = open_root(path)
    batches = {*TRAIN, *TEST, *(f"{name}.bin" for name in TRAIN + TEST)}
    if any(batches & {*files(root, folder)} for folder in UNPACKED):
        return "cifar10"
    return "parquet" if any(name.endswith(".parquet") for name in files(root)) else "image_folder"


def _decode_all(name: str, blobs: Blobs, count: int, found: Found, progress: Progress) -> None:
    progress.stage(name, count)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, count, CHUNK):
            rows = range(start, min(start + CHUNK, count))
            for seen in pool.map(_seen, _read(blobs, rows), (f"{blobs.name(row)} (image {row})" for row in rows)):
                if isinstance(seen, str):
                    found.broken.append(seen)
                else:
                    mode, size = seen
                    found.modes[mode] += 1
                    found.sizes[size] += 1
            progress.advance(len(rows))


def _read(blobs: Blobs, rows: Sequence[int]) -> list[bytes | DataError]:
    try:
        return list(blobs.get(rows))
    except DataError as error:
        return [error] if len(rows) == 1 else list(chain.from_iterable(_read(blobs, [row]) for row in rows))


def _seen(blob: bytes | DataError, where: str) -> tuple[str, tuple[int, int]] | str:
    """(mode, (height, width)) of an image, or what is wrong with it."""
    if isinstance(blob, DataError):
        return str(blob) if str(blob).startswith(where) else f"{where}: {blob}"
    try:
        image = open_image(blob, where)
    except DataError as error:
        return str(error)
    return image.mode, (image.height, image.width)
