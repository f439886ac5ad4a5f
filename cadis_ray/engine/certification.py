"""Certificates, and estimates by their side: Ray Data actors count votes on test images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadis_ray.certification.certificates import Certificates, certificates_from
from cadis_ray.certification.counting import Count
from cadis_ray.certification.examples import Examples, make_examples, read_examples, write_examples
from cadis_ray.certification.pending import Arrivals, pending_blocks, pending_images
from cadis_ray.certification.request import Request, Votes, certified_images, counted_images, sources_of, votes_of
from cadis_ray.engine.actors import on_actors
from cadis_ray.errors import IntegrityError
from cadis_ray.interface.progress import Progress
from cadis_ray.search.trials import estimate_from
from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.smoothing.noise import Stream
from cadis_ray.study.sections import Resources


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
        return votes, {name: mode.lacking(settings, base.sigma, labels, own) for name, own in votes.items()}

    if settings.mode == "protocol" and not request.recount:
        items = list(pending_blocks(request, sources, store.load(), ids))
    else:
        items = list(pending_images(request, *state()))
    total = len(ids) * sum(mode.most(settings).values())
    stage = "finalists" if request.recount else "certification"
    progress.stage(stage, total, total - sum(item["samples"] for item in items))
    arguments = {"request": request, "batch_size": resources.batch_size}
    with Arrivals(store) as arrivals:
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


class Look:
    """One actor: ``make_examples`` of the model that an item names."""

    def __init__(self, request: Request, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.request, self.device = request, device

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        examples = make_examples(self.request, item["model"], self.device)
        if examples is not None:
            yield vars(examples)


def examples_of(request: Request, name: str, run_dir: Path, resources: Resources) -> Examples | None:
    """Those of a model, from the run's folder if they are there already."""
    held = read_examples(run_dir)
    if held is None or held.name != name:
        one = resources.model_copy(update={"actors": 1, "min_actors": 1})
        rows = list(on_actors([{"model": name}], Look, {"request": request}, one))
        held = Examples(**rows[0]) if rows else None
        if held:
            write_examples(run_dir, held)
    return held
