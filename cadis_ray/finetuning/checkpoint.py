"""A fine-tuned classifier on disk: safetensors and a JSON of everything needed to run them. No pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cadis_ray.errors import DataError
from cadis_ray.finetuning.batch import BEGINNING, Standing
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.models.adapters.lora import load_trainable_state, trainable_state
from cadis_ray.models.black_box import Trained
from cadis_ray.models.checkpoints import read_state, sha256_of, write_safetensors
from cadis_ray.models.sharding import like, sharded, whole

WEIGHTS, OPTIMISER, RECORD = "classifier.safetensors", "optimiser.safetensors", "checkpoint.json"


def save_checkpoint(
    folder: Path | None,
    classifier: Trained,
    optimiser: torch.optim.Optimizer,
    configuration: Configuration,
    *,
    seed: int,
    epoch: int,
    standing: Standing = BEGINNING,
) -> None:
    """Write what training changed, the optimiser's state and, last, the record into an existing folder.

    ``epoch``: how many are done; ``standing``: how far the next one has come. Where weights are sharded, all workers
    call this together, but for one with None: they give their shards and write nothing.
    """
    with sharded(classifier):
        weights, state = trainable_state(classifier), _flat(optimiser)
    if folder is None:
        return
    write_safetensors(folder / WEIGHTS, weights)
    write_safetensors(folder / OPTIMISER, state)
    record = {
        "epoch": epoch,
        "standing": standing._asdict(),
        "seed": seed,
        "configuration": configuration.model_dump(mode="json"),
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def restore_checkpoint(folder: Path, classifier: Trained, optimiser: torch.optim.Optimizer) -> tuple[int, Standing]:
    """Put weights and optimiser state back; returns the epochs done, and how far the next one has come.

    Raises DataError for a damaged folder.
    """
    record = read_record(folder)
    with sharded(classifier):
        load_trainable_state(classifier, read_state(folder / WEIGHTS))
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = optimiser.state_dict()
    state["state"] = {}
    for key, value in load_file(folder / OPTIMISER).items():
        index, name = key.split(".")
        moment = value if name == "step" else like(value, parameters[int(index)])
        state["state"].setdefault(int(index), {})[name] = moment
    optimiser.load_state_dict(state)
    standing = record["standing"]
    return int(record["epoch"]), Standing(standing["steps"], standing["images"], tuple(standing["sums"]))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are whole. Raises DataError naming the file that is not."""
    try:
        record = json.loads((folder / RECORD).read_text())
        hashes = record["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a checkpoint of this program ({error})") from error
    for name, expected in hashes.items():
        if not (folder / name).exists() or sha256_of(folder / name) != expected:
            raise DataError(f"{folder / name}: missing or damaged: its SHA-256 is not the one in {RECORD}")
    return record


def _flat(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": whole(torch.as_tensor(value))
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }
