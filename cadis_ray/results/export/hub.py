"""A classifier written as the Hugging Face hub lays it out, for its own library to load."""

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from cadis_ray.errors import UsageError
from cadis_ray.models.checkpoints import write_safetensors
from cadis_ray.models.classifiers.classifier import Classifier
from cadis_ray.models.classifiers.hub import WEIGHTS


def hub_state(classifier: Classifier) -> dict[str, Tensor]:
    """The backbone's weights under its library's own names."""
    named = getattr(classifier.backbone, "hub_state", None)
    return named() if named is not None else classifier.backbone.state_dict()


def write_hub_folder(folder: Path, classifier: Classifier, library: str) -> None:
    """Write config.json, model.safetensors and, for transformers, preprocessor_config.json; adapters must be merged.

    The layout is the classifier's alone: the library knows neither denoiser nor smoothing. Raises UsageError for a
    library without such a layout.
    """
    if library not in ("timm", "transformers"):
        raise UsageError(f"--to hf: the library {library} has no layout on the hub; use --to safetensors or mlflow")
    folder.mkdir(parents=True, exist_ok=True)
    std = 0.5 / classifier.scale.flatten()
    mean = (0.5 - classifier.shift.flatten() * std).tolist()
    backbone, size = cast(Any, classifier.backbone), classifier.image_size
    if library == "timm":
        from timm.models._hub import save_config_for_hf  # the public functions upload too

        settings = {"mean": mean, "std": std.tolist()}
        save_config_for_hf(backbone, str(folder / "config.json"), data_config=settings)
    else:
        backbone.model.config.save_pretrained(folder)
        takes = {
            "do_resize": True, "size": {"height": size[0], "width": size[1]}, "resample": 3,  # bicubic
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": mean, "image_std": std.tolist(),
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(takes, indent=2) + "\n")
    write_safetensors(folder / WEIGHTS[0], hub_state(classifier))
