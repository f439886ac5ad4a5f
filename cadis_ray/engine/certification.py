"""Certificates, and estimates by their side: Ray Data actors count votes on test images."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Self

import numpy as np

from cadis_ray.certification import Request, Sources, Votes, certified_images, counted_images, sources_of, votes_of
from cadis_ray.engine.actors import on_actors
from cadis_ray.engine.counting import Count, Item
from cadis_ray.errors import IntegrityError
from cadis_ray.interface.progress import Progress
from cadis_ray.results import Certificates
from cadis_ray.search_sections import Resources
from cadis_ray.smoothing.counts import NO_BLOCKS, Blocks, CountsStore, Source
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.smoothing.noise import Stream
from cadis_ray.summary import certificates_from, estimate_from

IMAGES_PER_ITEM = 8
BLOCK = 500
MOST_ITEMS = 4096  # Ray Data keeps a record of each
COMMIT_SECONDS = 2.0


def certify_models(
    request: Request, store: CountsStore, progress: Progress, resources: Resources
) -> dict[str, Certificates]:
    """Certificates of every model on the same test images under the same noise, in the request's mode.

    A certificate's seconds are those of this process's actors: what an earlier one counted is not in them.
    """
    base, (test, _) = request.base, certified_images(request.base)
    ids, labels, seconds = test.ids.numpy(), test.labels.numpy(), np.zeros(len(test.ids))
    votes = count_models(request, store, progress, resources, seconds)
    return {name: certificates_from(name, base, ids, labels, own, seconds) for name, own in votes.items()}


def estimate_models(
    request: Request, store: CountsStore, progress: Progress, resources: Resources
) -> dict[str, Estimate]:
    """What certification would find, from few samples on every image: no certificate."""
    labels = counted_images(request)[0].labels.numpy()
    votes = count_models(request, store, progress, resources, np.zeros(len(labels)))
    (stream,) = request.mode.most(request.base.certification)
    return {name: estimate_from(request.base, labels, own[stream]) for name, own in votes.items()}


def count_models(
    request: Request, store: CountsStore, progress: Progress, resources: Resources, seconds: np.ndarray
) -> dict[str, Votes]:
    """The votes of every model on the request's images, as many as its mode wants.

    Counts what ``store`` does not hold yet and commits every block as it arrives, adding what it took to each image's
    ``seconds`` (N,). IntegrityError where an image ends incomplete.
    """
    base, (images, num_classes) = request.base, counted_images(request)
    settings, labels, ids = base.certification, images.labels.numpy(), images.ids.numpy()
    mode, sources = request.mode, sources_of(request, images)

    def state() -> tuple[dict[str, Votes], dict[str, np.ndarray]]:
        """The votes there are, and which images (N,) have fewer than their mode wants."""
        stored = store.load()
        votes = {name: votes_of(request, stored, own, ids, num_classes + 1) for name, own in sources.items()}
        lacking = {}
        for name, own in votes.items():
            wanted = mode.wanted(settings, base.sigma, labels, own)
            lacking[name] = np.any([own[stream].sum(axis=1) < n for stream, n in wanted.items()], axis=0)
        return votes, lacking

    if settings.mode == "protocol" and not request.recount:
        items = list(_blocks(request, sources, store.load(), ids))
    else:
        items = list(_rounds(request, *state()))
    total = len(ids) * sum(mode.most(settings).values())
    stage = "finalists" if request.recount else "certification"
    progress.stage(stage, total, total - sum(item["samples"] for item in items))
    arguments = {"request": request, "batch_size": resources.batch_size}
    with _Arrivals(store) as arrivals:
        for block in on_actors(items, Count, arguments, resources):
            rows, stream = np.asarray(block["rows"]), Stream(block["stream"])
            index = np.array([(ids[row], block["start"], block["size"]) for row in rows])
            for name, votes, counted in zip(block["models"], block["votes"], block["counted"], strict=True):
                arrivals.add(sources[name][stream], index[counted], votes[counted])
            seconds[rows] += block["seconds"] / len(rows)
            progress.advance(int(block["samples"]))
    votes, lacking = state()
    for name, rows in lacking.items():
        if rows.any():
            raise IntegrityError(f"{name}: {rows.sum()} of {len(ids)} images are incomplete, the first is "
                                 f"{ids[rows][0]}")  # fmt: skip
    return votes


class _Arrivals:
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


def _blocks(
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


def _rounds(request: Request, votes: Mapping[str, Votes], lacking: Mapping[str, np.ndarray]) -> Iterator[Item]:
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
