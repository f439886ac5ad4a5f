"""The self-test is green on this code, and each known way to make certificates silently wrong turns it red."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from cadis_ray.certification import battery
from cadis_ray.errors import DataError
from cadis_ray.smoothing import bounds, certifier, sampling
from cadis_ray.smoothing.bounds import certified_radius, clopper_pearson_lower
from cadis_ray.smoothing.counts import IMAGE, START, Blocks

Patch = pytest.MonkeyPatch
gaussian, totals, cells = sampling.gaussian, Blocks.totals, battery.cells
N = battery.N


def flags(replicates: int, *names: str) -> str:
    return "".join(finding.flags for finding in battery.run(replicates, 7, names=names))


def test_green_on_this_code() -> None:
    findings = battery.run(600, 7, names=[cell.name for cell in cells()])
    assert [finding.name for finding in findings] == ["axis", "axis tail", "dense", "tie", "sphere"]
    assert [finding.flags for finding in findings] == [""] * 5
    assert max(abs(finding.share - finding.probability) for finding in findings) < 0.004


def test_green_for_each_kind_of_base_classifier() -> None:
    names = [cell.name for cell in battery.cells_of_kinds()]
    assert {name.split(", ")[1] for name in names} == {"denoised", "local", "black box"}
    findings = battery.run(150, 8, names=names)
    assert [finding.flags for finding in findings] == [""] * 6
    assert max(abs(finding.share - finding.probability) for finding in findings) < 0.008


def prompt(images: Tensor) -> Tensor:
    """Away from the battery's image, as a coordinator might: a function of what it sees."""
    return images - battery.image()


def test_a_prompt_is_sound_after_the_noise_and_before_it_is_refused_and_would_be_seen(monkeypatch: Patch) -> None:
    """f(u + prompt(u)) is a half-space again, at half the margin; before the noise it certifies twice its radius."""
    dense = next(cell for cell in cells() if cell.name == "dense")
    z = dense.radius / battery.SIGMA / 2
    after = replace(
        dense, classify=lambda u: dense.classify(u + prompt(u)), radius=dense.radius / 2,
        probability=float(stats.norm.cdf(z)),
    )  # fmt: skip
    before = replace(after, classify=dense.classify, denoise=lambda x, noise, sigma: x + prompt(x) + sigma * noise)
    monkeypatch.setattr(battery, "cells", lambda device: (after,))
    monkeypatch.setattr(battery, "cells_of_kinds", lambda device: ())
    assert flags(100, "dense") == ""
    monkeypatch.setattr(battery, "cells", lambda device: (before,))
    with pytest.raises(DataError, match=r"not a function of x \+ sigma"):
        flags(100, "dense")
    monkeypatch.setattr(certifier, "preflight", lambda *_, num_classes, **__: num_classes)
    assert set("CM") <= set(flags(100, "dense"))


# --- noise ---


