"""Counting votes in a Ray Data actor."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cadis_ray.certification.request import Request, counted_images
from cadis_ray.errors import DataError
from cadis_ray.finetuning.base_classifier import View, load_base, load_view, view_of
from cadis_ray.models.black_box import BlackBoxModel
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.preflight import preflight
from cadis_ray.smoothing.sampling import SMALLEST, Denoise, fastest_batch, sample_votes

Item = dict[str, Any]
TRIED = 32  # images on which a classifier is tried before it is counted


class Count:
    """One actor: votes of several base classifiers on a few images of the request, denoised once for all that want it.

    An item has ``rows`` (of the images) and ``models`` (names), and either ``size`` samples of ``stream`` from
    ``start`` on, counted in blocks of ``block``, or the votes so far by stream, ``votes`` (F, R, K + 1), of images to
    count until the mode says that they are done; ``samples`` is how many there are at most. Answers are blocks with
    ``votes`` (F, R, K + 1), ``counted`` (F, R), which of them the classifier counted, and ``samples``, how many less
    there are to do.
    """

    def __init__(self, request: Request, batch_size: int | None, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        base = request.base
        self.base, self.seed, self.mode, self.device = base, request.seed, request.mode, device
        self.images, self.num_classes = counted_images(request)
        self.view_of: dict[str, View] = {name: view_of(model.configuration) for name, model in request.models.items()}
        self.views: dict[View, Denoise] = {view: load_view(base, view, device) for view in set(self.view_of.values())}
        self.classifiers = {
            name: load_base(model.configuration, model.checkpoint).to(device) for name, model in request.models.items()
        }
        some = torch.arange(min(TRIED, len(self.images.ids)))
        images, labels = self.images.read(some).to(device), self.images.labels[some]
        judged = None if request.recount else labels  # a finalist that collapsed loses; the others go on
        with self._precision():
            for name, classifier in self.classifiers.items():
                try:
                    view = self.views[self.view_of[name]]
                    preflight(classifier, images, view, num_classes=self.num_classes, labels=judged, sigma=base.sigma)
                except DataError as error:
                    raise DataError(f"{name}: {error}") from None
            # A black box is not asked for what is thrown away.
            timed = [name for name, model in self.classifiers.items() if not isinstance(model, BlackBoxModel)]
            sizes = (
                []
                if batch_size
                else [
                    fastest_batch(images, denoise, [self.classifiers[name] for name in names])
                    for denoise, names in self._by_view(timed)
                ]
            )
            self.batch_size = batch_size or min(sizes, default=SMALLEST)

    def __call__(self, item: Item) -> Iterator[Item]:
        rows, models = np.asarray(item["rows"]), list(item["models"])
        images = self.images.read(torch.as_tensor(rows)).to(self.device)
        if "start" in item:
            everything = np.ones((len(models), len(rows)), bool)
            start, end = int(item["start"]), int(item["start"]) + int(item["size"])
            for first in range(start, end, int(item["block"])):
                size = min(int(item["block"]), end - first)
                answer = self._count(images, rows, models, Stream(item["stream"]), first, size, everything)
                yield answer | {"samples": len(rows) * size}
            return
        votes = {Stream[name]: np.array(table) for name, table in item["votes"].items()}
        left, block = int(item["samples"]), self._next(rows, votes)
        while block:
            stream, *_, counted = block
            kept = counted.any(axis=0)
            answer = self._count(images[torch.as_tensor(kept)], rows[kept], models, *block[:3], counted[:, kept])
            votes[stream][:, kept] += answer["votes"]
            block = self._next(rows, votes)
            done = left if block is None else answer["size"] * int(kept.sum())
            left -= done
            yield answer | {"samples": done}

    def _by_view(self, models: list[str]) -> Iterator[tuple[Denoise, list[str]]]:
        """The models that share a view, each group with what makes it."""
        for view, denoise in sorted(self.views.items()):
            if names := [name for name in models if self.view_of[name] == view]:
                yield denoise, names

    def _precision(self) -> torch.autocast:
        inside = self.base.certification.precision == "bf16"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=inside)

    def _next(self, rows: np.ndarray, votes: dict[Stream, np.ndarray]) -> tuple[Stream, int, int, np.ndarray] | None:
        """The block most behind: stream, start, size, and which classifier (F) wants it of which image (R)."""
        settings, labels = self.base.certification, self.images.labels[torch.as_tensor(rows)].numpy()
        models = range(len(next(iter(votes.values()))))
        wanted = [
            self.mode.wanted(settings, self.base.sigma, labels, {stream: table[f] for stream, table in votes.items()})
            for f in models
        ]
        for stream, table in votes.items():
            have, want = table.sum(axis=2), np.stack([one[stream] for one in wanted])
            if (lacking := have < want).any():
                start = int(have[lacking].min())
                behind = lacking & (have == start)
                return stream, start, int(want[behind].min()) - start, behind
        return None

    def _count(
        self,
        images: torch.Tensor,
        rows: np.ndarray,
        models: list[str],
        stream: Stream,
        start: int,
        size: int,
        counted: np.ndarray,
    ) -> Item:
        started = time.perf_counter()
        votes = np.zeros((len(models), len(rows), self.num_classes + 1), np.int64)
        for denoise, names in self._by_view(models):
            places = [models.index(name) for name in names]
            with self._precision():
                found = sample_votes(
                    images,
                    self.images.ids[torch.as_tensor(rows)],
                    denoise,
                    [self.classifiers[name] for name in names],
                    num_classes=self.num_classes,
                    seed=self.seed,
                    stream=stream,
                    start=start,
                    size=size,
                    batch_size=self.batch_size,
                    wanted=torch.as_tensor(counted[places], device=images.device),
                )
            votes[places] = found.cpu().numpy()
        return {
            "rows": rows, "models": models, "stream": int(stream), "start": start, "size": size,
            "votes": votes, "counted": counted, "seconds": time.perf_counter() - started,
        }  # fmt: skip
