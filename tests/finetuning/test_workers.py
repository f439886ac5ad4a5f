"""One, two and four processes that average gradients train as one."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from cadis_ray.config import configuration, load_study
from cadis_ray.data import DataSet, load
from cadis_ray.finetuning.trial import Worker, trial_epochs
from cadis_ray.models.lora import trainable_state

STUDY = load_study(Path(__file__).parents[2] / "search_spaces" / "digits.yaml")
SETTINGS = {
    "finetuning.epochs": 2, "finetuning.num_noises": 2, "finetuning.attack_steps": 1, "finetuning.base_lr": 0.02,
    "finetuning.adv_weight": 2.0, "finetuning.attack_radius": 0.2, "finetuning.batch_size": 50,
}  # fmt: skip


def trained(worker: Worker) -> tuple[list[dict[str, float]], np.ndarray, dict[str, torch.Tensor]]:
    """Metrics of two epochs on 170 images (the last batch is smaller), the last votes, the trained weights."""
    torch.set_num_threads(1)
    whole = load(STUDY.base.data)
    data = DataSet("digits", 10, whole.train.first(170), whole.validation.first(31), whole.test.first(10))

    def pool(images: torch.Tensor, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, 0.2, (2, *images.shape))
        return np.clip(2 * images.numpy() - 1 + noise, -1, 1).astype(np.float16)

    epochs = list(
        trial_epochs(
            configuration(STUDY, SETTINGS), data, lambda epoch: pool(data.train.images, epoch),
            pool(data.validation.images, 99), seed=1, worker=worker,
        )
    )  # fmt: skip
    return [epoch.metrics for epoch in epochs], epochs[-1].counts, trainable_state(epochs[-1].classifier)


def process(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)

    def add(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    wrap = partial(DistributedDataParallel, broadcast_buffers=False)
    found = trained(Worker(rank, world, "cpu", wrap, add))
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_workers_train_as_one(tmp_path: Path, world: int) -> None:
    spawn(process, (world, tmp_path), nprocs=world)
    metrics, votes, state = torch.load(tmp_path / "found", weights_only=False)
    expected, expected_votes, expected_state = trained(Worker())
    for ours, theirs in zip(metrics, expected, strict=True):
        for key in ("loss", "sce", "madv", "learning_rate"):
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-5), key
        for key in ("mask_share", "selected_share", "images"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-12), key
    for key, value in state.items():
        torch.testing.assert_close(value, expected_state[key], atol=1e-4, rtol=1e-3)
    assert np.abs(votes - expected_votes).sum() <= 2
