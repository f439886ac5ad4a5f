"""Off-the-shelf classifiers behind one interface: images in [-1, 1] of any resolution -> logits."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.checkpoints import load_strictly, read_state
from cadis_ray.models.classifiers.hub import folder_weights, hub_folder
from cadis_ray.models.classifiers.resnet import MEAN, SIZE, STD, make_resnet
from cadis_ray.storage.references import HUB, LOCAL, shipped_config

Library = Literal["timm", "transformers", "resnet"]
Normalise = Literal["own", "half"]
HALF = (0.5,)


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
    library: Library,
    name: str,
    checkpoint: str | None = None,
    config: dict[str, Any] | None = None,
    normalise: Normalise = "own",
    *,
    download: bool = False,
    prefix: str = "",
) -> Classifier:
    """Load a classifier: float images (B, C, H, W) in [-1, 1] -> logits (B, K), in evaluation mode, on the CPU.

    It is ready for ``add_lora`` or full fine-tuning. Resizing is ours, whatever a folder says.

    Args:
        library: timm, transformers or resnet.
        name: timm's; a model type of transformers ("vit"); "resnet110" and its kin (``models.classifiers.resnet``).
            For timm and transformers also a folder laid out as on the Hugging Face hub, ``local-dir:FOLDER``, or the
            hub's own name, ``hf-hub:OWNER/NAME[@REVISION]`` (transformers: OWNER/NAME will do), found in the local
            cache. These bring their weights; so does a name of timm with ``download``.
        checkpoint: File of the backbone's weights (safetensors, or a pickle of tensors), instead of the name's;
            ``package:FILE`` of one that ships with this package. Keys and shapes must agree. Without any weights the
            initialisation is random.
        config: Keyword arguments of timm's constructor (``num_classes``, ``img_size``, ``drop_path_rate`` ...), entries
            of transformers' configuration (``num_labels``, ``image_size`` ...), ``num_classes`` and ``in_chans`` of
            resnet. None: those of the shipped checkpoint, else no arguments.
        normalise: "own" takes mean and std of timm's pretrained configuration, of the folder's
            preprocessor_config.json, or those of CIFAR-10 for resnet, and 0.5 where images have another number of
            channels than these; "half" takes 0.5, as the FT-CADIS runs did.
        download: Whether weights may come from the hub. Nothing is downloaded otherwise.
        prefix: Taken from every key of the checkpoint ("1." of Cohen et al.'s, "module." of data parallelism).

    Raises:
        UsageError: An unknown model, or an argument that it does not take.
        DataError: A folder is not there, or a checkpoint does not fit.
        EnvironmentProblem: A download fails.
    """
    if config is None:
        config = (shipped_config(checkpoint) if checkpoint else None) or {}
    try:
        load = {"timm": _timm, "transformers": _transformers, "resnet": _resnet}[library]
    except KeyError:
        raise UsageError(f"classifier.library: got {library!r}; allowed: timm, transformers, resnet") from None
    return load(name, checkpoint, config, normalise, download, prefix).eval()


def load_weights(backbone: nn.Module, state: Mapping[str, Tensor], where: str | Path, prefix: str = "") -> None:
    """Copies weights under the keys of the library's checkpoints into a backbone without adapters.

    Raises DataError, and copies nothing, where a key lacks ``prefix`` or keys or shapes differ.
    """
    if others := [key for key in state if not key.startswith(prefix)]:
        raise DataError(f"{where}: {len(others)} of {len(state)} keys do not begin with the prefix {prefix!r}: "
                        f"{', '.join(others[:3])}")  # fmt: skip
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    if (load := getattr(backbone, "load_hub_state", None)) is not None:
        load(state, where)
    else:
        load_strictly(backbone, state, where)


def _timm(
    name: str, checkpoint: str | None, config: dict[str, Any], normalise: Normalise, download: bool, prefix: str
) -> Classifier:
    folder = hub_folder(name, download)
    try:
        backbone = timm.create_model(f"{LOCAL}{folder}" if folder else name, pretrained=False, **config)
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = "" if folder or timm.is_model(name.split(".")[0]) else f"; near: {', '.join(near) or 'none'}"
        raise UsageError(f"classifier: timm cannot make {name!r} with {config}: {error}{hint}") from error
    own = cast(dict[str, Any], backbone.pretrained_cfg)
    if folder is None and checkpoint is None and download:
        if not own.get("hf_hub_id"):
            raise UsageError(f"classifier.name: timm has no weights on the hub for {name!r}; set checkpoint")
        folder = hub_folder(f"{HUB}{own['hf_hub_id']}", download)
    _load(backbone, checkpoint, folder, prefix)
    channels, *size = own["input_size"]
    if normalise == "half" or config.get("in_chans", channels) != len(own["mean"]):
        own = own | {"mean": HALF, "std": HALF}
    size = config.get("img_size", size)
    head = cast(Any, backbone).get_classifier()
    ends = head if isinstance(head, tuple) else (head,)
    return Classifier(
        backbone,
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=own["mean"],
        std=own["std"],
        heads=tuple(key for key, module in backbone.named_modules() if any(module is end for end in ends)),
    )


def _transformers(
    name: str, checkpoint: str | None, config: dict[str, Any], normalise: Normalise, download: bool, prefix: str
) -> Classifier:
    from cadis_ray.models.classifiers.hugging_face import make_hugging_face  # transformers takes seconds to import

    folder = hub_folder(f"{HUB}{name}" if "/" in name and ":" not in name else name, download)
    backbone, takes = make_hugging_face(name, folder, config)
    _load(backbone, checkpoint, folder, prefix)
    mean, std = (HALF, HALF) if normalise == "half" else (takes.mean, takes.std)
    if mean is None or std is None:
        raise UsageError(f"classifier.normalise: {name} comes without preprocessor_config.json, which "
                         "would tell its own mean and std; set normalise: half")  # fmt: skip
    return Classifier(backbone, image_size=takes.size, mean=mean, std=std, heads=backbone.heads())


def _resnet(
    name: str, checkpoint: str | None, config: dict[str, Any], normalise: Normalise, download: bool, prefix: str
) -> Classifier:
    if download:
        raise UsageError("classifier.download: the library resnet has nothing to download; set checkpoint")
    backbone = make_resnet(name, config)
    _load(backbone, checkpoint, None, prefix)
    own = normalise == "own" and backbone.conv1.in_channels == len(MEAN)
    mean, std = (MEAN, STD) if own else (HALF, HALF)
    return Classifier(backbone, image_size=(SIZE, SIZE), mean=mean, std=std, heads=("fc",))


def _load(backbone: nn.Module, checkpoint: str | None, folder: Path | None, prefix: str) -> None:
    if next(backbone.parameters()).is_meta:
        return  # only its shapes are asked for
    weights = folder_weights(folder) if checkpoint is None and folder else checkpoint
    if weights is not None:
        load_weights(backbone, read_state(weights), weights, prefix)


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
