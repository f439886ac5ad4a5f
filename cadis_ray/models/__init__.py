"""Networks and their weights: denoisers, classifiers, adapters."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.models.classifiers.classifier import load_classifier
    from cadis_ray.models.denoisers.diffusion import load_denoiser

__all__ = ["load_classifier", "load_denoiser"]
__getattr__ = lazy(
    __name__,
    {
        "cadis_ray.models.classifiers.classifier": ["load_classifier"],
        "cadis_ray.models.denoisers.diffusion": ["load_denoiser"],
    },
)
