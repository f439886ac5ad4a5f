"""Fine-tuning on denoised images: losses, attack, optimiser, epoch."""

from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss

__all__ = ["ft_cadis_loss"]
