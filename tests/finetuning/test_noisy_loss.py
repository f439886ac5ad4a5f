"""Gaussian augmentation and SmoothAdv against closed forms and autograd in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cadis_ray.finetuning.inputs import Noisy
from cadis_ray.finetuning.recipes.ft_cadis import mean_ce_loss
from cadis_ray.finetuning.recipes.noisy import attack_step, perturbation, smoothadv_loss
from cadis_ray.smoothing.noise import Stream, gaussian

SHAPE = (2, 3, 3)


def chance(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Curved(nn.Module):
    """A smooth classifier of three classes in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(chance(1, 18, 5)), nn.Parameter(chance(2, 5, 3))

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.first) @ self.second


CLEAN = chance(3, 4, *SHAPE).clamp(-0.8, 0.8)
NOISY = CLEAN + chance(4, 5, 4, *SHAPE)
LABELS = torch.tensor([0, 2, 1, 2])


def objective(model: nn.Module, delta: Tensor, row: int) -> Tensor:
    """-log of the mean probability of one image's label, as SmoothAdv defines it."""
    probabilities = model(NOISY[:, row] + delta).softmax(1)[:, LABELS[row]]
    return -torch.log(probabilities.mean())


def test_the_attack_step_is_autograds_gradient_then_box_then_ball() -> None:
    model, delta = Curved(), 0.1 * chance(5, 4, *SHAPE)
    stepped = attack_step(model, CLEAN, NOISY, LABELS, delta, radius=0.5, length=0.3)
    for row in range(4):
        (gradient,) = torch.autograd.functional.jacobian(lambda d, row=row: objective(model, d, row)[None], delta[row])
        moved = delta[row] + 0.3 * gradient / gradient.norm()
        moved = torch.clamp(CLEAN[row] + moved, -1, 1) - CLEAN[row]
        moved = moved * min(1.0, 0.5 / float(moved.norm()))
        assert torch.allclose(stepped[row], moved, atol=1e-12)


@torch.no_grad()
def test_the_gradient_is_that_of_finite_differences() -> None:
    model, delta = Curved(), torch.zeros_like(CLEAN)
    step = attack_step(model, CLEAN, NOISY, LABELS, delta, radius=9.0, length=1e-6)
    for row in range(4):
        direction = step[row] / 1e-6
        rise = objective(model, 1e-4 * direction, row) - objective(model, -1e-4 * direction, row)
        slopes = [
            float(
                objective(model, 1e-4 * unit.reshape(SHAPE), row) - objective(model, -1e-4 * unit.reshape(SHAPE), row)
            )
            for unit in torch.eye(18, dtype=torch.float64)
        ]
        assert float(rise) == pytest.approx(float(np.linalg.norm(slopes)), rel=1e-5)  # the steepest direction


def test_an_attack_stays_in_ball_and_box_and_raises_the_loss_with_the_noises_fixed() -> None:
    model = Curved()
    delta = perturbation(model, CLEAN, NOISY, LABELS, radius=0.7, steps=8)
    assert (delta.flatten(1).norm(dim=1) <= 0.7 + 1e-12).all()
    assert (CLEAN + delta).abs().max() <= 1
    before, after = (
        torch.stack([objective(model, d[row], row) for row in range(4)]) for d in (torch.zeros_like(delta), delta)
    )
    assert (after > before).all()
    losses = smoothadv_loss(model, CLEAN, NOISY, LABELS, radius=0.7, steps=8)
    probabilities = torch.stack([model(noisy + delta).softmax(1) for noisy in NOISY])
    expected = -probabilities[:, range(4), LABELS].log().mean()
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_no_steps_is_gaussian_augmentation_and_a_flat_model_is_not_attacked() -> None:
    model = Curved()
    plain = mean_ce_loss(model, NOISY, LABELS)
    assert smoothadv_loss(model, CLEAN, NOISY, LABELS, radius=0.7, steps=0).total.item() == plain.total.item()
    flat = Curved()
    nn.init.zeros_(flat.second)
    assert (perturbation(flat, CLEAN, NOISY, LABELS, radius=0.7, steps=3) == 0).all()
    assert mean_ce_loss(flat, NOISY, LABELS).total.item() == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match="need noisy"):
        mean_ce_loss(model, NOISY, LABELS[:3])


def test_noisy_images_are_those_of_the_address_not_clamped() -> None:
    images, ids = torch.rand(6, *SHAPE), torch.arange(10, 16)
    noisy = Noisy(lambda rows: images[rows], ids, 0.5, 3, Stream.TRAINING, first=1 << 16, samples=4)
    rows = np.array([4, 1])
    found = noisy[1:3, rows]
    for place, (draw, row) in enumerate((d, r) for d in (1, 2) for r in rows):
        noise = gaussian(3, Stream.TRAINING, ids[row : row + 1], torch.tensor([(1 << 16) + draw]), SHAPE)[0]
        assert np.allclose(found.reshape(4, *SHAPE)[place], 2 * (images[row] + 0.5 * noise) - 1, atol=1e-6)
    assert noisy.shape == (4, 6)
    assert np.abs(noisy[:, np.arange(6)]).max() > 1
