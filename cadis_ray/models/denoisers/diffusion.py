"""One-shot denoising by a diffusion model (Carlini et al. 2023; FT-CADIS appendix A)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.errors import DataError, EnvironmentProblem, UsageError
from cadis_ray.models.checkpoints import load_strictly, read_state
from cadis_ray.models.denoisers.architecture import architecture
from cadis_ray.models.denoisers.schedule import Schedule, make_schedule
from cadis_ray.models.denoisers.unet import Folded, UNet
from cadis_ray.storage.references import resolve, shipped_config

Mode = Literal["diffusion", "pixel"]


class Denoiser(nn.Module):
    """A diffusion network with its schedule. Images (B, C, H, W); x_t, x_start and outputs on the [-1, 1] scale.

    ``time_scale`` turns a timestep of the schedule into what the network was trained on (``rescale_timesteps``);
    ``size_multiple`` divides the height and width it takes. With ``predict_xstart`` the network gives x_start,
    else the noise; output channels beyond the image's are the learned variance and never used.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        *,
        channels: int = 3,
        size_multiple: int = 1,
        time_scale: float = 1.0,
        predict_xstart: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule
        self.channels, self.size_multiple = channels, size_multiple
        self.time_scale, self.predict_xstart = time_scale, predict_xstart
        self._folded: tuple[Any, Folded] | None = None

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma, on images in [0, 1], that has a timestep."""
        return self.schedule.sigma_range

    def timestep(self, sigma: float) -> int:
        """First timestep whose noise is at least sigma. Raises ValueError outside ``sigma_range``."""
        return self.schedule.timestep(sigma)

    def sigma_actual(self, sigma: float) -> float:
        """Std of the noise, on images in [0, 1], that ``denoise`` adds in mode "diffusion": at least ``sigma``."""
        return self.schedule.sigma_at(self.timestep(sigma))

    def unet(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Raw output of the network, (B, C, H, W) or (B, 2C, H, W). ``t`` (B,) integer timesteps of the schedule."""
        if t.is_floating_point() or not 0 <= int(t.min()) <= int(t.max()) < self.schedule.steps:
            raise ValueError(f"timesteps must be integers in [0, {self.schedule.steps - 1}]")
        return self.network(x_t, self._network_time(t))

    def one_shot(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_start in [-1, 1], float32, estimated from x_t in one step; ``t`` (B,) integer timesteps."""
        return self._x_start(x_t, self.unet(x_t, t), self._alpha_bar(t))

    def add_noise(self, images: Tensor, noise: Tensor, sigma: float, mode: Mode = "diffusion") -> Tensor:
        """x_t of images in [0, 1] at ``timestep(sigma)``; ``noise`` is standard normal.

        diffusion: sqrt(abar) (2x - 1) + sqrt(1 - abar) noise, whose noise is ``sigma_actual(sigma)`` >= sigma: a
        certificate for sigma is sound and slightly conservative. pixel: sqrt(abar) (2 (x + sigma noise) - 1), exactly
        sigma (DiffSmooth). Raises ValueError for images outside [0, 1], not finite, or of another shape.
        """
        if images.shape != noise.shape or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images and noise must both be (B, {self.channels}, H, W), but got "
                             f"{tuple(images.shape)} and {tuple(noise.shape)}")  # fmt: skip
        if any(side % self.size_multiple for side in images.shape[2:]):
            raise ValueError(f"height and width must be multiples of {self.size_multiple}, got {tuple(images.shape)}")
        low, high = torch.stack(images.aminmax()).tolist() if images.numel() else (0.0, 1.0)
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise ValueError(f"images must be finite and in [0, 1], but span [{low}, {high}]")
        abar = float(self.schedule.alpha_bar[self.timestep(sigma)])
        if mode == "diffusion":
            return (2 * images - 1).mul_(math.sqrt(abar)).add_(noise, alpha=math.sqrt(1 - abar))
        if mode == "pixel":
            return (images + sigma * noise).mul_(2).sub_(1).mul_(math.sqrt(abar))
        raise ValueError(f"mode must be diffusion or pixel, but got {mode!r}")

    def denoise(self, images: Tensor, noise: Tensor, sigma: float, mode: Mode = "diffusion") -> Tensor:
        """``add_noise``, then x_start in [-1, 1], float32, with the timestep's embeddings computed once.

        Every image is denoised independently of its batch. The smoothed classifier's guarantee needs ``noise`` to be
        standard normal, independent of everything, and fresh for each sample counted.
        """
        x_t = self.add_noise(images, noise, sigma, mode)
        t = self.timestep(sigma)
        abar = float(self.schedule.alpha_bar[t])
        return self._x_start(x_t, self.network(x_t, self._fixed(t, x_t.device, len(x_t))), abar)

    def training_loss(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise (or x_start): Ho et al. 2020, eq. 14. The variance is not trained.

        ``x_start`` and ``noise`` (B, C, H, W), x_start in [-1, 1]; ``t`` (B,) integer timesteps.
        """
        abar = self._alpha_bar(t)
        x_t = abar.sqrt().float() * x_start + (1 - abar).sqrt().float() * noise
        predicted = self.unet(x_t, t)[:, : self.channels]
        return F.mse_loss(predicted.float(), x_start if self.predict_xstart else noise)

    def _x_start(self, x_t: Tensor, output: Tensor, abar: Tensor | float) -> Tensor:
        """The clamped estimate, in float32: at sigma 1 it doubles the error of the predicted noise."""
        output = output[:, : self.channels].float()
        if self.predict_xstart:
            return output.clamp(-1, 1)
        if not isinstance(abar, Tensor):
            return (x_t.float() / math.sqrt(abar)).sub_(output, alpha=math.sqrt(1 / abar - 1)).clamp_(-1, 1)
        scaled = x_t.float() * abar.rsqrt().float() - (1 / abar - 1).sqrt().float() * output
        return scaled.clamp(-1, 1)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        """alpha_bar of every row's timestep, float64 (B, 1, 1, 1)."""
        return torch.from_numpy(self.schedule.alpha_bar).to(t.device)[t][:, None, None, None]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._folded = None  # moved or cast: the allocator may hand out the old addresses again
        return super()._apply(fn, recurse)

    def _network_time(self, t: Tensor) -> Tensor:
        return t if self.time_scale == 1.0 else t.float() * self.time_scale

    def _fixed(self, t: int, device: torch.device, rows: int) -> Tensor | Folded:
        """What the network takes for one timestep: a UNet's weights folded for it, kept until they change."""
        time = self._network_time(torch.tensor([t], device=device))
        if not isinstance(fold := getattr(self.network, "fold", None), Callable):
            return time.expand(rows)
        parameters = list(self.network.parameters())
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return fold(time)
        # versions change when weights are loaded or trained in place, the others when a part is replaced or moved
        key = (t, [(id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in parameters])
        if self._folded is None or self._folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a kept inference tensor would refuse a later gradient
                self._folded = (key, fold(time.clone()))
        return self._folded[1]


def make_denoiser(family: str, config: dict[str, Any] | None = None) -> Denoiser:
    """A denoiser with random weights, in training mode. ``family``: improved_diffusion or guided_diffusion.

    ``config``: the program's arguments; None: the released model's. Raises UsageError listing every wrong argument.
    """
    arch = architecture(family, config)
    return Denoiser(
        UNet(arch).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        make_schedule(arch.noise_schedule, arch.diffusion_steps),
        channels=arch.in_channels,
        size_multiple=2 ** (len(arch.widths) - 1),
        time_scale=1000 / arch.diffusion_steps if arch.rescale_timesteps else 1.0,
        predict_xstart=arch.predict_xstart,
    )


def load_denoiser(
    family: str,
    checkpoint: str | Path | None = None,
    config: dict[str, Any] | None = None,
) -> Denoiser:
    """Load a denoiser: frozen, in evaluation mode, on the CPU.

    Args:
        family: improved_diffusion, guided_diffusion (OpenAI's programs) or diffusers.
        checkpoint: Of the first two, OpenAI's ``.pt``, unchanged, a ``.safetensors`` with the same keys,
            ``package:FILE`` of one that ships with this package, or None: random weights. Of diffusers, the folder of a
            UNet2DModel pipeline.
        config: Arguments of OpenAI's program. None: those of the shipped checkpoint, else of the released model.
            Diffusers takes none.

    Raises:
        UsageError: A wrong family or config, with every wrong argument.
        DataError: The weights are not there, or do not fit.
        EnvironmentProblem: diffusers is not installed.
    """
    if config is None and checkpoint is not None:
        config = shipped_config(str(checkpoint))
    if family == "diffusers":
        if checkpoint is None or config is not None:
            raise UsageError("the family diffusers takes a pipeline's folder as checkpoint, and no config")
        denoiser = load_pipeline(resolve(checkpoint))
    elif checkpoint is None:
        denoiser = make_denoiser(family, config)
    else:
        state = read_state(checkpoint)
        with torch.device("meta"):  # no time for random weights that are overwritten at once
            denoiser = make_denoiser(family, config)
        load_strictly(denoiser.network.to_empty(device="cpu"), state, checkpoint)
    return denoiser.eval().requires_grad_(False)


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
