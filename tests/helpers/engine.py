"""What the tests on a real Ray share."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cadis_ray.data import load
from cadis_ray.finetuning.checkpoint import save_checkpoint
from cadis_ray.finetuning.inputs import Fresh, make_denoising
from cadis_ray.finetuning.trial import trial_epochs
from cadis_ray.models.checkpoints import read_state
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.study import Study, configuration
from tests.helpers.places import DIGITS


@dataclass(frozen=True)
class Cluster:
    """Addresses of the session's Ray, for drivers and for jobs."""

    address: str
    dashboard: str

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", "PATH": path}

    def tune(self, *arguments: object) -> subprocess.Popen[str]:
        """``python -m cadis_ray.tune ARGUMENTS`` on this cluster, its output kept."""
        return self.command("cadis_ray.tune", *arguments)

    def command(self, module: str, *arguments: object) -> subprocess.Popen[str]:
        """``python -m MODULE ARGUMENTS`` on this cluster, its output kept."""
        command = [sys.executable, "-m", module, *map(str, arguments), "--address", self.address]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=self.environment)


def small_study(**resources: Any) -> dict:
    """The digits study with few images, samples and epochs, and a baseline that diverges."""
    study = yaml.safe_load(DIGITS.read_text())
    study |= {"name": "small", "trials": 3, "sampler": {"name": "tpe", "startup": 1}}
    study["base"]["finetuning"] |= {"epochs": 2, "attack_steps": 1, "base_lr": 0.02}
    study["base"]["validation"] = {"images": 60, "samples": 8}
    study["base"]["certification"] = {"images": 10, "n0": 10, "n": 120, "alpha": 0.001, "radii": [0, 0.5]}
    study["finalists"] = {"count": 2, "samples": [4, 12]}
    # Not 1: then the target is the classifier's own answer, the attack starts at its minimum, and its direction is
    # rounding, which two workers round otherwise.
    study["space"]["finetuning.num_noises"] = {"choices": [2, 3]}
    study["baselines"] = {
        "off_the_shelf": {"finetuning.recipe": "none"},
        "diverging": {"finetuning.base_lr": 1e30, "finetuning.num_noises": 1},
    }
    study["objective"] = {"maximise": "acr"}
    study["resources"] |= resources
    return study


def write_study(path: Path, study: dict) -> Path:
    path.write_text(yaml.safe_dump(study))
    return path


def states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and state of the optimiser in a checkpoint."""
    parts = {name: read_state(checkpoint / f"{name}.safetensors") for name in ("classifier", "optimiser")}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


def undisturbed(study: Study, parameters: dict, folder: Path) -> dict[str, torch.Tensor]:
    """``states`` of a trial after its last epoch without Ray, in this process."""
    chosen = configuration(study, parameters)
    data, denoising = load(chosen.data), make_denoising(chosen, study.seed, "cpu")
    nothing = np.zeros((8, 1, 1, 8, 8), np.float16)
    *_, last = trial_epochs(chosen, data, lambda number: Fresh(denoising, data.train, number), nothing, seed=study.seed)
    folder.mkdir()
    assert last.optimiser is not None
    save_checkpoint(folder, last.classifier, last.optimiser, chosen, seed=study.seed, epoch=last.epoch)
    return states(folder)


def epochs_recorded(folder: Path) -> int:
    """Epochs that a run's ledger holds, of all trials; 0 before there is one."""
    if not (folder / "ledger.sqlite").exists():
        return 0
    with Ledger(folder / "ledger.sqlite") as ledger:
        return sum(len(ledger.epochs(row.number)) for row in ledger.trials())
