"""The augmentations of the papers, addressed by (seed, epoch, image): repeating one needs no state.

FT-CADIS, appendix, as in its official program: CIFAR-10 a random shift by up to 4 pixels into zeros
(RandomCrop(32, padding=4)) and a flip; ImageNet torchvision's RandomResizedCrop (bilinear, antialiased) and a flip.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cadis_ray.smoothing.noise import WORD, philox4x32

Augmentation = Literal["none", "cifar10", "imagenet"]

SHIFT = 4
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
AUGMENTATION = 1  # the counter's last word, which is 0 for noise: the two never share a draw


def augment(
    images: Tensor | Sequence[Tensor],
    ids: Tensor,
    epoch: int,
    seed: int,
    kind: Augmentation,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Augmented images (B, C, H, W) in [0, 1] of images (B, C, H, W) in [0, 1].

    ``ids`` int64 (B,), ``epoch`` and ``seed`` are in [0, 2**32). For imagenet, images may be a list of (C, h, w) of
    any sizes with the (H, W) to crop to as ``size``. The result of an image depends on nothing but its pixels,
    its id, epoch and seed.
    """
    if kind == "none":
        return images if isinstance(images, Tensor) else torch.stack(list(images))
    chance = _uniforms(ids, epoch, seed, 1 + 4 * TRIES if kind == "imagenet" else 3)
    if kind == "cifar10":
        changed = [_shifted(image, *own[1:].tolist()) for image, own in zip(images, chance, strict=True)]
    else:
        target = size or (int(images[0].shape[-2]), int(images[0].shape[-1]))
        changed = [_resized_crop(image, own[1:].tolist(), target) for image, own in zip(images, chance, strict=True)]
    batch = torch.stack(changed)
    return torch.where(chance[:, 0, None, None, None].to(batch.device) < 0.5, batch.flip(-1), batch)


def crop_box(height: int, width: int, chance: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop.

    ``chance``: four uniform numbers in [0, 1) for each try: area, ratio, top, left. Where no try fits, the largest
    central box whose ratio is allowed.
    """
    for area, ratio, top, left in zip(*[iter(chance)] * 4, strict=True):
        target = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        aspect = math.exp(math.log(RATIO[0]) + ratio * math.log(RATIO[1] / RATIO[0]))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniforms(ids: Tensor, epoch: int, seed: int, count: int) -> Tensor:
    """(B, count) float64 in [0, 1)."""
    ids = ids.cpu()[:, None]
    index = torch.arange(-(-count // 4))[None]
    epochs, last = torch.full_like(ids, epoch), torch.full_like(ids, AUGMENTATION)
    words = torch.stack(philox4x32((index, epochs, ids, last), (seed, 0)), dim=-1)
    return words.flatten(1)[:, :count].double() / WORD


def _shifted(image: Tensor, down: float, right: float) -> Tensor:
    top, left = int(down * (2 * SHIFT + 1)), int(right * (2 * SHIFT + 1))
    height, width = image.shape[-2:]
    return F.pad(image, [SHIFT] * 4)[:, top : top + height, left : left + width]


def _resized_crop(image: Tensor, chance: list[float], size: tuple[int, int]) -> Tensor:
    top, left, height, width = crop_box(int(image.shape[-2]), int(image.shape[-1]), chance)
    box = image[None, :, top : top + height, left : left + width]
    return F.interpolate(box, list(size), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
