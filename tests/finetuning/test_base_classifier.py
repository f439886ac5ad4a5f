"""Kinds of base classifier: the same function in search and certification, with votes of their own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cadis_ray.certification.counting import Count
from cadis_ray.certification.request import Model, Request, certified_images
from cadis_ray.data import DataSet, load
from cadis_ray.finetuning.base_classifier import as_base, base_identity, load_base, load_view, view_identity, view_of
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.trial import trial_epochs
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.models.local_smoothing import LocalSmoothing
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.study.load import load_study
from cadis_ray.study.study import changed, configuration
from tests.helpers.places import DIGITS

STUDY = load_study(DIGITS)
KINDS = ("denoise_then_classify", "classify", "local_smoothing", "black_box")
BEHIND = {"black_box.endpoint": "cadis_ray.models.shipped:digits", "black_box.classes": 10}
SAMPLES, SEED = 4, 5


def of_kind(kind: str | None, **more: Any) -> Configuration:
    changes = {f"finetuning.{key}": value for key, value in more.items()} | BEHIND
    return configuration(STUDY, {"finetuning.recipe": "none", "base_classifier.kind": kind, **changes})


@pytest.fixture(scope="module")
def data() -> DataSet:
    whole = load(STUDY.base.data)
    return DataSet("digits", 10, whole.train.first(96), whole.validation.first(20), whole.test.first(10))


@pytest.mark.parametrize(
    ("recipe", "kind", "expected"),
    [
        ("ft_cadis", None, "denoise_then_classify"),
        ("none", None, "denoise_then_classify"),
        ("gaussian", None, "classify"),
        ("smoothadv", None, "classify"),
        ("gaussian", "local_smoothing", "local_smoothing"),
        ("none", "classify", "classify"),
    ],
)
def test_the_recipe_says_the_kind_unless_the_file_does(recipe: str, kind: str | None, expected: str) -> None:
    assert of_kind(kind, recipe=recipe).kind == expected


def test_what_changes_votes_changes_their_key() -> None:
    kinds = [of_kind(kind) for kind in KINDS]
    kinds += [changed(kinds[3], {"black_box.version": "2"})]
    local = "base_classifier.local_"
    kinds += [changed(kinds[2], {f"{local}{key}": value}) for key, value in
              {"noises": 6, "sigma": 0.3, "seed": 1}.items()]  # fmt: skip
    assert len({base_identity(kind, None) for kind in kinds}) == len(kinds)
    unused = changed(kinds[0], {f"{local}sigma": 0.3})
    assert base_identity(unused, None) == base_identity(kinds[0], None)
    assert view_identity(STUDY.base, "noisy") != view_identity(STUDY.base, "denoised")
    other = changed(STUDY.base, {"denoiser.noise": "pixel"})
    assert view_identity(STUDY.base, "noisy") == view_identity(other, "noisy")
    assert view_identity(STUDY.base, "denoised") != view_identity(other, "denoised")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_and_the_certification_count_the_same_votes(kind: str, data: DataSet) -> None:
    """On the search's stream and images both must say the same, whatever else is counted beside it."""
    chosen = of_kind(kind)
    base = changed(chosen, {"certification.images": 10, "certification.mode": "estimate"})
    actor = Count(Request(base, {name: Model(of_kind(name), None) for name in KINDS}, SEED), 64, "cpu", 1)
    test, _ = certified_images(base)
    item = {"rows": list(range(10)), "models": list(KINDS), "stream": 0, "start": 0, "size": SAMPLES, "block": SAMPLES}
    (answer,) = actor(item)
    whole = DataSet("digits", 10, data.train, test, data.validation)
    denoised = pooled(base, test.images, test.ids)
    (epoch,) = trial_epochs(chosen, whole, lambda _: denoised, denoised, seed=SEED)
    found = answer["votes"][KINDS.index(kind)]
    assert np.abs(found - epoch.counts).sum() <= (0 if kind in ("classify", "black_box") else 2)  # the pool is float16
    calls, noisy = 10 * SAMPLES * (5 if kind == "local_smoothing" else 1), kind in ("classify", "black_box")
    expected = {"classifier_calls": calls, "denoiser_calls": 0 if noisy else 10 * SAMPLES}
    assert epoch.metrics == expected | ({"queries": calls} if kind == "black_box" else {})
    if kind == "black_box":  # behind it is the same classifier
        assert np.array_equal(answer["votes"][KINDS.index(kind)], answer["votes"][KINDS.index("classify")])


