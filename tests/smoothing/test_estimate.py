import numpy as np
import pytest
from scipy import special, stats

from cadis_ray.smoothing.bounds import certified_radius
from cadis_ray.smoothing.estimate import (
    GRID,
    SCHEDULE,
    acr_at,
    certified_accuracy_at,
    contributions,
    estimate,
    mean_radius,
    next_samples,
    npmle,
    resampled_acr,
)
from cadis_ray.smoothing.metrics import paired_difference

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


def votes(rng, p, schedule=SCHEDULE):
    """Label votes (k, n) of images with p_A = p, with ``schedule`` samples, going on while at most two fail."""
    k = n = np.zeros(np.shape(p), np.int64)
    for _ in schedule:
        following = next_samples(k, n, schedule)
        k, n = k + rng.binomial(following - n, p), following
    return k, n


def population_acr(p, at_n, sigma=0.5):
    """Expected ACR of images p: rho is smooth in u = Phi^-1(p), so that it may be read off a table."""
    u = np.arange(0, 7.1, 0.01)
    return sigma * np.interp(special.ndtri(p), u, mean_radius(special.ndtr(u), at_n, ALPHA), left=0).mean()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_acr_is_recovered_within_two_standard_errors(name):
    rng = np.random.default_rng(0)
    truth = population_acr(DISTRIBUTIONS[name](rng, 500_000).clip(1e-9, 1 - 1e-12), 100_000)
    found = [
        estimate(*votes(rng, DISTRIBUTIONS[name](rng, 1_600)), sigma=0.5, alpha=ALPHA, at_n=100_000, radii=(),
                 resamples=50)
        for _ in range(40)
    ]  # fmt: skip
    errors = np.array([(one.acr - truth) / one.se for one in found])
    assert (np.abs(errors) < 2).sum() >= 35  # P(Bin(40, .954) < 35) = .01
    assert abs(errors.mean()) < 0.6


def test_samples_grow_while_at_most_two_fail():
    k = np.array([0, 30, 29, 32, 126, 125, 128, 512, 510, 0])
    n = np.array([0, 32, 32, 32, 128, 128, 128, 512, 512, 32])
    assert next_samples(k, n).tolist() == [32, 128, 32, 128, 512, 128, 512, 512, 512, 32]
    assert next_samples(k, n, (32, 128)).tolist() == [32, 128, 32, 128, 128, 128, 128, 512, 512, 32]
    assert next_samples([36, 40], [40, 40], (32, 64), failures=3).tolist() == [40, 64]


@pytest.mark.parametrize(("schedule", "failures"), [((), 2), ((0, 32), 2), ((32, 32), 2), ((64, 32), 2), ((32,), -1)])
def test_an_impossible_schedule_is_refused(schedule, failures):
    with pytest.raises(ValueError, match="schedule must increase"):
        next_samples([1], [1], schedule, failures)


def test_many_data_sets_at_once_are_as_one_by_one():
    rng = np.random.default_rng(4)
    k, n = votes(rng, rng.beta(2, 0.5, (2, 3, 200)))
    together = npmle(k, n)[1]
    alone = [[npmle(k[i, j], n[i, j])[1] for j in range(3)] for i in range(2)]
    assert together == pytest.approx(np.array(alone), rel=1e-9, abs=1e-15)


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


SETTINGS = {"sigma": 0.5, "alpha": ALPHA, "at_n": 10_000}


def test_the_mean_contribution_is_the_estimate_and_its_error_the_bootstraps():
    rng = np.random.default_rng(5)
    k, n = votes(rng, rng.beta(2, 0.3, 800))
    each = contributions(k, n, **SETTINGS)
    assert each.mean() == pytest.approx(acr_at(*npmle(k, n), 10_000, ALPHA, 0.5), rel=1e-9)
    bootstrap = resampled_acr(k, n, **SETTINGS, resamples=1_000).std(ddof=1)
    assert each.std(ddof=1) / np.sqrt(800) == pytest.approx(bootstrap, rel=0.1)


def test_contributions_are_the_change_by_one_more_such_image():
    rng = np.random.default_rng(6)
    k, n = votes(rng, rng.beta(2, 0.3, 50))
    each = contributions(k, n, **SETTINGS)
    times = 1_000
    many = [np.repeat(column, times) for column in (k, n)]
    for i in (int(each.argmin()), int(each.argmax()), 0, 1, 2):
        sums = [
            len(data[0]) * acr_at(*npmle(*data), 10_000, ALPHA, 0.5)
            for data in (many, [np.append(column, part[i]) for column, part in zip(many, (k, n), strict=True)])
        ]
        assert sums[1] - sums[0] == pytest.approx(each[i], rel=1e-2, abs=1e-2)


def test_the_best_of_equal_models_looks_better_than_it_is_and_its_certificate_does_not():
    """The null experiment: 30 models that differ image by image but not in ACR, one search after another."""
    rng = np.random.default_rng(8)
    models, images, at_n, repetitions = 30, 400, 1_000, 120
    radii = certified_radius(np.arange(at_n + 1), at_n, ALPHA, 0.5)

    def population(size):
        """p_A of images (models, size): alike in what is hard, each model with differences of its own."""
        return special.ndtr(rng.normal(1, 1.2, size) + rng.normal(0, 0.4, (models, size)))

    truth = population_acr(population(50_000).ravel(), at_n)
    scores, certified, covered = [], [], []
    for _ in range(repetitions):
        scores.append(acr_at(*npmle(*votes(rng, population(images))), at_n, ALPHA, 0.5))
        best = int(scores[-1].argmax())
        radius = radii[rng.binomial(at_n, population(1_000)[best])]  # fresh images, fresh noise
        interval = paired_difference(radius, np.zeros(1_000))
        certified.append(interval.mean - truth)
        covered.append(interval.low <= truth <= interval.high)
    scores = np.array(scores)
    optimism = scores.max(axis=1) - truth
    standard_error = np.std(optimism, ddof=1) / np.sqrt(repetitions)
    assert optimism.mean() > 5 * standard_error
    largest_of_30 = 2.04 * scores.std(axis=1, ddof=1).mean()  # of normal variables, in their standard deviation
    assert optimism.mean() == pytest.approx(largest_of_30, abs=3 * standard_error)
    assert abs(np.mean(certified)) < 3 * np.std(certified, ddof=1) / np.sqrt(repetitions)
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize(("k", "n"), [([], []), ([3], [2]), ([-1], [2]), ([0], [0]), ([0.5], [2]), (1, 2)])
def test_impossible_votes_are_refused(k, n):
    with pytest.raises(ValueError, match="must hold"):
        npmle(k, n)
