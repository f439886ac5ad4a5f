"""Off-the-shelf classifiers behind one interface: images in [-1, 1] of any resolution -> logits."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.errors import UsageError
from cadis_ray.models.checkpoints import load_strictly, read_state


class Classifier(nn.Module):
    """``backbone`` behind resizing and normalisation: float images (B, C, H, W) in [-1, 1] -> logits (B, K).

    ``image_size``: images of another height and width are resized to it (bicubic with antialiasing, not
    clamped). ``mean`` and ``std``: what the backbone wants subtracted and divided, per channel or one for
    all, on the [0, 1] scale; 0.5 and 0.5 leave the images bit for bit as they are. ``heads``: names of the
    backbone's modules that map features to classes. The state dict is the backbone's, each key after
    ``backbone.``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: tuple[int, int],
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        heads: tuple[str, ...] = ("head",),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = image_size
        self.heads = heads
        means, stds = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        # ((x + 1) / 2 - mean) / std
        self.register_buffer("scale", 0.5 / stds, persistent=False)
        self.register_buffer("shift", (0.5 - means) / stds, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True)
        return self.backbone(images * self.scale + self.shift)


def load_classifier(
    library: Literal["timm"],
    name: str,
    checkpoint: str | None,
    config: dict[str, Any],
    normalise: Literal["own", "half"],
) -> Classifier:
    """A classifier on the CPU, in evaluation mode, ready for ``add_lora`` or full fine-tuning.

    ``name``: timm's. ``config``: keyword arguments of its constructor (``num_classes``, ``img_size``,
    ``drop_path_rate`` ...). ``checkpoint``: file of the backbone's weights, loaded strictly; None leaves
    timm's random initialisation. ``normalise``: "own" takes mean and std of the model's pretrained
    configuration, or 0.5 where the model has another number of channels; "half" takes 0.5, as the FT-CADIS
    runs did.

    Raises UsageError for an unknown model or an argument it does not take, DataError for a checkpoint that
    does not fit.
    """
    if library != "timm":
        raise UsageError(f"classifier.library: got {library!r}; allowed: timm")
    try:
        backbone = timm.create_model(name, pretrained=False, **config)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = "" if timm.is_model(name.split(".")[0]) else f"; near: {', '.join(near) or 'none'}"
        raise UsageError(f"classifier: timm cannot make {name!r} with {config}: {error}{hint}") from error
    if checkpoint is not None:
        load_strictly(backbone, read_state(checkpoint), checkpoint)
    own = cast(dict[str, Any], backbone.pretrained_cfg)
    channels, *size = own["input_size"]
    if normalise == "half" or config.get("in_chans", channels) != len(own["mean"]):
        own = own | {"mean": (0.5,), "std": (0.5,)}
    size = config.get("img_size", size)
    head = cast(Any, backbone).get_classifier()
    ends = head if isinstance(head, tuple) else (head,)
    return Classifier(
        backbone,
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=own["mean"],
        std=own["std"],
        heads=tuple(key for key, module in backbone.named_modules() if any(module is end for end in ends)),
    ).eval()


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode; afterwards every part is in the mode it had."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
