"""Diffusion denoisers: their schedules, networks and weights."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.models.denoisers.diffusion import load_denoiser

__all__ = ["load_denoiser"]
__getattr__ = lazy(__name__, {"cadis_ray.models.denoisers.diffusion": ["load_denoiser"]})
