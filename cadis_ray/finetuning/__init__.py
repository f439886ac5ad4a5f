"""Fine-tuning on denoised images: losses, attack, optimiser, epoch, trial."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss

__all__ = ["ft_cadis_loss"]
__getattr__ = lazy(__name__, {"cadis_ray.finetuning.recipes.ft_cadis": ["ft_cadis_loss"]})
