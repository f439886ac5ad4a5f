"""Counts on disk: append-only files of blocks, merged as a set.

A block holds the votes of samples [start, start + size) of one image. Its key is (source, image, start,
size). A repeated key must repeat its votes: a block counted twice by a retry is one block, and two answers
are an error, never a sum.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cadis_ray.errors import IntegrityError
from cadis_ray.storage.files import write_atomically

SUFFIX = ".counts"
LIMIT = 2**32  # of image, start + size and votes: the noise's address and the file's uint32
IMAGE, START, SIZE = 0, 1, 2

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Whose votes: hashes of classifier, denoiser and data, and the noise's sigma, root seed and stream."""

    checkpoint: str
    denoiser: str
    data: str
    sigma: float
    seed: int
    stream: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of one source: ``index`` (M, 3) of image, start, size; ``votes`` (M, K + 1), summing to size.

    Those from ``CountsStore.load`` are sorted by image and start and do not overlap; the queries rely on it.
    A query's ``n`` is one number or one per image; a certificate needs it fixed before its samples were seen.
    """

    index: NDArray[np.integer]
    votes: NDArray[np.integer]

    def missing(self, images: ArrayLike, n: ArrayLike, size: int) -> Integers:
        """The blocks (M, 3) still to count for samples [0, n) of each image, none larger than ``size``."""
        images, n, first, last = self._rows(images, n)
        gaps: list[tuple[int, int, int]] = []
        for image, end, a, b in zip(images.tolist(), n.tolist(), first, last, strict=True):
            starts = [*self.index[a:b, START].tolist(), end]
            ends = [0, *self.index[a:b, [START, SIZE]].sum(axis=1).tolist()]
            for low, high in zip(ends, starts, strict=True):
                gaps += [(image, start, min(size, high - start)) for start in range(low, high, size)]
        return np.array(gaps, np.int64).reshape(-1, 3)

    def complete(self, images: ArrayLike, n: ArrayLike) -> NDArray[np.bool_]:
        """Per image (N,): do its blocks within [0, n) hold exactly n samples?"""
        _, n, first, last = self._rows(images, n)
        samples = np.append(0, np.cumsum(self.index[:, SIZE], dtype=np.int64))
        return samples[last] - samples[first] == n

    def totals(self, images: ArrayLike, n: ArrayLike) -> Integers:
        """Votes (N, K + 1) of samples [0, n) of each image; IntegrityError if one is incomplete."""
        complete = self.complete(images, n)
        if not complete.all():
            image = int(np.asarray(images)[~complete][0])
            raise IntegrityError(f"{(~complete).sum()} of {len(complete)} images are incomplete, the first is {image}")
        _, _, first, last = self._rows(images, n)
        rows = [self.votes[a:b].sum(axis=0, dtype=np.int64) for a, b in zip(first, last, strict=True)]
        return np.array(rows, np.int64).reshape(len(rows), self.votes.shape[1])

    def prefix(self, images: ArrayLike, n: ArrayLike, columns: int) -> Integers:
        """Votes (N, columns) of each image's samples from 0 on without a gap, at most n: their sum is how many."""
        images, n, first, last = self._rows(images, n)
        votes = np.zeros((len(images), columns), np.int64)
        for row, (a, b) in enumerate(zip(first, last, strict=True)):
            start, size = self.index[a:b, START].astype(np.int64), self.index[a:b, SIZE].astype(np.int64)
            gapless = a + int((start == np.append(0, np.cumsum(size))[:-1]).cumprod().sum())
            votes[row] = self.votes[a:gapless].sum(axis=0, dtype=np.int64) if gapless > a else 0
        return votes

    def _rows(self, images: ArrayLike, n: ArrayLike) -> tuple[Integers, Integers, Integers, Integers]:
        """(images, n, first, last): each image's blocks that start below n are rows [first, last)."""
        images = np.asarray(images, np.int64)
        n = np.broadcast_to(np.asarray(n, np.int64), images.shape)
        if len(images) and not (images.min() >= 0 and images.max() < LIMIT and n.min() >= 1 and n.max() < LIMIT):
            raise ValueError("images must be in [0, 2**32) and n in (0, 2**32)")
        address = _address(self.index[:, IMAGE], self.index[:, START])
        first = np.searchsorted(address, _address(images, np.zeros_like(n)))
        last = np.searchsorted(address, _address(images, n))
        if len(address):
            final = self.index[np.maximum(last - 1, 0)].astype(np.int64)
            cut = (last > first) & (final[:, START] + final[:, SIZE] > n)
            if cut.any():
                raise ValueError(f"n={n[cut][0]} cuts the block {final[cut][0].tolist()} (image, start, size) in two")
        return images, n, first, last


NO_BLOCKS = Blocks(np.empty((0, 3), np.int64), np.empty((0, 0), np.int64))


