"""A trial whose workers share gradients and optimiser trains, on Ray, what one process does."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cadis_ray.engine.resources import Pool
from cadis_ray.engine.worker import train
from cadis_ray.study.load import load_study
from tests.helpers.engine import small_study, states, undisturbed, write_study

PARAMETERS = {
    "finetuning.num_noises": 2,
    "finetuning.batch_size": 40,
}  # 150 images: the shares of the last batch differ


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
@pytest.mark.usefixtures("cluster")
def test_two_workers_with_a_share_each_write_the_checkpoint_of_one(tmp_path: Path) -> None:
    small = small_study(workers_per_trial=2, data_parallel="fsdp", pool="off")
    small["base"]["data"] |= {"train": 150}
    study = load_study(write_study(tmp_path / "study.yaml", small))
    pool = Pool([None, None], ray.put(np.zeros((8, 60, 1, 8, 8), np.float16)))
    config = {"number": 0, "session": 0, "parameters": PARAMETERS, "resume": None, "note": tmp_path / "note"}
    trained = TorchTrainer(
        train,
        train_loop_config=config | {"study": study, "pool": pool},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="trial", storage_path=str(tmp_path)),
    ).fit()
    assert trained.checkpoint is not None
    ours, theirs = states(Path(trained.checkpoint.path)), undisturbed(study, PARAMETERS, tmp_path / "undisturbed")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)