def pooled(base: Configuration, images: Tensor, ids: Tensor) -> np.ndarray:
    view = load_view(base, "denoised")
    with torch.inference_mode():
        draws = [
            view(images, gaussian(SEED, Stream.SEARCH, ids, torch.full_like(ids, s), images.shape[1:]))
            for s in range(SAMPLES)
        ]
    return torch.stack(draws).half().numpy()


def test_the_noisy_view_is_the_image_plus_noise_of_sigma_unclamped(data: DataSet) -> None:
    noise = torch.randn(10, 1, 8, 8)
    view = load_view(STUDY.base, "noisy")(data.test.images, noise)
    assert torch.allclose((view + 1) / 2 - data.test.images, 0.5 * noise, atol=1e-6)


def test_local_smoothing_with_one_noise_of_no_size_is_denoise_then_classify(data: DataSet) -> None:
    plain = of_kind("denoise_then_classify")
    local = changed(of_kind("local_smoothing"), {"base_classifier.local_noises": 1, "base_classifier.local_sigma": 0.0})
    view = load_view(plain, "denoised")(data.test.images, torch.randn(10, 1, 8, 8))
    assert view_of(local) == "denoised"
    assert torch.equal(load_base(local, None)(view).argmax(1), load_base(plain, None)(view).argmax(1))
    assert torch.allclose(load_base(local, None)(view), load_base(plain, None)(view).log_softmax(1), atol=1e-6)


def test_local_smoothing_is_the_mean_softmax_over_the_same_noises_for_every_image() -> None:
    weights = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))

    def classify(images: Tensor) -> Tensor:
        return images.flatten(1) @ weights

    class Linear(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return classify(images)

    model = Linear()
    images = torch.randn(6, 1, 4, 4)
    found = LocalSmoothing(model, 4, 0.3, seed=7)(images)
    noises = gaussian(7, Stream.LOCAL, torch.zeros(4, dtype=torch.int64), torch.arange(4), (1, 4, 4))
    expected = torch.stack([classify(images + 2 * 0.3 * noise).softmax(1) for noise in noises]).mean(dim=0)
    assert torch.allclose(found.exp(), expected, atol=1e-6)
    assert torch.allclose(LocalSmoothing(model, 4, 0.3, seed=7)(images[3:]), found[3:], atol=1e-6)
    assert not torch.allclose(LocalSmoothing(model, 4, 0.3, seed=8)(images), found, atol=1e-3)


@pytest.mark.parametrize("recipe", ["gaussian", "smoothadv"])
def test_recipes_without_a_denoiser_learn_the_noise(recipe: str, data: DataSet) -> None:
    """After some steps the classifier answers noisy images better than off the shelf."""
    settings = {"recipe": recipe, "adapter": "full", "epochs": 2, "num_noises": 2, "attack_steps": 2,
                "attack_radius": 0.5, "batch_size": 32, "base_lr": 0.02, "warmup_epochs": 0}  # fmt: skip
    whole = load(STUDY.base.data)
    data = DataSet("digits", 10, whole.train.first(300), whole.validation.first(100), whole.test.first(1))
    unused = np.full((8, 100, 1, 8, 8), np.nan, np.float16)

    def right(chosen: Configuration) -> tuple[float, dict[str, float]]:
        *_, last = trial_epochs(chosen, data, lambda _: unused, unused, seed=1)
        return last.counts[np.arange(100), data.validation.labels.numpy()].mean() / 8, last.metrics

    before, _ = right(of_kind("classify"))
    after, metrics = right(of_kind(None, **settings))
    assert after > before + 0.05
    forward = {"gaussian": 1, "smoothadv": 3}[recipe]
    assert metrics["classifier_calls"] == 300 * 2 * forward + 8 * 100
    assert metrics["denoiser_calls"] == 0


def test_the_denoiser_is_that_of_the_study(data: DataSet) -> None:
    model = STUDY.base.denoiser
    noise = torch.randn(10, 1, 8, 8)
    expected = load_denoiser(model.family, model.checkpoint, model.config).denoise(data.test.images, noise, sigma=0.5)
    assert torch.equal(load_view(STUDY.base, "denoised")(data.test.images, noise), expected)
    bare = nn.Identity()
    assert as_base(of_kind("classify"), bare) is bare
