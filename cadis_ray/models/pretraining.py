"""Making an off-the-shelf classifier and a denoiser for a data set that has none.

Both are ordinary recipes: cross-entropy on clean images, and noise prediction (Ho et al. 2020). Neither sees a noisy
label, a validation image or a test image.
"""

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cadis_ray.models.classifiers import Classifier
from cadis_ray.models.denoisers import Denoiser


def pretrain_classifier(
    classifier: Classifier, images: Tensor, labels: Tensor, *, epochs: int, seed: int, batch_size: int = 64
) -> Iterator[float]:
    """Train in place on images (N, C, H, W) in [0, 1], every other batch shifted by up to one pixel, on average.

    Yields each epoch's mean loss.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(images) / batch_size)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    padded = F.pad(2 * images - 1, (1, 1, 1, 1), value=-1.0)
    size = images.shape[-1]
    classifier.train()
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            shifted = torch.rand((), generator=generator) < 0.5
            top, left = torch.randint(3, (2,), generator=generator).tolist() if shifted else (1, 1)
            logits = classifier(padded[rows, :, top : top + size, left : left + size])
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        yield total / len(images)
    classifier.eval()


def pretrain_denoiser(
    denoiser: Denoiser,
    images: Tensor,
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    report_every: int = 500,
) -> Iterator[tuple[int, float]]:
    """Train in place on images (N, C, H, W) in [0, 1]; yields (step, mean loss since the last).

    Ends with averaged weights.
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    average = copy.deepcopy(denoiser.state_dict())
    x_start = 2 * images - 1
    total = 0.0
    for step in range(1, steps + 1):
        batch = x_start[torch.randint(len(images), (batch_size,), generator=generator)]
        t = torch.randint(denoiser.schedule.steps, (batch_size,), generator=generator)
        noise = torch.randn(batch.shape, generator=generator)
        loss = denoiser.training_loss(batch, t, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for key, value in denoiser.state_dict().items():
                average[key].lerp_(value, 0.002)
        total += loss.item()
        if step % report_every == 0 or step == steps:
            yield step, total / ((step - 1) % report_every + 1)
            total = 0.0
    denoiser.load_state_dict(average)
    denoiser.eval().requires_grad_(False)
