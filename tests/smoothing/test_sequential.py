from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from cadis_ray.smoothing.bounds import clopper_pearson_lower, votes_needed
from cadis_ray.smoothing.sequential import (
    capped_lower,
    decide,
    log_e_value,
    lower_sequence,
    next_look,
)

ALPHA = 0.05


def wealth(k, n, p0, prior=0.5):
    """The mixture of likelihood ratios by quadrature; q = sin(x)^2 takes away the poles of the prior at 0 and 1."""
    start = np.arcsin(np.sqrt(p0))

    def integrand(x):
        q = np.sin(x) ** 2
        bet = special.xlogy(k, q / p0) + special.xlogy(n - k, (1 - q) / (1 - p0))
        return np.exp(bet) * stats.beta.pdf(q, prior, prior) * np.sin(2 * x)

    peak = np.clip(np.arcsin(np.sqrt(k / n)), start, np.pi / 2)
    mass = integrate.quad(integrand, start, np.pi / 2, points=[peak], limit=200)[0]
    return mass / stats.beta.sf(p0, prior, prior)


@pytest.mark.parametrize("prior", [0.5, 1.0])
@pytest.mark.parametrize(
    ("k", "n", "p0"),
    [(1, 1, 0.5), (3, 4, 0.5), (0, 6, 0.3), (40, 100, 0.5), (90, 100, 0.8), (99, 100, 0.9), (995, 1000, 0.98)],
)
def test_the_wealth_is_the_mixture_of_likelihood_ratios(k, n, p0, prior):
    assert log_e_value(k, n, p0, prior) == pytest.approx(np.log(wealth(k, n, p0, prior)), abs=1e-9)


def test_the_wealth_is_one_before_the_first_sample_and_the_bet_on_the_other_side_mirrors_it():
    assert log_e_value(0, 0, [0.0, 0.3, 0.9]).tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert log_e_value(10 - 3, 10, 1 - 0.4) == pytest.approx(np.log(wealth(7, 10, 0.6)), abs=1e-9)
    assert log_e_value([0, 1], 5, 0.0)[1] == np.inf


@pytest.mark.parametrize("p0", [0.2, 0.5, 0.9])
def test_under_the_null_the_wealth_is_a_martingale_at_p0_and_falls_below_it(p0):
    n = 30
    k = np.arange(n + 1)
    now, vote, none = (np.exp(log_e_value(k + gained, n + one, p0)) for gained, one in ((0, 0), (1, 1), (0, 1)))
    assert p0 * vote + (1 - p0) * none == pytest.approx(now, rel=1e-9)
    for p in (0.0, 0.5 * p0, 0.99 * p0):
        assert (p * vote + (1 - p) * none < now).all()


def ever(p, looks, hits):
    """Exact probability that ``hits(k, n)`` is true at any of the looks, votes being Bernoulli(p)."""
    mass, found = np.ones(1), 0.0
    for before, n in pairwise([0, *looks]):
        mass = np.convolve(mass, stats.binom.pmf(np.arange(n - before + 1), n - before, p))
        hit = hits(np.arange(n + 1), np.full(n + 1, n))
        found += mass[hit].sum()
        mass[hit] = 0
    return found


def random_looks(seed, last):
    """Looks after batches of random sizes, single samples to hundreds."""
    sizes = np.exp(np.random.default_rng(seed).uniform(0, 6, 60)).astype(int)
    looks = np.cumsum(sizes)
    return [*looks[looks < last].tolist(), last]


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.977, 0.9987])
@pytest.mark.parametrize("looks", [range(1, 501), random_looks(0, 2000), random_looks(1, 2000)], ids=len)
def test_the_wealth_of_a_true_null_reaches_one_over_alpha_with_probability_at_most_alpha(p, looks):
    error = ever(p, looks, lambda k, n: log_e_value(k, n, p) >= np.log(1 / ALPHA))
    assert error <= ALPHA


def test_fixed_n_bounds_at_every_look_are_wrong_far_more_often():
    looks = random_looks(0, 2000)
    assert ever(0.5, looks, lambda k, n: clopper_pearson_lower(k, n, ALPHA) > 0.5) > 3 * ALPHA


RADII = np.array([0.0, 0.25, 0.5, 0.75])
SIGMA = 0.5


@pytest.mark.parametrize("wrong", range(len(RADII)))
@pytest.mark.parametrize("seed", [0, 1])
def test_a_table_of_radii_has_a_false_certificate_with_probability_at_most_alpha(wrong, seed):
    """An image with p_A = Phi(r / sigma) has radius r exactly, so that every radius from there on is false."""
    cap = 1500
    p = stats.norm.cdf(RADII[wrong] / SIGMA)

    def false(k, n):
        return decide(k, n, RADII[wrong:], sigma=SIGMA, alpha=ALPHA, beta=0.01, cap=cap).certified.any(axis=1)

    error = ever(p, random_looks(seed, cap), false)
    assert ALPHA / 4 < error <= ALPHA  # the bound at the cap alone spends nearly half


