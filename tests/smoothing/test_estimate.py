import numpy as np
import pytest
from scipy import special, stats

from cadis_ray.smoothing.bounds import certified_radius
from cadis_ray.smoothing.estimate import (
    GRID,
    acr_at,
    certified_accuracy_at,
    estimate,
    mean_radius,
    npmle,
    resampled_acr,
)

ALPHA = 0.001


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.3), (9, 0.001), (50, 0.05), (1_000, 0.001), (20_000, 0.001)])
def test_mean_radius_is_the_sum_over_all_counts(n, alpha):
    p = np.array([1e-6, 0.3, 0.5, 0.6, 0.9, 0.99, 0.999, 1 - 1e-7])
    k = np.arange(n + 1)
    brute = stats.binom.pmf(k, n, p[:, None]) @ certified_radius(k, n, alpha, 1.0)
    assert mean_radius(p, n, alpha) == pytest.approx(brute, abs=1e-9)


def test_acr_and_certified_accuracy_of_a_known_distribution():
    p, weights, n, sigma = np.array([0.3, 0.8, 0.99]), np.array([0.2, 0.5, 0.3]), 500, 0.25
    k = np.arange(n + 1)
    radius = certified_radius(k, n, ALPHA, sigma)
    mass = weights @ stats.binom.pmf(k, n, p[:, None])
    assert acr_at(p, weights, n, ALPHA, sigma) == pytest.approx(mass @ radius, rel=1e-9)
    for r in (0.0, 0.1, 0.25, float(radius[450]), 0.5, 0.6, 2.0):
        expected = mass @ ((radius >= r) & (radius > 0))
        assert certified_accuracy_at(p, weights, n, ALPHA, sigma, r) == pytest.approx(expected, abs=1e-9)


def test_npmle_nears_the_largest_likelihood():
    k, n = np.repeat([0, 3, 7, 8], [5, 2, 6, 4]), np.full(17, 8)
    p, weights = npmle(k, n)
    assert weights.sum() == pytest.approx(1)

    def log_likelihood(w):
        return np.log(stats.binom.pmf(k[:, None], n[:, None], p) @ w).sum()

    # An upper bound of the optimum for any weights (the gradient's largest entry), Lindsay 1983.
    density = stats.binom.pmf(k[:, None], n[:, None], p)
    gap = (density / (density @ weights)[:, None]).sum(axis=0).max() - len(k)
    assert gap < 0.05 * len(k)
    flat = np.full(len(p), 1 / len(p))
    assert log_likelihood(weights) > log_likelihood(flat) + 3


DISTRIBUTIONS = {
    "spread": lambda rng, size: rng.beta(2, 0.5, size),
    "hard": lambda rng, size: np.where(rng.random(size) < 0.3, rng.beta(1, 3, size), rng.beta(8, 1, size)),
    "saturated": lambda rng, size: np.where(rng.random(size) < 0.4, 1.0, rng.beta(2, 1, size)),
    "constant": lambda rng, size: (rng.random(size) < 0.1) * 1.0,
}


def votes(rng, p, schedule):
    """Label votes with ``schedule`` samples, going on while at most two fail."""
    n = np.full(len(p), schedule[0])
    k = rng.binomial(n, p)
    for more in schedule[1:]:
        on = n - k <= 2
        k, n = np.where(on, k + rng.binomial(more - n, p), k), np.where(on, more, n)
    return k, n


@pytest.mark.parametrize("schedule", [(64,), (32, 128, 512)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_acr_is_recovered_within_two_standard_errors(name, schedule):
    rng = np.random.default_rng(0)
    large = DISTRIBUTIONS[name](rng, 500_000).clip(1e-9, 1 - 1e-12)
    for at_n in (10_000, 100_000):
        # rho is smooth in u = Phi^-1(p), so that truth may be read off a table of it
        u = np.arange(0, 7.1, 0.01)
        truth = np.interp(special.ndtri(large), u, mean_radius(special.ndtr(u), at_n, ALPHA), left=0).mean() * 0.5
        found = [
            estimate(
                *votes(rng, DISTRIBUTIONS[name](rng, 400), schedule),
                sigma=0.5,
                alpha=ALPHA,
                at_n=at_n,
                radii=(0.0,),
            )
            for _ in range(4)
        ]
        errors = [(one.acr - truth) / one.se for one in found]
        assert abs(np.median(errors)) < 2
        assert abs(np.mean(errors)) < 2


def test_standard_errors_are_those_of_repetition():
    rng = np.random.default_rng(1)
    found = [
        estimate(
            *votes(rng, rng.beta(2, 0.5, 400), (64,)),
            sigma=0.5,
            alpha=ALPHA,
            at_n=10_000,
            radii=(),
            resamples=50,
        )
        for _ in range(60)
    ]
    assert np.mean([one.se for one in found]) == pytest.approx(np.std([one.acr for one in found]), rel=0.3)


def test_a_resample_may_leave_out_all_images_of_a_kind():
    k = np.where(np.arange(200) == 0, 0, 2_000)
    found = estimate(k, np.full(200, 2_000), sigma=0.5, alpha=ALPHA, at_n=1_000, radii=(0.0,))
    assert 0 < found.se < 0.05
    assert found.certified_accuracy[0.0] == pytest.approx(199 / 200, abs=1e-3)


def test_an_estimate_says_what_it_was_made_of():
    rng = np.random.default_rng(2)
    p = np.where(np.arange(4_000) < 1_000, 0.1, 0.97)
    k, n = votes(rng, p, (64, 256))
    found = estimate(k, n, sigma=0.5, alpha=ALPHA, at_n=10_000, radii=(0.0, 0.5, 3.0))
    assert (found.images, found.samples, found.n) == (4_000, round(n.mean()), 10_000)
    assert found.clean == pytest.approx(0.75, abs=0.01)
    assert found.certified_accuracy == pytest.approx({0.0: 0.75, 0.5: 0.75, 3.0: 0.0}, abs=0.02)
    assert found.acr == pytest.approx(0.75 * 0.5 * mean_radius([0.97], 10_000, ALPHA)[0], rel=0.02)


def test_models_are_resampled_alike():
    rng = np.random.default_rng(3)
    p = rng.beta(2, 0.5, 300)
    n = np.full(300, 64)
    k = rng.binomial(n, p)
    worse = np.maximum(k - 1, 0)
    a, b = (resampled_acr(x, n, sigma=0.5, alpha=ALPHA, at_n=1_000, seed=5) for x in (k, worse))
    assert (a == resampled_acr(k, n, sigma=0.5, alpha=ALPHA, at_n=1_000, seed=5)).all()
    assert np.std(a - b) < 0.3 * np.hypot(np.std(a), np.std(b))  # unpaired resamples give the hypotenuse
    other = resampled_acr(worse, n, sigma=0.5, alpha=ALPHA, at_n=1_000, seed=6)
    assert np.std(a - other) > 0.7 * np.hypot(np.std(a), np.std(other))


def test_the_grid_reaches_both_ends_in_order():
    assert (np.diff(GRID) > 0).all()
    assert GRID[0] < 0.005
    assert GRID[-1] > 1 - 3e-7
    assert 0.5 in GRID


@pytest.mark.parametrize(("k", "n"), [([], []), ([3], [2]), ([-1], [2]), ([0], [0]), ([0.5], [2]), ([[1]], [[2]])])
def test_impossible_votes_are_refused(k, n):
    with pytest.raises(ValueError, match="must hold"):
        npmle(k, n)
