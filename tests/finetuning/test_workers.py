"""One, two and four processes train as one: they average gradients, or keep a shard of them and of the optimiser."""

import math
import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from cadis_ray.data import DataSet, load
from cadis_ray.engine.worker import DDP
from cadis_ray.finetuning.checkpoint import save_checkpoint
from cadis_ray.finetuning.trial import Epoch, Worker, trial_epochs
from cadis_ray.models.adapters.lora import trainable_state
from cadis_ray.models.sharding import shard, sharded
from cadis_ray.study.load import load_study
from cadis_ray.study.study import configuration
from tests.helpers.places import DIGITS

pytestmark = pytest.mark.process

STUDY = load_study(DIGITS)
SETTINGS = {
    "finetuning.epochs": 2, "finetuning.num_noises": 2, "finetuning.attack_steps": 1, "finetuning.base_lr": 0.02,
    "finetuning.adv_weight": 2.0, "finetuning.attack_radius": 0.2, "finetuning.batch_size": 50,
}  # fmt: skip
# Shares of the last batch, of 20 images, fall into different numbers of parts.
FULL = {"finetuning.adapter": "full", "finetuning.accumulation": 4}
Found = tuple[list[dict[str, float]], np.ndarray, dict[str, torch.Tensor]]


def epochs(worker: Worker, parameters: dict, resume: Path | None = None) -> Iterator[Epoch]:
    """Two epochs on 170 images."""
    whole = load(STUDY.base.data)
    data = DataSet("digits", 10, whole.train.first(170), whole.validation.first(31), whole.test.first(10))

    def pool(images: torch.Tensor, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, 0.2, (2, *images.shape))
        return np.clip(2 * images.numpy() - 1 + noise, -1, 1).astype(np.float16)

    return trial_epochs(
        configuration(STUDY, SETTINGS | parameters), data, lambda epoch: pool(data.train.images, epoch),
        pool(data.validation.images, 99), seed=1, worker=worker, resume=resume,
    )  # fmt: skip


def trained(found: list[Epoch]) -> Found:
    """Metrics of the epochs, the last votes, the trained weights."""
    with sharded(found[-1].classifier):
        return [epoch.metrics for epoch in found], found[-1].counts, trainable_state(found[-1].classifier)


def process(rank: int, world: int, folder: Path, parameters: dict, sharding: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)

    def add(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    worker = Worker(rank, world, "cpu", shard if sharding else partial(DistributedDataParallel, **DDP), add)
    run = epochs(worker, parameters)
    first = next(run)
    assert first.optimiser is not None
    kept = folder / "first"
    kept.mkdir(exist_ok=True)
    chosen = configuration(STUDY, SETTINGS | parameters)
    if sharding:
        save_checkpoint(kept if rank == 0 else None, first.classifier, first.optimiser, chosen, seed=1, epoch=1)
    found = trained([first, *run])
    again = trained(list(epochs(worker, parameters, resume=kept))) if sharding else found
    if rank == 0:
        torch.save((found, again), folder / "found")
    dist.destroy_process_group()


def learned(value: torch.Tensor, key: str) -> torch.Tensor:
    """Without the keys' bias: attention does not depend on it, and Adam makes steps of its gradient's rounding."""
    return value.view(3, -1)[::2] if key.endswith("qkv.bias") else value


@pytest.mark.parametrize(("world", "parameters", "sharding"), [(2, {}, False), (4, {}, False), (3, FULL, True)])
def test_workers_train_as_one(tmp_path: Path, world: int, parameters: dict, sharding: bool) -> None:
    multiprocessing.set_forkserver_preload(["cadis_ray.finetuning.trial"])  # imported once for all processes
    start_processes(process, (world, tmp_path, parameters, sharding), nprocs=world, start_method="forkserver")
    (metrics, votes, state), again = torch.load(tmp_path / "found", weights_only=False)
    expected, expected_votes, expected_state = trained(list(epochs(Worker(), parameters)))
    for ours, theirs in zip(metrics, expected, strict=True):
        for key in ("loss", "sce", "madv", "learning_rate"):
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-5), key
        for key in ("mask_share", "selected_share", "images"):
            # A step's parts are added in float32; an image more or less is 3e-3.
            assert ours[key] == pytest.approx(
                theirs[key], abs=1e-6 if "finetuning.accumulation" in parameters else 1e-12
            ), key
    assert state.keys() == expected_state.keys()
    for key, value in state.items():
        torch.testing.assert_close(*map(learned, (value, expected_state[key]), (key, key)), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(again[2][key], value, atol=1e-6, rtol=0)
    assert np.abs(votes - expected_votes).sum() <= 2
    assert np.array_equal(votes, again[1])