def changed_noise(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(sampling, "gaussian", lambda *arguments: change(gaussian(*arguments)))


def changed_samples(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    def noise(seed, stream, images, samples, shape):
        return gaussian(seed, stream, images, change(samples), shape)

    return lambda patch: patch.setattr(sampling, "gaussian", noise)


def antithetic(patch: Patch) -> None:
    def noise(seed, stream, images, samples, shape):
        sign = 1 - 2 * (samples % 2)
        return gaussian(seed, stream, images, samples // 2, shape) * sign.reshape(-1, 1, 1, 1)

    patch.setattr(sampling, "gaussian", noise)


def uniform(noise: Tensor) -> Tensor:
    return (torch.special.ndtr(noise) - 0.5) * 12**0.5


# --- counting ---


def one_stream(patch: Patch) -> None:
    patch.setattr(certifier, "SELECTION", certifier.ESTIMATION)


def merged(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Patch], None]:
    """``change`` makes totals (N, K + 1) of the votes (N, blocks, K + 1) of the estimation."""

    def wrong(self: Blocks, images: np.ndarray, n: int) -> np.ndarray:
        if n != N:
            return totals(self, images, n)
        assert (np.lexsort((self.index[:, START], self.index[:, IMAGE])) == np.arange(len(self.index))).all()
        return change(self.votes.reshape(len(images), -1, self.votes.shape[1]))

    return lambda patch: patch.setattr(Blocks, "totals", wrong)


def worst_lost(votes: np.ndarray) -> np.ndarray:
    worst = votes[:, :, 0].argmin(axis=1)
    return votes.sum(axis=1) - votes[np.arange(len(votes)), worst]


def peek(patch: Patch) -> None:
    patch.setattr(battery, "BLOCK", 40)
    merged(best_look)(patch)


def best_look(votes: np.ndarray) -> np.ndarray:
    """Stops where the bound is largest, of a look after every block."""
    so_far = votes.cumsum(axis=1)
    best = clopper_pearson_lower(so_far[:, :, 0], so_far.sum(axis=2), battery.ALPHA).argmax(axis=1)
    return so_far[np.arange(len(votes)), best]


# --- bounds ---


def bound(wrong: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(bounds, "clopper_pearson_lower", wrong)


def twice_alpha(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    return clopper_pearson_lower(k, n, 2 * alpha)


def wald(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    p = k / n
    return p - stats.norm.isf(alpha) * np.sqrt(p * (1 - p) / n)


# --- classifier ---


class BatchStatistics(nn.Module):
    """A cell's classifier behind a batch norm that has learned the noise's law: in evaluation it changes nothing."""

    def __init__(self, classify: sampling.Classify) -> None:
        super().__init__()
        self.classify = classify
        self.norm = nn.BatchNorm1d(battery.ELEMENTS, affine=False, eps=1e-12, momentum=0.0)
        self.mean = battery.image().flatten()
        self.norm.running_mean = self.mean.clone()
        self.norm.running_var = torch.full_like(self.mean, battery.SIGMA**2)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify((self.norm(images.flatten(1)) * battery.SIGMA + self.mean).reshape(images.shape))


def batch_statistics(patch: Patch, training: bool = True) -> None:
    made = tuple(replace(cell, classify=BatchStatistics(cell.classify).train(training)) for cell in cells())
    patch.setattr(battery, "cells", lambda device: made)
    patch.setattr(battery, "cells_of_kinds", lambda device: ())  # would call .eval() on what it wraps


# Defect, classifier that sees it, the statistics that must, replicates. As few as its power needs.
DEFECTS = [
    pytest.param(changed_noise(lambda e: e / 2), "axis", "CMD", 100, id="half the noise"),
    pytest.param(changed_noise(lambda e: e * 0.98), "sphere", "M", 200, id="2 % less noise"),
    pytest.param(changed_noise(lambda e: e.clamp(-2, 2)), "axis tail", "CMD", 100, id="noise clipped at 2 sigma"),
    pytest.param(changed_noise(lambda e: e.clamp(-3, 3)), "sphere", "M", 1500, id="noise clipped at 3 sigma"),
    pytest.param(changed_noise(lambda e: e[:, :1].expand_as(e)), "dense", "MD", 200, id="one noise for 3 channels"),
    pytest.param(changed_noise(torch.sign), "axis tail", "CMD", 100, id="Rademacher noise"),
    pytest.param(changed_noise(uniform), "axis tail", "CMD", 100, id="uniform noise"),
    pytest.param(changed_samples(lambda s: s % (N // 4)), "tie", "CD", 200, id="4 shards of the same noise"),
    pytest.param(antithetic, "tie", "D", 200, id="antithetic pairs"),
    pytest.param(one_stream, "tie", "C", 1500, id="selection's samples in the estimation"),
    pytest.param(merged(lambda v: v.sum(axis=1) + v[:, 1]), "axis", "C", 1000, id="a shard counted twice"),
    pytest.param(merged(worst_lost), "axis", "C", 600, id="the worst shard lost"),
    pytest.param(peek, "axis", "C", 400, id="a look every 40 samples"),
    pytest.param(bound(twice_alpha), "dense", "C", 1000, id="alpha used as 2 alpha"),
    pytest.param(bound(wald), "axis tail", "C", 600, id="Wald's bound"),
]


@pytest.mark.parametrize(("plant", "name", "expected", "replicates"), DEFECTS)
def test_red_on(plant: Callable[[Patch], None], name: str, expected: str, replicates: int, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert set(expected) <= set(flags(replicates, name))


def test_batch_statistics_are_refused_and_would_be_seen(monkeypatch: Patch) -> None:
    batch_statistics(monkeypatch, training=False)
    assert flags(100, "axis", "tie") == ""
    batch_statistics(monkeypatch)
    with pytest.raises(DataError, match="training mode"):
        flags(100, "tie")
    monkeypatch.setattr(certifier, "preflight", lambda *_, num_classes, **__: num_classes)
    monkeypatch.setattr(battery, "BATCH_SIZE", battery.BLOCK)  # of one image, as in a loop over images
    assert "D" in flags(100, "tie")


# --- the theory it compares with ---


def test_failure_rates_are_the_brute_force_sums_of_the_bounds_failures() -> None:
    for p, z, n, alpha in [(0.9, None, 400, 0.05), (0.5, 0.0, 100, 0.05), (0.97, 1.7, 50, 0.01), (0.999, None, 9, 0.1)]:
        radius = float(stats.norm.ppf(p)) if z is None else z
        k = np.arange(n + 1)
        fails = certified_radius(k, n, alpha, 1.0) > radius
        expected = stats.binom.pmf(k, n, p)[fails].sum()
        assert battery.failure_rate(p, radius, n, alpha, 1.0) == pytest.approx(expected, abs=1e-12)


def test_failure_rates_of_the_literature() -> None:
    """P(R > R*) of Cohen's n and alpha, as tabled for p = .9 and .99."""
    found = [battery.failure_rate(p, float(stats.norm.ppf(p)), 100_000, 0.001, 1.0) for p in (0.9, 0.99)]
    assert found == pytest.approx([9.83e-4, 9.27e-4], abs=5e-7)


def test_the_spheres_probability_and_radius_by_integration() -> None:
    """One coordinate lies along the centre's direction, the others are a chi-squared of d - 1."""
    sigma, d = battery.SIGMA, battery.ELEMENTS

    def probability(distance: float, r: float) -> float:
        def inside(u: float) -> float:
            rest = r**2 - (distance + sigma * u) ** 2
            return float(stats.norm.pdf(u) * stats.chi2.cdf(max(rest, 0.0) / sigma**2, d - 1))

        return integrate.quad(inside, -9, 9, epsabs=1e-10)[0]

    p, radius = battery.sphere(5.0, 7.8)
    assert p == pytest.approx(probability(5.0, 7.8), abs=1e-7)
    assert probability(5.0 + radius, 7.8) == pytest.approx(0.5, abs=1e-7)
    assert radius > sigma * stats.norm.ppf(p)  # Cohen's radius is a bound
