"""The denoised pool: images that the trials train and count on, denoised once by Ray Data actors."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cadis_ray.data import load
from cadis_ray.engine.actors import on_actors
from cadis_ray.engine.resources import Pool
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.inputs import EPOCH_BITS, make_denoising
from cadis_ray.interface.progress import Progress
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.settings import schedule
from cadis_ray.storage.files import write_atomically
from cadis_ray.study.plan import training_set
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import Study, max_epochs, max_num_noises

BATCH = 256


class Denoise:
    """One actor: denoises all images of a split under one draw of noise."""

    def __init__(self, configuration: Configuration, seed: int, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        data = load(configuration.data)
        self.splits = {
            Stream.TRAINING: data.train,
            Stream.SEARCH: data.validation.first(configuration.validation.images),
        }
        self.denoising = make_denoising(configuration, seed, device)

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        stream = Stream(item["stream"])
        split = self.splits[stream]
        batches = torch.arange(len(split.ids)).split(BATCH)
        parts = [self.denoising.draw(split, rows, stream, item["sample"]).cpu() for rows in batches]
        yield item | {"denoised": torch.cat(parts).numpy()}


def make_pool(study: Study, folder: Path, progress: Progress) -> Pool:
    """Denoise what ``folder`` does not hold yet, one file per (stream, sample), and say where the trials find it.

    A draw of noise is sample = epoch * 2**16 + index of the training stream, the same in every study, or sample
    0..S-1 of the search stream. Epochs beyond the study's ``pool_gb``, or all where its pool is off, are left to the
    trials, and evicted where they lie here: trials read the first epochs most, because some are stopped early.
    """
    noises, samples = max_num_noises(study), max(schedule(study.base.validation.samples))
    kept = training_set(study).pooled
    draws = [[(Stream.TRAINING, (epoch << EPOCH_BITS) + index) for index in range(noises)] for epoch in range(kept)]
    counted = [(Stream.SEARCH, sample) for sample in range(samples)]
    wanted = [*chain(*draws), *counted]
    folder.mkdir(parents=True, exist_ok=True)
    for file in {*folder.glob("*.npy")} - {_file(folder, *key) for key in wanted}:
        file.unlink()
    todo = [key for key in wanted if not _file(folder, *key).exists()]
    progress.stage("denoised pool", len(wanted), len(wanted) - len(todo))
    for item in _denoised(todo, study.base, study.seed, study.resources):
        with write_atomically(_file(folder, Stream(item["stream"]), item["sample"])) as file:
            np.save(file, item["denoised"], allow_pickle=False)
        progress.advance()

    def stored(keys: list[tuple[Stream, int]]) -> ray.ObjectRef:
        return ray.put(np.stack([np.load(_file(folder, *key)) for key in keys]))

    def filed(keys: list[tuple[Stream, int]]) -> list[Path]:
        return [_file(folder.resolve(), *key) for key in keys]

    hold = filed if study.resources.pool == "disk" else stored
    return Pool([*map(hold, draws), *[None] * (max_epochs(study) - kept)], stored(counted))


def _denoised(
    todo: list[tuple[Stream, int]], configuration: Configuration, seed: int, resources: Resources
) -> Iterator[dict[str, Any]]:
    if not todo:
        return
    items = [{"stream": int(stream), "sample": sample} for stream, sample in todo]
    yield from on_actors(items, Denoise, {"configuration": configuration, "seed": seed}, resources)


def _file(folder: Path, stream: Stream, sample: int) -> Path:
    return folder / f"{stream.name.lower()}-{sample:010d}.npy"
