"""In memory, on disk, in part, or made by each trial: the denoised pool changes no training."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cadis_ray.data import DataSet, load
from cadis_ray.engine.pool import make_pool
from cadis_ray.engine.resources import Pool
from cadis_ray.engine.worker import training_images
from cadis_ray.finetuning.inputs import make_denoising
from cadis_ray.finetuning.trial import Epoch, trial_epochs
from cadis_ray.interface.progress import Progress
from cadis_ray.models.adapters.lora import trainable_state
from cadis_ray.study.load import load_study
from cadis_ray.study.plan import plan, training_set
from cadis_ray.study.study import Study, configuration
from tests.helpers.engine import small_study, write_study

GB_OF_AN_EPOCH = 150 * 3 * 64 * 2 / 1e9


def study_with(folder: Path, **resources: Any) -> Study:
    small = small_study(**resources) | {"baselines": {}}
    small["base"]["data"] |= {"train": 150, "augmentation": "cifar10"}
    small["base"]["validation"] = {"images": 20, "samples": 2}
    return load_study(write_study(folder / "study.yaml", small))


def trained(study: Study, pool: Pool) -> list[Epoch]:
    """Two epochs of one trial, whose last batch is smaller than the others."""
    torch.set_num_threads(1)
    chosen = configuration(study, {"finetuning.num_noises": 2, "finetuning.batch_size": 40})
    whole = load(chosen.data)
    data = DataSet("digits", 10, whole.train, whole.validation.first(20), whole.test)
    counted = np.zeros((1, 20, 1, 8, 8), np.float16)
    source = partial(training_images, pool, data.train, cache(partial(make_denoising, chosen, study.seed, "cpu")))
    return list(trial_epochs(chosen, data, source, counted, seed=study.seed))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
@pytest.mark.usefixtures("cluster")
def test_memory_disk_part_and_off_train_alike(tmp_path: Path) -> None:
    folder = tmp_path / "pool"

    def pooled(**resources: Any) -> tuple[Pool, list[Epoch]]:
        study = study_with(tmp_path, **resources)
        with Progress() as progress:
            pool = make_pool(study, folder, progress)
        return pool, trained(study, pool)

    _, expected = pooled(pool="memory")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(files) == 2 * 3 + 2
    for resources, kept in (
        ({"pool": "disk"}, 2),
        ({"pool": "disk", "pool_gb": 1.5 * GB_OF_AN_EPOCH}, 1),
        ({"pool": "off"}, 0),
    ):
        pool, found = pooled(**resources)
        assert [entry is not None for entry in pool.train] == [epoch < kept for epoch in range(2)]
        # Over the limit the later epochs are evicted, and nothing is denoised again that lies here.
        assert {file.name: file.read_bytes() for file in folder.iterdir()}.items() <= files.items()
        assert len(list(folder.iterdir())) == 3 * kept + 2
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6)
        states = [trainable_state(epochs[-1].classifier) for epochs in (found, expected)]
        for key, value in states[0].items():
            torch.testing.assert_close(value, states[1][key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("resources", "epochs"),
    [
        ({}, 2),
        ({"pool_gb": 1.0}, 2),
        ({"pool_gb": 1.99 * GB_OF_AN_EPOCH}, 1),
        ({"pool_gb": 0.0}, 0),
        ({"pool": "off"}, 0),
    ],
)
def test_the_plan_counts_what_the_pool_holds(tmp_path: Path, resources: dict, epochs: int) -> None:
    study = study_with(tmp_path, **resources)
    images = training_set(study)
    counted = plan(study, images)[0]
    assert images.pooled == epochs
    assert counted.denoiser_calls == 150 * 3 * epochs + 20 * 2
    assert counted.bytes == counted.denoiser_calls * 64 * 2


def test_a_trial_without_a_pool_pays_for_its_denoising(tmp_path: Path) -> None:
    from cadis_ray.study.forecast import forecast

    held, off = (forecast(study_with(tmp_path, pool=pool), "cpu", 2) for pool in ("memory", "off"))
    per_image = off.gflops[0] * 1e9 / 56e9
    assert held.stages[0].busy.low - off.stages[0].busy.low == pytest.approx(150 * 2 * 3 * per_image)
    mean_noises = (2 + 3) / 2
    assert off.stages[1].busy.low - held.stages[1].busy.low == pytest.approx(3 * 150 * 2 * mean_noises * per_image)
