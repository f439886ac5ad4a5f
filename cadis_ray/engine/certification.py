"""The final certificate: Ray Data actors count votes on test images under noise that the search never saw."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadis_ray.config import Configuration, Study
from cadis_ray.console import Progress
from cadis_ray.data import Split, load
from cadis_ray.engine.actors import on_actors
from cadis_ray.finetuning.checkpoint import load_finetuned
from cadis_ray.models.checkpoints import state_hash
from cadis_ray.models.classifiers import Classifier
from cadis_ray.models.denoisers import load_denoiser
from cadis_ray.results import Certificates
from cadis_ray.smoothing.bounds import certify
from cadis_ray.smoothing.counts import NO_BLOCKS, Blocks, CountsStore, Source
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.sampling import sample_votes

IMAGES_PER_ITEM = 8
BLOCK = 500
BATCH = 256
STREAMS = (Stream.SELECTION, Stream.ESTIMATION)


@dataclass(frozen=True)
class Model:
    """A classifier to certify: its configuration and its checkpoint's folder (None: off the shelf)."""

    configuration: Configuration
    checkpoint: Path | None


class Count:
    """One actor: votes of several classifiers for a block of samples of a few images, denoised once for all."""

    def __init__(self, study: Study, models: Mapping[str, Model], device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        base = study.base
        data = load(base.data)
        self.seed, self.num_classes = study.seed, data.num_classes
        self.images = data.test.first(base.certification.images).images.to(device)
        self.ids = data.test.first(base.certification.images).ids.to(device)
        denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config).to(device)
        self.denoise = partial(denoiser.denoise, sigma=base.sigma)
        self.classifiers = {name: classifier.to(device) for name, classifier in load_models(study, models).items()}

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        rows = torch.as_tensor(item["rows"], device=self.ids.device)
        votes = sample_votes(
            self.images[rows],
            self.ids[rows],
            self.denoise,
            [self.classifiers[name] for name in item["models"]],
            num_classes=self.num_classes,
            seed=self.seed,
            stream=Stream(item["stream"]),
            start=int(item["start"]),
            size=int(item["size"]),
            batch_size=BATCH,
        )
        return item | {"votes": votes.cpu().numpy(), "seconds": time.perf_counter() - started}


def certify_models(
    study: Study, models: Mapping[str, Model], store: CountsStore, progress: Progress
) -> dict[str, Certificates]:
    """CERTIFY of Cohen et al. 2019 for every model on the same test images under the same noise.

    Counts what ``store`` does not hold yet and commits every item as it arrives. A certificate's seconds are those of
    this process's actors: what an earlier one counted is not in them.
    """
    settings = study.base.certification
    test = load(study.base.data).test.first(settings.images)
    sources = _sources(study, models, test)
    wanted = {Stream.SELECTION: settings.n0, Stream.ESTIMATION: settings.n}
    items = list(_items(sources, store.load(), test.ids.numpy(), wanted))
    total = settings.images * (settings.n0 + settings.n)
    progress.stage("certification", total, total - sum(len(item["rows"]) * item["size"] for item in items))
    seconds = np.zeros(len(test.ids))
    for item in on_actors(items, Count, {"study": study, "models": dict(models)}, study.resources):
        rows, stream = np.asarray(item["rows"]), Stream(item["stream"])
        index = np.array([(test.ids[row].item(), item["start"], item["size"]) for row in rows])
        for name, votes in zip(item["models"], item["votes"], strict=True):
            store.commit(sources[name, stream], Blocks(index, votes))
        seconds[rows] += item["seconds"] / len(rows)
        progress.advance(len(rows) * int(item["size"]))
    blocks = store.load()
    return {
        name: _certificates(study, name, test, seconds, *(blocks[sources[name, stream]] for stream in STREAMS))
        for name in models
    }


def load_models(study: Study, models: Mapping[str, Model]) -> dict[str, Classifier]:
    """Every model with its adapters merged: what is certified is what is shipped."""
    return {name: load_finetuned(model.configuration, model.checkpoint, study.seed) for name, model in models.items()}


def _sources(study: Study, models: Mapping[str, Model], test: Split) -> dict[tuple[str, Stream], Source]:
    base = study.base
    denoiser = state_hash(
        load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config).state_dict()
    )
    data = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest()
    return {
        (name, stream): Source(state_hash(classifier.state_dict()), denoiser, data, base.sigma, study.seed, int(stream))
        for name, classifier in load_models(study, models).items()
        for stream in STREAMS
    }


def _items(
    sources: Mapping[tuple[str, Stream], Source],
    stored: Mapping[Source, Blocks],
    ids: np.ndarray,
    wanted: Mapping[Stream, int],
) -> Iterator[dict[str, Any]]:
    """Work items: a few images, one block of samples, the models that lack it."""
    row_of = {image: row for row, image in enumerate(ids.tolist())}
    lacking: dict[tuple[Stream, int, int, int], list[str]] = defaultdict(list)
    for (name, stream), source in sources.items():
        for image, start, size in stored.get(source, NO_BLOCKS).missing(ids, wanted[stream], BLOCK).tolist():
            lacking[stream, start, size, row_of[image]].append(name)
    groups: dict[tuple[Stream, int, int, tuple[str, ...]], list[int]] = defaultdict(list)
    for (stream, start, size, row), names in lacking.items():
        groups[stream, start, size, tuple(names)].append(row)
    for (stream, start, size, names), rows in groups.items():
        for first in range(0, len(rows), IMAGES_PER_ITEM):
            yield {
                "stream": int(stream), "start": start, "size": size,
                "models": list(names), "rows": rows[first : first + IMAGES_PER_ITEM],
            }  # fmt: skip


def _certificates(
    study: Study, name: str, test: Split, seconds: np.ndarray, selection: Blocks, estimation: Blocks
) -> Certificates:
    settings, ids, label = study.base.certification, test.ids.numpy(), test.labels.numpy()
    predict, radius, _ = certify(
        selection.totals(ids, settings.n0),
        estimation.totals(ids, settings.n),
        settings.alpha,
        study.base.sigma,
    )
    return Certificates(
        name, study.base.sigma, settings.n0, settings.n, settings.alpha,
        ids, label, predict, radius, predict == label, seconds,
    )  # fmt: skip
