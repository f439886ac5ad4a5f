"""Checkpoints of the authors' FT-CADIS program, ``checkpoint-N.pth.tar``, in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cadis_ray.errors import DataError
from cadis_ray.models.adapters.lora import merge_lora
from cadis_ray.models.checkpoints import read_checkpoint
from cadis_ray.models.classifiers.classifier import Classifier, load_weights
from cadis_ray.storage.files import write_atomically

PREFIX, PARALLEL, LORA = "classifier.", "module.", "lora_vit."


class Official(NamedTuple):
    """What stands beside the weights: epochs done, and the program's name of the architecture."""

    epoch: int
    arch: str


def import_official(path: str | Path, classifier: Classifier, *, lora_scale: float = 1.0) -> Official:
    """Copies a checkpoint's weights into ``classifier``, which has no adapters; the optimiser's state is left out.

    The program's LoRA (W + scale * B A on the q and v of a fused qkv) is merged into the weights. Its scale is not in
    the file: ``lora_scale`` 1 is that of alpha = rank, as in the paper; elsewhere the program floors alpha / rank.
    The program works with mean and std 0.5: load the classifier with ``normalise`` "half".

    Raises DataError for a file of another layout, a pickle of anything but tensors and plain data, or weights of
    another architecture, with the first differing keys; then nothing is copied.
    """
    held = read_checkpoint(path)
    if not isinstance(held, Mapping) or not isinstance(held.get("epoch"), int) or not {"arch", "state_dict"} <= {*held}:
        shown = ", ".join(map(str, list(held)[:8])) if isinstance(held, Mapping) else type(held).__name__
        raise DataError(f"{path}: not a checkpoint of FT-CADIS's program: need epoch, arch and state_dict, got {shown}")
    state = _merged(_stripped(held["state_dict"], path), lora_scale, path)
    load_weights(classifier.backbone, state, path)
    return Official(held["epoch"], str(held["arch"]))


def export_official(path: str | Path, classifier: Classifier, epoch: int, arch: str) -> None:
    """Writes ``classifier``, adapters merged, so that the program certifies it. It cannot resume training from it.

    ``arch``: "cifar_vit_base" (transformers, with the hub's names) or "imagenet_vit_base" (timm). The program takes a
    path with "lora" in it for one with adapters: avoid the word.
    """
    backbone = merge_lora(classifier).backbone
    hub_state = getattr(backbone, "hub_state", backbone.state_dict)
    state = {PREFIX + key: value.detach().cpu().clone() for key, value in hub_state().items()}
    held = {"epoch": epoch, "arch": arch, "state_dict": state, "optimizer": {}, "fp16_scaler": {}}
    with write_atomically(Path(path)) as file:
        torch.save(held, file)


def _stripped(state: object, path: str | Path) -> dict[str, Tensor]:
    """The state dict without the program's prefixes, under data parallelism or not."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: state_dict is not a mapping from names to tensors")
    names = {str(key): str(key).removeprefix(PARALLEL) for key in state}
    if others := [key for key, name in names.items() if not name.startswith(PREFIX)]:
        raise DataError(
            f"{path}: {len(others)} of {len(names)} keys do not begin with {PREFIX!r}, as in FT-CADIS's program: "
            f"{', '.join(others[:3])}; other checkpoints are loaded as classifier.checkpoint"
        )
    return {name.removeprefix(PREFIX).removeprefix(PARALLEL): state[key] for key, name in names.items()}


def _merged(state: dict[str, Tensor], scale: float, path: str | Path) -> dict[str, Tensor]:
    """``state`` with the program's adapters added into the weights of qkv."""
    if not all(key.startswith(LORA) for key in state):
        return state
    state = {key.removeprefix(LORA): value for key, value in state.items()}
    for key in [key for key in state if key.endswith(".qkv.qkv.weight")]:
        layer = key.removesuffix(".qkv.weight")
        weight = state.pop(key).clone()
        try:
            for part, rows in (("q", weight.chunk(3)[0]), ("v", weight.chunk(3)[2])):
                down, up = (state.pop(f"{layer}.linear_{matrix}_{part}.weight") for matrix in "ab")
                rows += scale * up @ down
        except (KeyError, RuntimeError) as error:
            raise DataError(f"{path}: the adapters of {layer} are incomplete or of another shape: {error}") from error
        state[f"{layer}.weight"] = weight
        if (bias := state.pop(f"{layer}.qkv.bias", None)) is not None:
            state[f"{layer}.bias"] = bias
    return state
