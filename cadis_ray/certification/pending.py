"""What is still to count, shared out; and what has been counted, on its way to disk."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Self

import numpy as np

from cadis_ray.certification.counting import Item
from cadis_ray.certification.request import Request, Sources, Votes
from cadis_ray.smoothing.counts import NO_BLOCKS, Blocks, CountsStore, Source
from cadis_ray.smoothing.noise import Stream

IMAGES_PER_ITEM = 8
BLOCK = 500
MOST_ITEMS = 4096  # Ray Data keeps a record of each
COMMIT_SECONDS = 2.0


class Arrivals:
    """Blocks on their way to ``store``: those of a moment go into one file, lest there be one for each of a million.

    Leaving commits what is left, whatever the reason.
    """

    def __init__(self, store: CountsStore) -> None:
        self.store, self.since = store, time.monotonic()
        self.held: dict[Source, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)

    def add(self, source: Source, index: np.ndarray, votes: np.ndarray) -> None:
        if len(index):
            self.held[source].append((index, votes))
        if time.monotonic() - self.since > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        while self.held:
            source, parts = self.held.popitem()
            index, votes = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            self.store.commit(source, Blocks(index, votes))
        self.since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.commit()


def pending_blocks(
    request: Request, sources: Mapping[str, Sources], stored: Mapping[Source, Blocks], ids: np.ndarray
) -> Iterator[Item]:
    """Where n is fixed, (images, samples) is shared out: a few images, blocks in a row, the models that lack them."""
    groups = _lacking(request, sources, stored, ids)
    blocks = sum(-(-len(rows) // IMAGES_PER_ITEM) * -(-size // BLOCK) for (_, _, size, _), rows in groups.items())
    span = BLOCK * -(-blocks // MOST_ITEMS)  # an item's blocks leave its actor one by one
    for (stream, low, whole, names), rows in groups.items():
        for first in range(0, len(rows), IMAGES_PER_ITEM):
            part = rows[first : first + IMAGES_PER_ITEM]
            for start in range(low, low + whole, span):
                size = min(span, low + whole - start)
                yield {
                    "stream": int(stream), "start": start, "size": size, "block": BLOCK, "models": list(names),
                    "rows": part, "samples": len(part) * size,
                }  # fmt: skip


def _lacking(
    request: Request, sources: Mapping[str, Sources], stored: Mapping[Source, Blocks], ids: np.ndarray
) -> dict[tuple[Stream, int, int, tuple[str, ...]], list[int]]:
    """Rows of the images, by stream, start and size of what the same models lack of them."""
    row_of = {image: row for row, image in enumerate(ids.tolist())}
    found = defaultdict(list)
    for stream, n in request.mode.most(request.base.certification).items():
        gaps: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for name, own in sources.items():
            for image, start, size in stored.get(own[stream], NO_BLOCKS).missing(ids, n, n).tolist():
                gaps[row_of[image]].append((start, start + size, name))
        for row, lacking in gaps.items():
            for low, high in pairwise(sorted({edge for *edges, _ in lacking for edge in edges})):
                if names := tuple(name for start, end, name in lacking if start <= low and high <= end):
                    found[stream, low, high - low, names].append(row)
    return found


def pending_images(request: Request, votes: Mapping[str, Votes], lacking: Mapping[str, np.ndarray]) -> Iterator[Item]:
    """Where n depends on the votes, images are shared out: an actor goes on with one until it is done."""
    most = request.mode.most(request.base.certification)
    undone = np.flatnonzero(np.any(list(lacking.values()), axis=0))
    for first in range(0, len(undone), IMAGES_PER_ITEM):
        rows = undone[first : first + IMAGES_PER_ITEM]
        have = {stream.name: np.stack([own[stream][rows] for own in votes.values()]) for stream in most}
        drawn = sum(int(table.sum(axis=2).max(axis=0).sum()) for table in have.values())
        yield {
            "models": list(votes), "rows": rows, "votes": have, "samples": len(rows) * sum(most.values()) - drawn,
        }  # fmt: skip