@pytest.mark.parametrize("r", RADII)
def test_a_certificate_within_reach_is_given_up_with_probability_at_most_beta(r):
    cap, beta = 1500, 0.05
    needed = votes_needed(r, cap, ALPHA / 2, SIGMA)

    def lost(k, n):
        decision = decide(k, n, [r], sigma=SIGMA, alpha=ALPHA, beta=beta, cap=cap)
        return decision.given_up[:, 0] & (k + cap - n >= needed)

    assert 0 < ever(needed / cap, random_looks(4, cap), lost) <= beta


def test_the_lower_sequence_is_where_the_wealth_is_one_over_alpha():
    for n in (1, 10, 500, 100_000):
        k = np.unique(np.linspace(0, n, 12).astype(int))
        low = lower_sequence(k, n, ALPHA)
        for votes, bound in zip(k[k > 0].tolist(), low[k > 0].tolist(), strict=True):
            root = optimize.brentq(
                lambda p, votes=votes, n=n: float(log_e_value(votes, n, p)) + np.log(ALPHA), 1e-300, votes / n - 1e-12
            )
            assert bound == pytest.approx(root, abs=1e-11)
        assert (low[k == 0] == 0).all()
        assert (low <= clopper_pearson_lower(k, n, ALPHA) + 1e-12).all()


def test_what_the_sequence_rejects_is_everything_below_it():
    grid = np.linspace(0.0005, 0.9995, 2000)
    for k, n in ((1, 1), (3, 3), (5, 9), (40, 100), (990, 1000)):
        for alpha in (0.4, 0.05, 0.001):
            rejected = log_e_value(k, n, grid) >= -np.log(alpha)
            assert rejected.tolist() == (grid <= lower_sequence(k, n, alpha)).tolist()


def test_the_price_of_stopping_at_any_time_is_small():
    assert special.ndtri(capped_lower(100_000, 100_000, 0.001, 100_000)) == pytest.approx(3.788, abs=5e-4)
    k, cap = np.arange(0, 2001, 50), 2000
    assert capped_lower(k, cap, 0.01, cap) == pytest.approx(clopper_pearson_lower(k, cap, 0.005), abs=1e-12)
    assert (capped_lower(k[:-1], cap - 1, 0.01, cap) == lower_sequence(k[:-1], cap - 1, 0.005)).all()


def test_decisions_and_the_bound_of_the_record_agree():
    cap = 3000
    rng = np.random.default_rng(0)
    n = rng.integers(1, cap + 1, 400)
    n[:50] = cap
    k = rng.binomial(n, rng.uniform(0.3, 1, 400))
    decision = decide(k, n, RADII, sigma=SIGMA, alpha=0.01, beta=0.001, cap=cap)
    radius = SIGMA * special.ndtri(np.maximum(capped_lower(k, n, 0.01, cap), 0.5))
    assert (decision.certified == ((radius[:, None] >= RADII) & (radius[:, None] > 0))).all()
    assert decision.certified.any(axis=0).all()
    assert not (decision.certified & decision.given_up).any()
    assert (decision.settled == (decision.certified | decision.given_up).all(axis=1)).all()
    assert decision.settled[n == cap].all()
    assert 0 < decision.settled[n < cap].mean() < 1


def test_clear_cases_are_settled_early_and_out_of_reach_at_once():
    decision = decide([0, 128, 0, 70], [0, 128, 64, 128], [0.0, 0.5, 9.0], sigma=0.5, alpha=0.001, cap=100_000)
    assert decision.certified.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert decision.given_up.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert decision.settled.tolist() == [False, True, True, False]


def test_a_radius_that_the_samples_left_cannot_reach_is_given_up():
    needed = int(votes_needed(0.5, 1000, 0.0005, 0.5))
    n = 999
    decision = decide([needed - 2, needed - 1], n, [0.5], sigma=0.5, alpha=0.001, beta=1e-9, cap=1000)
    assert decision.given_up[:, 0].tolist() == [True, False]


def test_looks_grow_by_half_within_limits_and_end_at_the_cap():
    assert next_look([0, 64, 200, 5000, 99_900], 100_000).tolist() == [64, 128, 300, 5512, 100_000]


@pytest.mark.parametrize(
    ("k", "n", "p0", "alpha"),
    [(5, 4, 0.5, 0.1), (-1, 4, 0.5, 0.1), (1.0, 4, 0.5, 0.1), (1, 4, 1.0, 0.1), (1, 4, np.nan, 0.1), (1, 4, 0.5, 0.5)],
)
def test_arguments_out_of_range_are_refused(k, n, p0, alpha):
    with pytest.raises(ValueError, match="must"):
        lower_sequence(k, log_e_value(k, n, p0) * 0 + n, alpha)


def test_more_samples_than_the_cap_are_refused():
    with pytest.raises(ValueError, match="n <= cap must hold, but got n=11, cap=10"):
        capped_lower(5, 11, 0.1, 10)
