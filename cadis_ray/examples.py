"""What a base classifier is shown: images, their noisy copies, and what the denoiser makes of these.

A denoiser may hallucinate: make of the noise a clean image of another class, which a classifier then takes for it with
confidence. FT-CADIS masks such images in training; its figure 2 shows them.
"""

import numpy as np
import torch
from torch import Tensor

from cadis_ray.certification import Request, certified_images
from cadis_ray.finetuning.base_classifier import load_base, load_view, view_of
from cadis_ray.models.black_box import BlackBoxModel
from cadis_ray.results import Examples
from cadis_ray.smoothing.noise import Stream, gaussian

LOOKED_AT, SHOWN = 64, 8
STREAM = Stream.AUDIT  # no certificate counts it


@torch.inference_mode()
def make_examples(request: Request, name: str, device: str) -> Examples | None:
    """The base classifier ``name`` on one noisy copy each of the first certified images, those with the surest answers.

    At most half of them are those taken for a wrong class. None for a black box: its queries cost.
    """
    configuration, checkpoint = request.models[name].configuration, request.models[name].checkpoint
    classifier = load_base(configuration, checkpoint).to(device)
    if isinstance(classifier, BlackBoxModel):
        return None
    test, _ = certified_images(request.base)
    test = test.first(min(LOOKED_AT, len(test.ids)))
    images = test.read(torch.arange(len(test.ids))).to(device)
    noise = gaussian(request.seed, STREAM, test.ids, torch.zeros_like(test.ids), images.shape[1:], device)
    view = load_view(request.base, view_of(configuration), device)(images, noise)
    confidence, predict = classifier(view).float().softmax(dim=1).cpu().max(dim=1)
    rows = _surest(confidence, predict == test.labels)
    shown = {"clean": images, "noisy": images + request.base.sigma * noise, "seen": (view + 1) / 2}
    return Examples(
        name=name,
        idx=test.ids[rows].numpy(),
        label=test.labels[rows].numpy(),
        predict=predict[rows].numpy(),
        confidence=confidence[rows].numpy(),
        **{key: _bytes(pixels[rows]) for key, pixels in shown.items()},
    )


def _surest(confidence: Tensor, correct: Tensor) -> Tensor:
    """At most SHOWN rows: correct ones, then wrong ones, each the surest first."""
    order = confidence.argsort(descending=True, stable=True)
    right, wrong = order[correct[order]], order[~correct[order]]
    half = SHOWN // 2
    wrong = wrong[: max(half, SHOWN - len(right))]
    return torch.cat([right[: SHOWN - len(wrong)], wrong])


def _bytes(pixels: Tensor) -> np.ndarray:
    """(N, C, H, W) on [0, 1], clamped, as (N, H, W, C) uint8."""
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
