"""The plan's counts are those of the program that runs."""

from dataclasses import asdict
from itertools import product
from statistics import NormalDist

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from cadis_ray.data.sources import DATA_SETS
from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss
from cadis_ray.study.plan import lines, plan
from cadis_ray.study.study import Study


def study(**finetuning: object) -> Study:
    model = {"checkpoint": "x.safetensors"}
    base = {
        "data": {"name": "digits", "validation": 300, "test": 497},
        "sigma": 0.5,
        "denoiser": {"family": "improved_diffusion", **model},
        "classifier": {"library": "timm", "name": "vit", **model},
        "finetuning": {"epochs": 3, "num_noises": 2, "attack_steps": 5, **finetuning},
        "validation": {"images": 40, "samples": 8},
        "certification": {"images": 20, "n0": 10, "n": 90, "radii": [0, 0.25]},
    }
    return Study.model_validate(
        {
            "name": "small",
            "trials": 6,
            "base": base,
            "space": {
                "finetuning.num_noises": {"choices": [1, 3]},
                "finetuning.attack_steps": {"low": 1, "high": 4, "integer": True, "log": True},
            },
            "baselines": {"long": {"finetuning.epochs": 7}, "wide": {"finetuning.num_noises": 4}},
        }
    )


def test_every_count_is_that_of_an_enumeration() -> None:
    counted = plan(study())
    train = range(1797 - 300 - 497)
    epochs_of_a_trial, epochs_of_all, noises_of_all = range(3), range(7), range(4)
    pool = {("train", *key) for key in product(train, epochs_of_all, noises_of_all)}
    pool |= {("validation", *key) for key in product(range(40), range(8))}
    assert counted.pool_images == len(pool)
    assert counted.pool_bytes == len(pool) * torch.zeros(1, 8, 8, dtype=torch.float16).nbytes
    assert counted.validation_passes == len(list(product(epochs_of_a_trial, range(40), range(8))))
    winner_and_baselines = ("winner", "long", "wide")
    assert counted.certification_passes == len(list(product(winner_and_baselines, range(20), range(10 + 90))))
    assert counted.radius_ceiling == pytest.approx(0.5 * NormalDist().inv_cdf(0.001 ** (1 / 90)), rel=1e-12)
    assert (counted.epochs, counted.num_noises, counted.attack_steps) == (3, 3, 4)
    assert counted.backward_passes == counted.forward_passes == 1000 * 3 * (3 + 4 * 3 + 3)


def test_passes_are_those_of_the_loss_where_every_image_is_attacked() -> None:
    torch.manual_seed(0)
    forward = backward = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal forward
            forward += len(images)
            logits = self.layer(images.flatten(1))
            logits.register_hook(count_backward)
            return logits

    def count_backward(gradient: torch.Tensor) -> None:
        nonlocal backward
        backward += len(gradient)

    classifier = Counting()
    clean = torch.rand(5, 1, 8, 8) - 0.5
    denoised = clean + 1e-3 * torch.randn(3, 5, 1, 8, 8)
    labels = classifier.layer(clean.flatten(1)).argmax(1)
    losses = ft_cadis_loss(classifier, clean, denoised, labels, adv_weight=1.0, attack_radius=0.02, attack_steps=4)
    losses.total.backward()
    assert losses.mask_share == 1
    counted = plan(study())
    assert forward * 1000 * 3 == 5 * counted.forward_passes
    assert backward * 1000 * 3 == 5 * counted.backward_passes


def test_a_frozen_selection_passes_once_more_forward() -> None:
    plain, frozen = plan(study()), plan(study(update_selection="frozen"))
    assert frozen.forward_passes - plain.forward_passes == 1000 * 3 * 3
    assert frozen.backward_passes == plain.backward_passes


def test_the_lines_tell_every_large_number() -> None:
    counted = plan(study())
    text = "\n".join(lines(counted))
    for value in asdict(counted).values():
        if isinstance(value, int) and value > 999 and value != counted.pool_bytes:
            assert f"{value:,}" in text
    assert f"{counted.radius_ceiling:.4f}" in text
    assert text.isascii()
    assert len(text.splitlines()) == len(lines(counted))


def test_the_known_data_sets_are_as_large_as_they_are() -> None:
    images, _ = load_digits(return_X_y=True)
    assert DATA_SETS["digits"] == (len(images), (1, 8, 8))
    assert images.shape[1] == 1 * 8 * 8
