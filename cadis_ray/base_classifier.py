"""The base classifier of the smoothed one: a function from x + noise to a vote, the same in search and certification.

It has two steps. The first adds the noise, and denoises where the kind wants it; it is shared by all models with the
same view. The second turns the view into logits. Whatever a recipe adds to a model acts in the second step, on
x + noise: what acted on x before the noise would void every certificate.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from cadis_ray.finetuning.checkpoint import load_finetuned, model_identity
from cadis_ray.models.denoisers import load_denoiser
from cadis_ray.models.local_smoothing import LocalSmoothing
from cadis_ray.smoothing.sampling import Denoise
from cadis_ray.storage.identity import identity
from cadis_ray.trial_sections import Configuration

View = Literal["denoised", "noisy"]


def view_of(configuration: Configuration) -> View:
    """What the second step takes, on the [-1, 1] scale: denoised images, or the noisy ones themselves."""
    return "noisy" if configuration.kind in ("classify", "black_box") else "denoised"


def add_noise(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """2 (x + sigma noise) - 1, not clamped: noisy images on the classifiers' scale. ``images`` in [0, 1]."""
    return (images + sigma * noise).mul_(2).sub_(1)


def load_view(base: Configuration, view: View, device: str = "cpu") -> Denoise:
    """The first step, (images, noise) -> view, with the base's sigma and denoiser."""
    if view == "noisy":
        return partial(add_noise, sigma=base.sigma)
    model = base.denoiser
    denoiser = load_denoiser(model.family, model.checkpoint, model.config).to(device)
    return partial(denoiser.denoise, sigma=base.sigma, mode=model.noise)


def as_base(configuration: Configuration, classifier: nn.Module) -> nn.Module:
    """The second step: the view (B, C, H, W) -> logits (B, K), each image by itself."""
    local = configuration.base_classifier
    if configuration.kind == "local_smoothing":
        return LocalSmoothing(classifier, local.local_noises, local.local_sigma, local.local_seed)
    return classifier


def load_base(configuration: Configuration, checkpoint: Path | None) -> nn.Module:
    """The second step with the weights to certify, in evaluation mode; ``checkpoint`` None: off the shelf."""
    return as_base(configuration, load_finetuned(configuration, checkpoint)).eval()


def base_identity(configuration: Configuration, checkpoint: Path | None) -> str:
    """SHA-256 of all that makes the second step what it is."""
    model = model_identity(configuration, checkpoint)
    if configuration.kind == "denoise_then_classify":
        return model
    content: dict[str, Any] = {"kind": configuration.kind, "model": model}
    if configuration.kind == "local_smoothing":
        content |= configuration.base_classifier.model_dump(mode="json", exclude={"kind"})
    return identity(content)


def view_identity(base: Configuration, view: View) -> str:
    """SHA-256 of all that makes the first step what it is, but for sigma; how numbers are rounded is part of it."""
    denoiser = base.denoiser.model_dump(mode="json") if view == "denoised" else {"view": view}
    return identity(denoiser | {"precision": base.certification.precision})
