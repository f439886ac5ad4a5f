"""diffusers' UNet2DModel pipelines as denoisers. Needs the optional package diffusers."""

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from cadis_ray.errors import DataError, EnvironmentProblem
from cadis_ray.models.denoisers import Denoiser
from cadis_ray.models.schedule import Schedule


class _Sample(nn.Module):
    """Takes the tensor out of diffusers' output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.model(x, timesteps, return_dict=False)[0]


def load_pipeline(folder: Path) -> Denoiser:
    """The denoiser of a pipeline's folder: ``unet/`` with safetensors weights, ``scheduler/scheduler_config.json``.

    Raises DataError for another folder, other weights, or a model that is conditional or predicts velocity;
    EnvironmentProblem where diffusers is not installed.
    """
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    except ImportError as error:
        raise EnvironmentProblem(
            "the family diffusers needs the package: pip install 'cadis-ray[diffusers]'"
        ) from error
    try:
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        loaded: Any = UNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: not a UNet2DModel pipeline with unet/*.safetensors and scheduler/ ({error})"
        ) from error
    wrong = {what: list(keys)[:3] for what, keys in info.items() if keys}
    if wrong:
        raise DataError(f"{folder}: the weights are of another architecture: {wrong}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "sample") or model.config.num_class_embeds or model.config.class_embed_type:
        raise DataError(f"{folder}: needs an unconditional model that predicts epsilon or sample, not {prediction}")
    betas: Tensor = cast(Any, DDPMScheduler.from_config(scheduler)).betas
    return Denoiser(
        _Sample(model),
        Schedule((1 - betas.double()).cumprod(0).numpy()),
        channels=model.config.in_channels,
        size_multiple=2 ** (len(model.config.block_out_channels) - 1),
        predict_xstart=prediction == "sample",
    )
