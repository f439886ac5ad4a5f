"""The denoised pool: every image the trials train and count on, denoised once by Ray Data actors."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cadis_ray.config import Configuration, Resources, Study, max_epochs, max_num_noises, schedule
from cadis_ray.console import Progress
from cadis_ray.data import load
from cadis_ray.data.augmentation import Augmentation
from cadis_ray.engine.actors import on_actors
from cadis_ray.engine.trial import Pool
from cadis_ray.files import write_atomically
from cadis_ray.finetuning.noisy import EPOCH_BITS
from cadis_ray.models.denoisers import load_denoiser
from cadis_ray.smoothing.noise import Stream, gaussian

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
        model = configuration.denoiser
        denoiser = load_denoiser(model.family, model.checkpoint, model.config).to(device)
        self.denoise = partial(denoiser.denoise, sigma=configuration.sigma, mode=model.noise)
        self.augmentation: Augmentation = configuration.data.augmentation
        self.seed, self.device = seed, device

    @torch.inference_mode()
    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        split, parts, training = self.splits[Stream(item["stream"])], [], item["stream"] == Stream.TRAINING
        for rows in torch.arange(len(split.ids)).split(BATCH):
            epoch = item["sample"] >> EPOCH_BITS
            seen = split.augmented(rows, epoch, self.seed, self.augmentation) if training else split.read(rows)
            images = seen.to(self.device)
            samples = torch.full_like(rows, item["sample"])
            noise = gaussian(self.seed, Stream(item["stream"]), split.ids[rows], samples, images.shape[1:], self.device)
            parts.append(self.denoise(images, noise).half().cpu())
        yield item | {"denoised": torch.cat(parts).numpy()}


def make_pool(study: Study, folder: Path, progress: Progress) -> Pool:
    """Denoise what ``folder`` does not hold yet, one file per (stream, sample), and load it into the object store.

    A draw of noise is sample = epoch * 2**16 + index of the training stream, the same in every study, or sample
    0..S-1 of the search stream.
    """
    noises, epochs, samples = max_num_noises(study), max_epochs(study), max(schedule(study.base.validation.samples))
    draws = [[(Stream.TRAINING, (epoch << EPOCH_BITS) + index) for index in range(noises)] for epoch in range(epochs)]
    counted = [(Stream.SEARCH, sample) for sample in range(samples)]
    wanted = [*chain(*draws), *counted]
    folder.mkdir(parents=True, exist_ok=True)
    todo = [key for key in wanted if not _file(folder, *key).exists()]
    progress.stage("denoised pool", len(wanted), len(wanted) - len(todo))
    for item in _denoised(todo, study.base, study.seed, study.resources):
        with write_atomically(_file(folder, Stream(item["stream"]), item["sample"])) as file:
            np.save(file, item["denoised"], allow_pickle=False)
        progress.advance()

    def stored(keys: list[tuple[Stream, int]]) -> ray.ObjectRef:
        return ray.put(np.stack([np.load(_file(folder, *key)) for key in keys]))

    return Pool([stored(keys) for keys in draws], stored(counted))


def _denoised(
    todo: list[tuple[Stream, int]], configuration: Configuration, seed: int, resources: Resources
) -> Iterator[dict[str, Any]]:
    if not todo:
        return
    items = [{"stream": int(stream), "sample": sample} for stream, sample in todo]
    yield from on_actors(items, Denoise, {"configuration": configuration, "seed": seed}, resources)


def _file(folder: Path, stream: Stream, sample: int) -> Path:
    return folder / f"{stream.name.lower()}-{sample:010d}.npy"
