"""Image classifiers of transformers that return logits, with weights under the hub's names. No remote code."""

import difflib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from timm.layers.drop import DropPath
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.checkpoints import SHOWN, read_state
from cadis_ray.models.classifiers.hub import read_description

DROP_PATH = "drop_path_rate"
PLAIN_VITS = ("ViTLayer", "DeiTLayer")  # each adds ``dropout(branch)`` to the stream, twice


class HuggingFace(nn.Module):
    """A transformers model: images (B, C, H, W) as it was trained on -> logits (B, K)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits

    def heads(self) -> tuple[str, ...]:
        """Names of the modules that end in one number per class."""
        classes = self.model.config.num_labels
        found = []
        for name, part in self.model.named_children():
            last = [parameter.shape for parameter in part.parameters()][-1:]
            if name != self.model.base_model_prefix and last == [(classes,)]:
                found.append(f"model.{name}")
        return tuple(found)

    def load_hub_state(self, state: Mapping[str, Tensor], where: str | Path) -> None:
        """Copies weights under the hub's names, which for many models are not those of this version's modules.

        Raises DataError for another architecture, with the first differing keys; then nothing is copied.
        """
        with _quiet():
            loaded, info = cast(Any, type(self.model)).from_pretrained(
                None,
                config=self.model.config,
                state_dict=dict(state),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # reported, and refused, with the others
                output_loading_info=True,
            )
        lines = [f"{where}: the weights are of another architecture ({len(state)} keys)"]
        for what, held in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"),
                           ("of another shape", "mismatched_keys"), ("unreadable", "error_msgs")):  # fmt: skip
            if items := sorted(map(_shown, info[held])):
                more = ", ..." if len(items) > SHOWN else ""
                lines.append(f"  {len(items)} {what}: {', '.join(items[:SHOWN])}{more}")
        if len(lines) > 1:
            first = {key.partition(".")[0] for key in state}
            if len(first) == 1:
                lines.append(f"  every key begins with '{first.pop()}.': is that a prefix to take away?")
            raise DataError("\n".join(lines))
        self.model.load_state_dict(loaded.state_dict())

    def hub_state(self) -> dict[str, Tensor]:
        """The weights under the hub's names."""
        with tempfile.TemporaryDirectory() as folder, _quiet():
            self.model.save_pretrained(folder, max_shard_size="1TB")
            return read_state(Path(folder) / "model.safetensors")


class Input(NamedTuple):
    """What a model takes: height and width; mean and std on the [0, 1] scale, or None where nothing tells them."""

    size: tuple[int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def make_hugging_face(name: str, folder: Path | None, config: dict[str, Any]) -> tuple[HuggingFace, Input]:
    """A classifier with random weights, as ``folder``'s config.json or, without one, the model type ``name`` says.

    ``config`` overrides entries of its configuration (``num_labels``, ``hidden_size`` ...). ``drop_path_rate``
    works for plain ViTs too, whose configuration has none: stochastic depth that rises linearly from 0.
    ``image_size`` is also taken for models that accept any. Raises UsageError for an unknown type or entry,
    DataError for a folder that is not an image classifier.
    """
    settings = dict(config)
    if folder is None:
        near = difflib.get_close_matches(name, CONFIG_MAPPING, n=3)
        if name not in CONFIG_MAPPING:
            raise UsageError(
                f"classifier.name: transformers has no model type {name!r}; near: {', '.join(near) or 'none'}. "
                "A hub's model is written OWNER/NAME, a folder local-dir:FOLDER"
            )
        kind, described, where = CONFIG_MAPPING[name], {}, f"classifier.name: {name}"
    else:
        described, where = read_description(folder / "config.json"), str(folder)
        if described.get("model_type") not in CONFIG_MAPPING:
            raise DataError(f"{folder}/config.json: transformers has no model type {described.get('model_type')!r}")
        kind = CONFIG_MAPPING[described["model_type"]]
    if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UsageError(f"{where}: {kind.__name__} has no image classifier in transformers")
    known = kind()
    drop_path = 0.0 if hasattr(known, DROP_PATH) else settings.pop(DROP_PATH, 0.0)
    size = None if hasattr(known, "image_size") else settings.pop("image_size", None)
    if unknown := [key for key in settings if key.startswith("_") or not hasattr(known, key)]:
        near = difflib.get_close_matches(unknown[0], known.to_dict(), n=3)
        raise UsageError(f"classifier.config: {where}: {kind.__name__} has no {', '.join(unknown)}; near: "
                         f"{', '.join(near) or 'none'}")  # fmt: skip
    if "num_labels" in settings:
        described = {key: value for key, value in described.items() if key not in ("id2label", "label2id")}
    try:
        final = cast(PreTrainedConfig, kind.from_dict(described | settings))
        model = AutoModelForImageClassification.from_config(final, dtype=torch.float32)
    except (StrictDataclassError, ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{where}: transformers cannot make it with {config}: {reason}") from error
    if drop_path:
        _set_drop_path(model, drop_path)
    backbone = HuggingFace(model)
    if not backbone.heads():
        raise UsageError(f"{where}: {type(model).__name__} has no head that ends in num_labels = {final.num_labels}")
    return backbone, _input(final, folder, size)


def _input(config: PreTrainedConfig, folder: Path | None, size: Any) -> Input:
    file = None if folder is None else folder / "preprocessor_config.json"
    described = read_description(file) if file is not None and file.is_file() else {}
    size = size or getattr(config, "image_size", None) or described.get("crop_size") or described.get("size")
    if isinstance(size, dict):
        size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise UsageError(f"classifier.config: {config.model_type} takes images of any size; set image_size")
    if not described:
        return Input((size[0], size[1]), None, None)
    if not described.get("do_normalize", True):
        return Input((size[0], size[1]), (0.0,), (1.0,))
    # Statistics are those of bytes times the factor; ours of bytes / 255.
    unit = 255 * (described.get("rescale_factor", 1 / 255) if described.get("do_rescale", True) else 1)
    try:
        mean, std = (tuple(value / unit for value in described[key]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: no lists image_mean and image_std; set normalise: half to do without") from error
    if len(mean) != getattr(config, "num_channels", len(mean)):
        mean = std = (0.5,)
    return Input((size[0], size[1]), mean, std)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    layers = [part for part in model.modules() if type(part).__name__ in PLAIN_VITS]
    if not layers:
        raise UsageError(f"finetuning.drop_path: {type(model).__name__} has no drop path; need 0")
    for layer, share in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
        layer.dropout = nn.Sequential(cast(nn.Module, layer.dropout), DropPath(share))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report of differing keys: ours is in the error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _shown(item: Any) -> str:
    return item if isinstance(item, str) else f"{item[0]} {list(item[1])} instead of {list(item[2])}"
