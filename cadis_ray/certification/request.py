"""What is certified: models on the same images under the same noise; and where that stands in a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.data import Split, load
from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.finetuning.base_classifier import base_identity, view_identity, view_of
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.smoothing.counts import NO_BLOCKS, Blocks, Source
from cadis_ray.smoothing.modes import MODES, Mode, few_samples
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.settings import Finalists, schedule
from cadis_ray.storage.run_folder import RunFolder

IDENTITIES = 2  # how votes are named: 2 by what differs from the defaults, before by whole sections
Sources = Mapping[Stream, Source]  # of one model
Votes = dict[Stream, np.ndarray]  # (N, K + 1) each, of one model


@dataclass(frozen=True)
class Model:
    """A base classifier: its configuration and its checkpoint's folder (None: off the shelf)."""

    configuration: Configuration
    checkpoint: Path | None


@dataclass(frozen=True)
class Request:
    """``base``: data, sigma, denoiser and certification; ``models`` by name; ``seed`` of the noise.

    ``recount``: the models are a study's finalists, counted on validation images by its samples, with noise that
    neither the search nor a certificate uses; what follows is an estimate. ``whole``: its votes are named as those of
    runs whose names are hashes of whole sections.
    """

    base: Configuration
    models: Mapping[str, Model]
    seed: int
    recount: Finalists | None = None
    whole: bool = field(default=False, compare=False)

    @property
    def mode(self) -> Mode:
        if self.recount:
            return few_samples(Stream.AUDIT, schedule(self.recount.samples))
        return MODES[self.base.certification.mode]

    def to_json(self, folder: RunFolder) -> str:
        """The request as text, for the folder in which it is answered."""
        models = {
            name: {
                "configuration": model.configuration.model_dump(mode="json"),
                "checkpoint": None if model.checkpoint is None else folder.within(model.checkpoint),
            }
            for name, model in self.models.items()
        }
        held: dict[str, Any] = {} if self.whole else {"identities": IDENTITIES}
        held |= {"base": self.base.model_dump(mode="json"), "seed": self.seed, "models": models}
        return json.dumps(held, indent=2) + "\n"


def read_request(folder: Path) -> Request:
    """The request of a folder that ``certify`` or a study wrote. UsageError where there is none."""
    path = RunFolder(folder).request
    try:
        held = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{folder}: holds no certificates: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise IntegrityError(f"{path}: damaged: {error}") from error
    try:
        models = {
            name: Model(
                Configuration.model_validate_json(json.dumps(model["configuration"])),
                None if model["checkpoint"] is None else RunFolder(folder).checkpoint(model["checkpoint"]),
            )
            for name, model in held["models"].items()
        }
        base = Configuration.model_validate_json(json.dumps(held["base"]))
        return Request(base, models, int(held["seed"]), whole="identities" not in held)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: changed since it was written: {error}") from error


def certified_images(base: Configuration) -> tuple[Split, int]:
    """The test images to certify, and the number of classes."""
    data = load(base.data)
    return data.test.first(base.certification.images), data.num_classes


def counted_images(request: Request) -> tuple[Split, int]:
    """The images that a request counts on, and the number of classes."""
    if request.recount is None:
        return certified_images(request.base)
    data = load(request.base.data)
    return data.validation.first(request.recount.images or len(data.validation.ids)), data.num_classes


def sources_of(request: Request, images: Split) -> dict[str, Sources]:
    """The key under which each model's votes on each stream of the mode are stored."""
    base = request.base
    data = images.digest()
    hashes = {
        name: (
            base_identity(model.configuration, model.checkpoint, whole=request.whole),
            view_identity(base, view_of(model.configuration), whole=request.whole),
        )
        for name, model in request.models.items()
    }
    streams = request.mode.most(base.certification)
    return {
        name: {stream: Source(own, view, data, base.sigma, request.seed, int(stream)) for stream in streams}
        for name, (own, view) in hashes.items()
    }


def votes_of(
    request: Request, stored: Mapping[Source, Blocks], sources: Sources, ids: np.ndarray, columns: int
) -> Votes:
    """The stored votes (N, K + 1) of each stream that count: from the first sample on, at most what the mode allows."""
    most = request.mode.most(request.base.certification)
    return {
        stream: stored.get(source, NO_BLOCKS).prefix(ids, most[stream], columns) for stream, source in sources.items()
    }
