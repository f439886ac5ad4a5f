"""Making an off-the-shelf classifier and a denoiser for a data set that has none.

Both are ordinary recipes: cross-entropy on clean images, and noise prediction (Ho et al. 2020). Neither sees a noisy
label, a validation image or a test image.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cadis_ray.models.classifiers.classifier import Classifier
from cadis_ray.models.denoisers.diffusion import Denoiser

Read = Callable[[Tensor, int], Tensor]


def pretrain_classifier(
    classifier: Classifier, labels: Tensor, read: Read, *, epochs: int, rate: float, generator: torch.Generator,
    batch_size: int = 64,
) -> Iterator[float]:  # fmt: skip
    """Train in place on images with labels (N,); ``read(rows, epoch)`` gives them augmented, (B, C, H, W) in [0, 1].

    ``rate``: the largest learning rate. Yields each epoch's mean loss.
    """
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(labels) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    classifier.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            logits = classifier(2 * read(rows, epoch) - 1)
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        yield total / len(labels)
    classifier.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Read:
    """Every other batch of images (N, C, H, W) shifted by up to one pixel, into zeros."""
    padded, size = F.pad(images, (1, 1, 1, 1)), images.shape[-1]

    def read(rows: Tensor, epoch: int) -> Tensor:
        moved = torch.rand((), generator=generator) < 0.5
        top, left = torch.randint(3, (2,), generator=generator).tolist() if moved else (1, 1)
        return padded[rows, :, top : top + size, left : left + size]

    return read


def pretrain_denoiser(
    denoiser: Denoiser,
    read: Read,
    images: int,
    *,
    steps: int,
    seed: int,
    timesteps: int | None = None,
    batch_size: int = 64,
    report_every: int = 500,
) -> Iterator[tuple[int, float]]:
    """Train in place on ``images`` images; yields (step, mean loss since the last) and ends with averaged weights.

    ``read(rows, step)`` gives images (B, C, H, W) in [0, 1]; ``timesteps``: the first ones alone, None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    average = copy.deepcopy(denoiser.state_dict())
    total = 0.0
    for step in range(1, steps + 1):
        batch = 2 * read(torch.randint(images, (batch_size,), generator=generator), step) - 1
        t = torch.randint(timesteps or denoiser.schedule.steps, (batch_size,), generator=generator)
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
