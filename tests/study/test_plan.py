"""The plan's counts are those of the program that runs."""

from itertools import product
from statistics import NormalDist

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from cadis_ray.data.sources import DATA_SETS
from cadis_ray.finetuning.passes import Passes
from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss
from cadis_ray.smoothing.bounds import max_radius
from cadis_ray.study.plan import Stage, lines, plan, training_set
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


def planned(chosen: Study, trained: int = 0) -> tuple[Stage, ...]:
    return plan(chosen, training_set(chosen), trained)


def test_every_count_is_that_of_an_enumeration() -> None:
    stages = planned(study(), trained=11)
    pooled, tuned, validated, finalists, certified, kept = stages
    train = range(1797 - 300 - 497)
    epochs_of_a_trial, epochs_of_all, noises_of_all = range(3), range(7), range(4)
    pool = {("train", *key) for key in product(train, epochs_of_all, noises_of_all)}
    pool |= {("validation", *key) for key in product(range(40), range(8))}
    assert pooled.denoiser_calls == len(pool)
    assert pooled.bytes == len(pool) * torch.zeros(1, 8, 8, dtype=torch.float16).nbytes
    assert pooled.classifier_calls == Passes()
    assert validated.classifier_calls == Passes(len(list(product(epochs_of_a_trial, range(40), range(8)))))
    winner_and_baselines = ("winner", "long", "wide")
    votes = list(product(winner_and_baselines, range(20), range(10 + 90)))
    assert certified.classifier_calls == Passes(len(votes))
    assert certified.denoiser_calls == len({vote[1:] for vote in votes})
    votes = list(product(("first", "second", "third"), range(300), range(512)))
    assert finalists.classifier_calls == Passes(len(votes))
    assert finalists.denoiser_calls == len({vote[1:] for vote in votes})
    assert (tuned.images, tuned.samples, tuned.denoiser_calls) == (1000, 3 * 3, 0)
    once = 1000 * 3 * (3 + 4 * 3 + 3)
    assert tuned.classifier_calls == Passes(once, once, 1000 * 3 * (3 + 3))
    weights_and_moments = torch.zeros(3, 11).nbytes
    assert kept.bytes == len(list(product(range(6 + 2), range(3)))) * weights_and_moments
    assert [stage.name for stage in stages] == [
        "denoised pool", "fine-tuning", "validation", "finalists", "certification", "checkpoints",
    ]  # fmt: skip


def test_passes_are_those_of_the_loss_where_every_image_is_attacked() -> None:
    torch.manual_seed(0)
    forward = backward = learning = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal forward
            forward += len(images)
            logits = self.layer(images.flatten(1))
            learns = self.layer.weight.requires_grad
            logits.register_hook(lambda gradient: count_backward(len(gradient), learns))
            return logits

    def count_backward(images: int, learns: bool) -> None:
        nonlocal backward, learning
        backward += images
        learning += images * learns

    classifier = Counting()
    clean = torch.rand(5, 1, 8, 8) - 0.5
    denoised = clean + 1e-3 * torch.randn(3, 5, 1, 8, 8)
    labels = classifier.layer(clean.flatten(1)).argmax(1)
    losses = ft_cadis_loss(classifier, clean, denoised, labels, adv_weight=1.0, attack_radius=0.02, attack_steps=4)
    losses.total.backward()
    assert losses.mask_share == 1
    counted = planned(study())[1].classifier_calls
    assert Passes(forward, backward, learning).times(1000 * 3) == counted.times(5)


def test_a_frozen_selection_passes_once_more_forward() -> None:
    plain, frozen = (planned(chosen)[1].classifier_calls for chosen in (study(), study(update_selection="frozen")))
    assert frozen.forward - plain.forward == 1000 * 3 * 3
    assert frozen[1:] == plain[1:]


def test_a_trial_denoises_what_the_pool_does_not_hold() -> None:
    chosen = study()
    of_an_epoch = 1000 * 4 * 64 * 2 / 1e9
    for resources, epochs in (({}, 7), ({"pool_gb": 2.5 * of_an_epoch}, 2), ({"pool": "off"}, 0)):
        limited = chosen.resources.model_copy(update=resources)
        pooled, tuned, *_ = planned(chosen.model_copy(update={"resources": limited}))
        assert pooled.denoiser_calls == 1000 * epochs * 4 + 40 * 8
        assert tuned.denoiser_calls == 1000 * max(3 - epochs, 0) * 3


def test_the_lines_tell_every_large_number() -> None:
    chosen = study()
    pooled, *counted, _ = planned(chosen)
    text = "\n".join(lines(chosen))
    told = [pooled.images, pooled.denoiser_calls]
    for stage in counted:
        told += [stage.images, stage.samples, stage.classifier_calls.forward, stage.classifier_calls.backward]
    assert sum(value > 999 for value in told) > 6
    for value in told:
        assert value <= 999 or f"{value:,}" in text
    assert "M = 3 for the loss, T x M with T = 4 for the attack" in text
    assert f"{pooled.bytes / 1e6:,.1f} MB" in text
    ceiling = 0.5 * NormalDist().inv_cdf(0.001 ** (1 / 90))
    assert max_radius(90, 0.001, 0.5) == pytest.approx(ceiling, rel=1e-12)
    assert f"can certify: {ceiling:.4f};" in text
    assert text.isascii()
    assert len(text.splitlines()) == len(lines(chosen)) == 7


def test_the_known_data_sets_are_as_large_as_they_are() -> None:
    images, _ = load_digits(return_X_y=True)
    assert DATA_SETS["digits"] == (len(images), (1, 8, 8))
    assert images.shape[1] == 1 * 8 * 8
