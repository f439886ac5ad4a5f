"""The coordinator of black-box prompting (BlackVIP, Oh et al. 2023): a pixel prompt for each noisy image."""

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.models.classifiers.classifier import Classifier

FIRST_SIDE, DOUBLINGS = 2, 3  # of the prompt, before it is resized to the image


class Coordinator(nn.Module):
    """Noisy images x + noise (B, C, H, W) on the [-1, 1] scale -> the same plus ``strength`` times a prompt in [-1, 1].

    The frozen ``encoder``'s features of the noisy image and a learned trigger vector go through a small decoder of
    transposed convolutions. The decoder's last layer begins at zero, so that the first prompt is none.

    Soundness: the prompt is a function of x + noise alone. Added to x before the noise it would be a function of x
    that the noise does not smooth, and no certificate would hold.
    """

    def __init__(self, encoder: Classifier, *, channels: int, trigger: int, hidden: int, strength: float, seed: int):
        super().__init__()
        self.encoder, self.strength = encoder.eval().requires_grad_(False), strength
        with torch.inference_mode():
            width = self._features(torch.zeros(1, channels, *encoder.image_size)).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.trigger = nn.Parameter(0.02 * torch.randn(trigger))
            layers: list[nn.Module] = [nn.ConvTranspose2d(width + trigger, hidden, FIRST_SIDE), nn.GELU()]
            for index in range(DOUBLINGS):
                last = index == DOUBLINGS - 1
                layers += [nn.ConvTranspose2d(hidden, channels if last else hidden, 4, stride=2, padding=1)]
                layers += [nn.Tanh() if last else nn.GELU()]
            self.decoder = nn.Sequential(*layers)
        final = cast(nn.ConvTranspose2d, layers[-2])
        nn.init.zeros_(final.weight)
        nn.init.zeros_(cast(Tensor, final.bias))

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self._features(images)
        joined = torch.cat([features, self.trigger.expand(len(images), -1)], dim=1)
        prompt = self.decoder(joined[:, :, None, None])
        return images + self.strength * F.interpolate(prompt, images.shape[-2:], mode="bilinear", antialias=True)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self

    def _features(self, images: Tensor) -> Tensor:
        """What the backbone hands to its head where it says so (timm), its logits else."""
        if images.shape[-2:] != self.encoder.image_size:
            images = F.interpolate(images, self.encoder.image_size, mode="bicubic", antialias=True)
        backbone, images = cast(Any, self.encoder.backbone), images * self.encoder.scale + self.encoder.shift
        if hasattr(backbone, "forward_head"):
            return backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        return backbone(images)