class CountsStore:
    """A folder of block files, each named by the SHA-256 of its content."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def commit(self, source: Source, blocks: Blocks) -> Path:
        """Write blocks durably and atomically; committing the same ones again changes nothing.

        ValueError if a row of votes does not sum to its block's size, IntegrityError if blocks overlap.
        """
        _check(blocks)
        blocks = _merge([("these blocks", blocks)])
        content = io.BytesIO()
        content.write(json.dumps(asdict(source)).encode() + b"\n")
        np.save(content, blocks.index.astype(np.uint32), allow_pickle=False)
        np.save(content, blocks.votes.astype(np.uint32), allow_pickle=False)
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / (hashlib.sha256(content.getbuffer()).hexdigest() + SUFFIX)
        with write_atomically(path) as file:
            file.write(content.getbuffer())
        return path

    def load(self) -> dict[Source, Blocks]:
        """All blocks by source.

        IntegrityError, naming the file, if it is damaged, repeats a key with other votes, or shares samples.
        """
        files: dict[Source, list[tuple[str, Blocks]]] = {}
        for path in sorted(self.root.glob("*" + SUFFIX)):
            source, blocks = _read(path)
            files.setdefault(source, []).append((path.name, blocks))
        return {source: _merge(parts) for source, parts in files.items()}


def _address(images: NDArray[np.integer], starts: NDArray[np.integer]) -> NDArray[np.uint64]:
    return images.astype(np.uint64) << np.uint64(32) | starts.astype(np.uint64)


def _read(path: Path) -> tuple[Source, Blocks]:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise IntegrityError(f"{path}: damaged, its content does not have the checksum of its name")
    file = io.BytesIO(content)
    try:
        source = Source(**json.loads(file.readline()))
        blocks = Blocks(np.load(file, allow_pickle=False), np.load(file, allow_pickle=False))
        _check(blocks)
    except (ValueError, TypeError, EOFError) as error:
        raise IntegrityError(f"{path}: not a file of blocks: {error}") from error
    return source, blocks


def _check(blocks: Blocks) -> None:
    index, votes = blocks.index, blocks.votes
    if not (np.issubdtype(index.dtype, np.integer) and np.issubdtype(votes.dtype, np.integer)):
        raise ValueError(f"index and votes must hold integers, got {index.dtype} and {votes.dtype}")
    if index.ndim != 2 or index.shape[1] != 3 or votes.ndim != 2 or len(index) != len(votes) or votes.shape[1] < 2:
        raise ValueError(f"index must be (M, 3) and votes (M, K + 1), got {index.shape} and {votes.shape}")
    index = index.astype(np.int64)
    end = index[:, START] + index[:, SIZE]
    wrong = (index < 0).any(axis=1) | (index[:, IMAGE] >= LIMIT) | (index[:, SIZE] < 1) | (end >= LIMIT)
    wrong |= (votes < 0).any(axis=1) | (votes.sum(axis=1, dtype=np.int64) != index[:, SIZE])
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            "a block must lie in [0, 2**32) and its votes sum to its size, but got "
            f"(image, start, size) {index[row].tolist()} with votes {votes[row].tolist()}"
        )


def _merge(parts: list[tuple[str, Blocks]]) -> Blocks:
    """The union of the blocks as a set, sorted by image and start."""
    if len(classes := {blocks.votes.shape[1] for _, blocks in parts}) > 1:
        raise IntegrityError(f"{parts[0][0]} and others of its source disagree in classes: {sorted(classes)}")
    index = np.concatenate([blocks.index for _, blocks in parts]).astype(np.int64)
    votes = np.concatenate([blocks.votes for _, blocks in parts])
    file = np.repeat(np.arange(len(parts)), [len(blocks.index) for _, blocks in parts])
    order = np.lexsort((index[:, START], index[:, IMAGE]))
    index, votes, file = index[order], votes[order], file[order]
    before, after = index[:-1], index[1:]
    overlap = (before[:, IMAGE] == after[:, IMAGE]) & (after[:, START] < before[:, START] + before[:, SIZE])
    repeated = overlap & (before == after).all(axis=1)
    equal = repeated & (votes[:-1] == votes[1:]).all(axis=1)
    if (overlap & ~equal).any():
        row = int((overlap & ~equal).argmax())
        what = "the same block with other votes" if repeated[row] else "blocks that share samples"
        pair = " and ".join(str(rows) for rows in index[row : row + 2].tolist())
        raise IntegrityError(
            f"{parts[file[row + 1]][0]} and {parts[file[row]][0]} hold {what}: (image, start, size) {pair}"
        )
    kept = np.append(True, ~equal) if len(index) else np.ones(0, bool)
    return Blocks(index[kept], votes[kept])
