"""Certificates of images in this process: equal to CERTIFY by hand, refused where they would mean nothing."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from cadis_ray.errors import DataError
from cadis_ray.smoothing.bounds import max_radius, predict
from cadis_ray.smoothing.certifier import Certified, certify_images, predict_images
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.preflight import preflight

SIGMA = 0.5
DIRECTION = torch.linspace(-1, 1, 16)
IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([900, 5, 7])


def score(images: Tensor) -> Tensor:
    return images.flatten(1) @ DIRECTION


def linear(images: Tensor) -> Tensor:
    return torch.stack([score(images), -score(images), 0 * score(images) - 50], dim=1)


def found(classify=linear, images: Tensor = IMAGES, ids: Tensor | None = IDS, **changes: Any) -> Certified:
    arguments: dict[str, Any] = {"sigma": SIGMA, "n0": 20, "n": 90, "alpha": 0.05, "seed": 3, "num_classes": 3}
    return certify_images(classify, images, ids=ids, **(arguments | changes))


def test_equals_certify_by_hand() -> None:
    result = found()
    for row, (image, number) in enumerate(zip(IMAGES, IDS.tolist(), strict=True)):
        tally = {}
        for stream, n in ((Stream.SELECTION, 20), (Stream.ESTIMATION, 90)):
            noise = gaussian(3, stream, torch.full((n,), number), torch.arange(n), image.shape)
            votes = linear(image + SIGMA * noise).argmax(dim=1)
            tally[stream] = [*torch.bincount(votes, minlength=3).tolist(), 0]
        assert result.selection[row].tolist() == tally[Stream.SELECTION]
        assert result.estimation[row].tolist() == tally[Stream.ESTIMATION]
        top = int(np.argmax(tally[Stream.SELECTION]))
        interval = stats.binomtest(tally[Stream.ESTIMATION][top], 90).proportion_ci(0.90)  # its lower end: 5 %
        assert result.p_a_lower[row] == pytest.approx(interval.low)
        certified = interval.low > 0.5
        assert result.predict[row] == (top if certified else -1)
        assert result.radius[row] == pytest.approx(SIGMA * stats.norm.ppf(max(interval.low, 0.5)))


@pytest.mark.parametrize("changes", [{"batch_size": 7}, {"block": 17}, {"block": 1000}, {"batch_size": 1, "block": 30}])
def test_neither_batches_nor_blocks_nor_order_change_anything(changes: dict[str, int]) -> None:
    order = torch.tensor([2, 0, 1])
    expected, again = found(), found(images=IMAGES[order], ids=IDS[order], **changes)
    for field in ("predict", "radius", "p_a_lower", "selection", "estimation"):
        assert np.array_equal(getattr(again, field), getattr(expected, field)[order.numpy()]), field


def test_the_denoiser_adds_the_noise_of_the_stated_sigma() -> None:
    """A denoiser in [-1, 1] that leaves everything as it is, and a classifier that undoes the scale."""

    def denoise(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return 2 * (images + sigma * noise) - 1

    result = found(lambda x: linear((x + 1) / 2), denoise=denoise)
    assert np.abs(result.estimation - found().estimation).max() <= 1  # rounding may turn a vote


def test_mean_radius_is_the_closed_form() -> None:
    """E[R] = sum_k Bin(k; n, p) sigma Phi^-1(p_lower(k)) of a half space, whose exact radius is the margin.

    Sees what is merely too conservative: a two-sided alpha, votes that are lost.
    """
    m, n, p = 400, 200, 0.9
    margin = SIGMA * float(stats.norm.ppf(p)) * float(DIRECTION.norm())
    image = IMAGES[:1]

    def half_space(images: Tensor) -> Tensor:
        s = score(images - image) + margin
        return torch.stack([s, -s], dim=1)

    result = found(half_space, image.expand(m, 1, 4, 4), torch.arange(m), n=n, num_classes=2)
    k = np.arange(1, n + 1)
    radius = SIGMA * stats.norm.ppf(np.maximum(stats.beta.ppf(0.05, k, n - k + 1), 0.5))
    chance = stats.binom.pmf(k, n, p)
    mean = (chance * radius).sum()
    deviation = math.sqrt((chance * radius**2).sum() - mean**2)
    assert abs(result.radius.mean() - mean) < 4.5 * deviation / math.sqrt(m)
    assert result.radius.max() <= max_radius(n, 0.05, SIGMA)


def test_a_classifier_that_abstains_by_three_bands() -> None:
    """Three bands of a direction with p = .45, .30, .25: the likeliest is not above 1/2."""
    centre = score(IMAGES[:1])
    edges = SIGMA * float(DIRECTION.norm()) * torch.tensor(stats.norm.ppf([0.45, 0.75]), dtype=torch.float32)

    def bands(images: Tensor) -> Tensor:
        s = score(images) - centre
        first, last = edges[0] - s, s - edges[1]
        return torch.stack([first, -torch.maximum(first, last), last], dim=1)

    result = found(bands, IMAGES[:1].expand(200, 1, 4, 4), torch.arange(200))
    shares = result.estimation.sum(axis=0) / result.estimation.sum()
    assert shares == pytest.approx([0.45, 0.30, 0.25, 0], abs=0.015)
    assert (result.predict == -1).mean() > 0.95
    assert (result.radius[result.predict == -1] == 0).all()


def test_what_is_left_out_is_found() -> None:
    expected, same = found(ids=torch.arange(3)), found(ids=None, num_classes=None)
    assert np.array_equal(same.estimation, expected.estimation)
    assert same.estimation.shape == (3, 4)
    assert not np.array_equal(found(seed=None).estimation, found(seed=None).estimation)
    three_lines = certify_images(linear, IMAGES, sigma=0.25)
    assert (three_lines.selection.sum(axis=1) == 100).all()
    assert (three_lines.estimation.sum(axis=1) == 10_000).all()
    assert three_lines.radius.max() <= max_radius(10_000, 0.001, 0.25)


def test_prediction_tests_the_classes_that_certify_selects_by() -> None:
    arguments: dict[str, Any] = {"sigma": SIGMA, "alpha": 0.05, "seed": 3}
    classes = predict_images(linear, IMAGES, n=90, ids=IDS, **arguments)
    assert classes.tolist() == predict(found(n0=90).selection, 0.05).tolist()
    assert predict_images(linear, IMAGES, n=3, **arguments).tolist() == [-1, -1, -1]  # 2 / 2**3 is above 5 %


# --- refused ---


@pytest.mark.parametrize(
    "changes", [{"n0": 0}, {"n": 0}, {"alpha": 0.0}, {"alpha": 1.0}, {"sigma": 0.0}, {"batch_size": 0}, {"block": 0},
                {"seed": -1}, {"seed": 2**32}],
)  # fmt: skip
def test_arguments_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|>="):
        found(**changes)


def test_logits_that_are_no_classes() -> None:
    for classify in (score, lambda x: linear(x)[:, :1], lambda x: linear(x)[..., None]):
        with pytest.raises(DataError, match=r"need \(K,\) with K >= 2"):
            found(classify, num_classes=None)


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "image 5: 1 values are not finite"), (math.inf, "not finite"), (-0.01, "image 5: values from -0.01"),
     (2.6, "looks normalised already")],
)  # fmt: skip
def test_images_that_are_not_raw(value: float, said: str) -> None:
    images = IMAGES.clone()
    images[1, 0, 2, 3] = value
    with pytest.raises(DataError, match=said):
        found(images=images)


def test_images_that_would_share_noise() -> None:
    with pytest.raises(ValueError, match="ids must differ"):
        found(ids=torch.tensor([5, 7, 5]))


@pytest.mark.parametrize(
    ("classify", "said"),
    [
        (lambda x: linear(x) * math.nan, "not finite on 3 of 3"),
        (lambda x: linear(x) / 0, "not finite"),
        (lambda x: linear(x) * 0, "equal for all classes"),
        (lambda x: torch.tensor([[2.0, 1.0, 0.0]]).expand(len(x), 3), "do not depend on its input"),
        (lambda x: linear(x)[:, :2], "has 3 classes"),
    ],
    ids=["NaN", "infinite", "equal", "constant", "classes"],
)
def test_dead_models(classify, said: str) -> None:
    with pytest.raises(DataError, match=said):
        found(classify)


def test_a_model_that_is_not_finite_under_noise_only_abstains() -> None:
    """Clean images are in [0, 1], noisy ones hardly ever."""

    def out_of_range(images: Tensor) -> Tensor:
        outside = (images.flatten(1) - 0.5).abs().amax(dim=1, keepdim=True) > 5.5
        return torch.where(outside, math.nan, linear(images))

    result = found(out_of_range, sigma=2.0)
    assert (result.estimation[:, 3] > 0).all()
    assert (result.estimation.sum(axis=1) == 90).all()
    assert (result.predict == -1).all()


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return linear(self.layer(images))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), nn.Dropout(0.1)])
def test_training_mode(layer: nn.Module) -> None:
    with pytest.raises(DataError, match=r"Model is in training mode.*\.eval\(\)"):
        found(Model(layer))
    model = Model(layer).eval()
    assert (found(model).estimation.sum(axis=1) == 90).all()
    layer.train()
    with pytest.raises(DataError, match=r"Model\.layer is in training mode"):
        found(model)


def test_a_denoiser_in_training_mode() -> None:
    class Denoiser(nn.Module):
        def denoise(self, images: Tensor, noise: Tensor, sigma: float) -> Tensor:
            return images + sigma * noise

    with pytest.raises(DataError, match="Denoiser is in training mode"):
        found(denoise=Denoiser().denoise)
    assert np.array_equal(found(denoise=Denoiser().eval().denoise).estimation, found().estimation)


def rank_in_batch(x: Tensor) -> Tensor:
    return linear(x) * torch.tensor([1.0, 1, 0]) + score(x).argsort().argsort()[:, None] * torch.tensor([0.5, 0, 0])


@pytest.mark.parametrize(
    "classify",
    [
        lambda x: linear(x - x.mean(dim=0)),
        lambda x: linear(x + 1e-6 * x.mean()),
        lambda x: linear(x) + torch.arange(len(x))[:, None] * torch.tensor([1.0, 0, 0]),
        lambda x: linear(x + 0.1 * x.roll(1, dims=0)),
        lambda x: linear(x + torch.rand_like(x)),
        lambda x: linear(nn.BatchNorm2d(1)(x)),
        lambda x: linear(nn.functional.dropout(x, 0.5)),
        rank_in_batch,
    ],
    ids=["mean", "weak mean", "place", "neighbour", "chance", "hidden batch norm", "hidden dropout", "rank"],
)
def test_votes_that_are_not_independent(classify) -> None:
    with pytest.raises(DataError, match="depends on"):
        found(classify)


def test_a_convolutional_network_passes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.GroupNorm(4, 32), nn.Flatten(), nn.Dropout(),
        nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 3),
    ).eval()  # fmt: skip
    assert (found(network).estimation.sum(axis=1) == 90).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (found(network).estimation.sum(axis=1) == 90).all()


# --- labels ---

MANY = torch.rand(90, 1, 4, 4, generator=torch.Generator().manual_seed(1))
TRUE = linear(MANY).argmax(dim=1)
check = partial(preflight, images=MANY, denoise=lambda images, noise: images + SIGMA * noise, num_classes=3)


def always_first(images: Tensor) -> Tensor:
    return linear(images) * 1e-3 + torch.tensor([1.0, 0, 0])


@pytest.mark.parametrize("zeros", [45, 80])
def test_a_model_that_says_one_class_is_refused_however_uneven_the_labels(zeros: int) -> None:
    labels = (torch.arange(90) >= zeros).long()
    with pytest.raises(DataError, match=r"no better than the 0\.500 of a constant answer"):
        check(always_first, labels=labels)
    with pytest.raises(DataError, match="constant answer"):
        found(always_first, MANY, torch.arange(90), labels=labels)


def test_labels_that_give_no_ground_to_refuse() -> None:
    check(linear, labels=TRUE)
    check(always_first, labels=torch.zeros(90, dtype=torch.int64))  # one class: nothing to be better than
    check(always_first, images=MANY[:10], labels=torch.arange(10) % 3)  # too few to tell from bad luck
    check(always_first)


def test_labels_of_another_data_set() -> None:
    with pytest.raises(DataError, match="labels reach from 0 to 3"):
        check(linear, labels=torch.arange(90) % 4)
