"""Images of a data set in its own order, in memory or decoded when they are read. Without torch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import numpy as np

from cadis_ray.data.decode import decode
from cadis_ray.errors import DataError

CHUNK = 256  # images hashed at a time: 30 MB of ImageNet's


class Images(Protocol):
    """N images, addressed by row in the data set's own order."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what ``read`` gives."""
        ...

    def read(self, rows: np.ndarray, threads: int = 1) -> np.ndarray:
        """Images (B, C, H, W) of rows (B,): uint8, or float32 in [0, 1]."""
        ...

    def whole(self, rows: np.ndarray, threads: int = 1) -> Sequence[np.ndarray]:
        """The images (C, h, w) of rows (B,) before they are resized and cropped."""
        ...

    def content(self, rows: np.ndarray) -> Iterator[bytes]:
        """What a digest of these rows covers, in pieces."""
        ...


class Blobs(Protocol):
    """Encoded images by row."""

    def name(self, row: int) -> str:
        """Where an image is, for messages."""
        ...

    def get(self, rows: Sequence[int]) -> list[bytes]: ...


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a data set in its own order: images, and their ``labels`` (N,) int64."""

    images: Images
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Collection:
    """A data set as it lies on disk: its own training and test images. Label k means ``classes[k]``."""

    classes: tuple[str, ...]
    train: Part
    test: Part


class Pixels:
    """Images in memory: ``array`` (N, C, H, W), uint8, or float32 in [0, 1]; DataError names an image outside."""

    def __init__(self, array: np.ndarray) -> None:
        if array.dtype != np.uint8:
            check_range(array)
        self.array = array
        self.shape: tuple[int, int, int] = array.shape[1:]

    def read(self, rows: np.ndarray, threads: int = 1) -> np.ndarray:
        return self.array[rows]

    def whole(self, rows: np.ndarray, threads: int = 1) -> Sequence[np.ndarray]:
        return list(self.array[rows])

    def content(self, rows: np.ndarray) -> Iterator[bytes]:
        for start in range(0, len(rows), CHUNK):
            yield self.array[rows[start : start + CHUNK]].tobytes()


class Encoded:
    """Images decoded to RGB when they are read.

    ``size`` None: as they are, all of the first one's size; otherwise the test transform of ``decode``. Reading
    raises DataError with the name of an image that cannot be decoded or has another size: none is skipped.
    """

    def __init__(self, blobs: Blobs, size: int | None) -> None:
        self.blobs, self.size = blobs, size
        self._shape = (3, size, size) if size else None

    @property
    def shape(self) -> tuple[int, int, int]:
        if self._shape is None:
            self._shape = self.whole(np.array([0]))[0].shape
        return self._shape

    def read(self, rows: np.ndarray, threads: int = 1) -> np.ndarray:
        found = self._decoded(rows, self.size, threads)
        for row, image in zip(rows, found, strict=True):
            if image.shape != self.shape:
                sizes = (f"{height}x{width}" for _, height, width in (image.shape, self.shape))
                raise DataError(f"{self._where(row)}: got {next(sizes)} pixels; need {next(sizes)}, as the first image "
                                "has; for images of many sizes set data.image_size")  # fmt: skip
        return np.stack(found)

    def whole(self, rows: np.ndarray, threads: int = 1) -> Sequence[np.ndarray]:
        return self._decoded(rows, None, threads)

    def content(self, rows: np.ndarray) -> Iterator[bytes]:
        yield f"RGB, image_size {self.size}\n".encode()
        for start in range(0, len(rows), CHUNK):
            for blob in self.blobs.get(rows[start : start + CHUNK].tolist()):
                yield len(blob).to_bytes(8, "little")
                yield blob

    def _decoded(self, rows: np.ndarray, size: int | None, threads: int) -> list[np.ndarray]:
        blobs, names = self.blobs.get(rows.tolist()), [self._where(row) for row in rows]
        if threads == 1:
            return [decode(blob, name, size) for blob, name in zip(blobs, names, strict=True)]
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes and resizes without the interpreter's lock
            return list(pool.map(decode, blobs, names, repeat(size)))

    def _where(self, row: int) -> str:
        return f"{self.blobs.name(int(row))} (image {row})"


def check_range(pixels: np.ndarray, where: str = "") -> None:
    """Raises DataError naming the first image of (N, ...) that has NaN or values outside [0, 1]."""
    flat = pixels.reshape(len(pixels), -1)
    wrong = np.flatnonzero(~((flat >= 0) & (flat <= 1)).all(axis=1))
    if not len(wrong):
        return
    image, row = int(wrong[0]), flat[wrong[0]]
    more = f" ({len(wrong)} such images)" if len(wrong) > 1 else ""
    if missing := int(np.isnan(row).sum()):
        raise DataError(f"{where}image {image}: {missing} NaN values{more}")
    raise DataError(f"{where}image {image}: values outside [0, 1] (min {row.min():.4g}, max {row.max():.4g}): looks "
                    f"already normalised; need raw pixels in [0, 1]{more}")  # fmt: skip
