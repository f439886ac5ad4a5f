import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from cadis_ray.smoothing import bounds
from cadis_ray.smoothing.bounds import ABSTAIN


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-6])
def test_clopper_pearson_is_where_the_binomial_tail_is_alpha(alpha):
    for n in (1, 2, 7, 100, 10_000, 100_000):
        k = np.unique(np.linspace(0, n, 23).astype(int))
        lower, upper = bounds.clopper_pearson_lower(k, n, alpha), bounds.clopper_pearson_upper(k, n, alpha)
        assert stats.binom.sf(k[1:] - 1, n, lower[1:]) == pytest.approx(alpha, rel=1e-7)
        assert stats.binom.cdf(k[:-1], n, upper[:-1]) == pytest.approx(alpha, rel=1e-7)
        assert lower[0] == 0
        assert upper[-1] == 1


def test_clopper_pearson_agrees_with_scipy():
    for k, n in ((0, 10), (1, 10), (7, 10), (10, 10), (99_000, 100_000)):
        interval = stats.binomtest(k, n).proportion_ci(confidence_level=0.99, method="exact")
        assert bounds.clopper_pearson_lower(k, n, 0.005) == pytest.approx(interval.low, rel=1e-12)
        assert bounds.clopper_pearson_upper(k, n, 0.005) == pytest.approx(interval.high, rel=1e-12)


@pytest.mark.parametrize(("n", "ceiling"), [(100, 1.500), (1_000, 2.463), (10_000, 3.199), (100_000, 3.811)])
def test_no_radius_exceeds_the_ceiling(n, ceiling):
    assert bounds.max_radius(n, 0.001, 1.0) == pytest.approx(ceiling, abs=5e-4)
    radii = bounds.certified_radius(np.arange(n + 1), n, 0.001, 0.25)
    assert radii.max() == radii[-1] == bounds.max_radius(n, 0.001, 0.25)
    assert (np.diff(radii) >= 0).all()
    assert (radii[: n // 2 + 1] == 0).all()


def test_the_ceiling_is_the_root_rounded_down():
    for n in (2, 3, 10, 117):
        ceiling = float(bounds.clopper_pearson_lower(n, n, 0.001))
        assert Fraction(ceiling) ** n <= Fraction(0.001) < Fraction(math.nextafter(ceiling, 1)) ** n


@pytest.mark.process
def test_the_ceiling_is_the_same_as_scalar_and_as_array_with_and_without_wide_registers():
    def ceilings(environment):
        code = (
            "import sys, numpy as np; from cadis_ray.smoothing.bounds import clopper_pearson_lower as lower;"
            "n = np.arange(1, 20_001); whole = lower(n, n, 0.001);"
            "assert all(lower(int(one), int(one), 0.001) == value for one, value in zip(n, whole));"
            "sys.stdout.buffer.write(whole.tobytes())"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        return subprocess.run(command, capture_output=True, check=True, env=os.environ | environment).stdout

    wide = ceilings({})
    assert len(wide) == 20_000 * 8
    assert ceilings({"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL"}) == wide


def test_numbers_of_another_machine_are_the_same_and_those_of_another_vote_are_not():
    radii = bounds.certified_radius([700, 800, 1000], 1000, 0.001, 0.25)
    assert bounds.same_numbers(np.nextafter(radii, 1), radii)
    assert not bounds.same_numbers(bounds.certified_radius([701, 800, 1000], 1000, 0.001, 0.25), radii)
    assert not bounds.same_numbers(None, 0.5)
    assert not bounds.same_numbers(radii[:2], radii)
    assert not bounds.same_numbers(float("nan"), 0.5)


@pytest.mark.parametrize(
    ("n", "means"),
    [
        (1_000, [0.1285, 1.1161, 1.9868, 2.3713]),
        (10_000, [0.2141, 1.2289, 2.2138, 2.8257]),
        (100_000, [0.2409, 1.2649, 2.2902, 3.0013]),
    ],
)
def test_mean_radius_is_neither_too_large_nor_too_small(n, means):
    k = np.arange(n + 1)
    radii = bounds.certified_radius(k, n, 0.001, 1.0)
    for p, mean in zip((0.6, 0.9, 0.99, 0.999), means, strict=True):
        assert stats.binom.pmf(k, n, p) @ radii == pytest.approx(mean, abs=6e-5)


@pytest.mark.parametrize(
    ("n", "p", "failure"), [(100_000, 0.9, 9.83e-4), (100_000, 0.99, 9.27e-4), (1_000, 0.999, 0.0)]
)
def test_a_radius_is_too_large_as_rarely_as_it_should_be(n, p, failure):
    k = np.arange(n + 1)
    false = bounds.certified_radius(k, n, 0.001, 0.5) > 0.5 * stats.norm.ppf(p)
    assert stats.binom.pmf(k, n, p) @ false == pytest.approx(failure, abs=5e-7)


def all_outcomes(n0, n):
    """Every pair of two-class counts, with its probability when both classes have p = 1/2."""
    k0, k = (grid.ravel() for grid in np.meshgrid(np.arange(n0 + 1), np.arange(n + 1), indexing="ij"))
    selection = np.stack([k0, n0 - k0, 0 * k0], axis=1)
    estimation = np.stack([k, n - k, 0 * k], axis=1)
    return selection, estimation, stats.binom.pmf(k0, n0, 0.5) * stats.binom.pmf(k, n, 0.5)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_at_a_tie_the_procedure_certifies_with_probability_at_most_alpha(alpha):
    selection, estimation, chance = all_outcomes(5, 40)
    predict, radius, _ = bounds.certify(selection, estimation, alpha, 0.25)
    certified = chance @ (predict != ABSTAIN)
    least = min(k for k in range(41) if stats.binomtest(k, 40, alternative="greater").pvalue < alpha)
    assert certified == pytest.approx(stats.binom.sf(least - 1, 40, 0.5), rel=1e-9)
    assert certified <= alpha
    assert ((radius > 0) == (predict != ABSTAIN)).all()

    reused, _, _ = bounds.certify(estimation, estimation, alpha, 0.25)
    assert chance @ (reused != ABSTAIN) == pytest.approx(2 * certified, rel=1e-9)  # what reuse would do


def test_certify_counts_votes_for_no_class_against():
    selection = [[60, 40, 0], [0, 10, 90], [5, 95, 0], [50, 50, 0]]
    estimation = [[990, 10, 0], [10, 990, 0], [0, 700, 300], [0, 1000, 0]]
    predict, radius, p_a_lower = bounds.certify(selection, estimation, 0.001, 0.5)
    assert predict.tolist() == [0, 1, 1, ABSTAIN]
    assert p_a_lower.tolist() == pytest.approx([*stats.beta.ppf(0.001, [990, 990, 700], [11, 11, 301]), 0.0], rel=1e-12)
    assert radius.tolist() == pytest.approx([*(0.5 * stats.norm.ppf(p_a_lower[:3])), 0.0], rel=1e-12)


def test_a_model_that_votes_for_no_class_is_never_certified():
    counts = [[0, 0, 0, 1000]]
    assert bounds.certify(counts, counts, 0.001, 0.5)[0].tolist() == [ABSTAIN]
    assert bounds.predict(counts, 0.001).tolist() == [ABSTAIN]


def test_samples_needed_is_the_first_n_above_the_radius():
    for alpha in (0.05, 0.001):
        ceilings = bounds.max_radius(np.arange(1, 20_000), alpha, 0.25)
        for radius in (0.0, 0.1, 0.25, 0.5, 0.75, *ceilings[[30, 500, 15_000]]):
            assert bounds.samples_needed(radius, 0.25, alpha) == 1 + int((ceilings > radius).argmax())
    with pytest.raises(ValueError, match="no number of samples"):
        bounds.samples_needed(3.0, 0.25, 0.001)


@pytest.mark.parametrize(("n", "alpha", "sigma"), [(1, 0.4, 0.5), (100, 0.001, 0.5), (2_000, 0.01, 0.25)])
def test_votes_needed_is_the_first_count_that_certifies(n, alpha, sigma):
    radii = bounds.certified_radius(np.arange(n + 1), n, alpha, sigma)
    asked = np.array([0.0, 0.1, 0.25, 0.5, radii[-1], radii[-1] + 1e-9, 3.0])
    enough = (radii >= asked[:, None]) & (radii > 0)
    expected = np.where(enough.any(axis=1), enough.argmax(axis=1), n + 1)
    assert bounds.votes_needed(asked, n, alpha, sigma).tolist() == expected.tolist()
    assert bounds.votes_needed(0.1, n, alpha, sigma) == expected[1]
    with pytest.raises(ValueError, match="radius >= 0"):
        bounds.votes_needed([0.1, float("nan")], n, alpha, sigma)


def test_the_linf_radius_is_the_largest_cube_within_the_ball():
    corner = np.full(3072, bounds.linf_radius(0.5, 3072))
    assert np.linalg.norm(corner) == pytest.approx(0.5, rel=1e-12)


def test_predict_is_the_two_sided_binomial_test():
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(31), np.arange(31)))
    first, second = first[first + second > 0], second[first + second > 0]
    counts = np.stack([second, first, 0 * first, 0 * first], axis=1)
    for alpha in (0.001, 0.05, 0.3):
        for a, b, answer in zip(first, second, bounds.predict(counts, alpha), strict=True):
            sure = stats.binomtest(int(a), int(a + b)).pvalue <= alpha
            assert answer == (ABSTAIN if not sure else 1 if a > b else 0)


def test_predict_abstains_where_no_class_wins_or_runs_up_closely():
    assert bounds.predict([[40, 0, 60], [90, 0, 10], [55, 0, 45]], 0.01).tolist() == [ABSTAIN, 0, ABSTAIN]


@pytest.mark.parametrize(
    ("k", "n", "alpha", "sigma"),
    [
        (-1, 10, 0.1, 1.0),
        (11, 10, 0.1, 1.0),
        (0, 0, 0.1, 1.0),
        (5.0, 10, 0.1, 1.0),
        (5, 10, 0.0, 1.0),
        (5, 10, 1.0, 1.0),
        (5, 10, float("nan"), 1.0),
        (5, 10, 0.1, 0.0),
        (5, 10, 0.1, float("nan")),
        (5, 10, 0.1, float("inf")),
    ],
)
def test_arguments_out_of_range_are_refused(k, n, alpha, sigma):
    with pytest.raises(ValueError, match="must hold"):
        bounds.certified_radius(k, n, alpha, sigma)


@pytest.mark.parametrize("counts", [[[0, 0, 0]], [[3, -1, 0]], [3, 1, 0], [[3]], [[1.0, 2.0]]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="counts must"):
        bounds.certify(counts, counts, 0.001, 0.5)
    with pytest.raises(ValueError, match="counts must"):
        bounds.predict(counts, 0.001)


def test_selection_and_estimation_of_different_images_are_refused():
    with pytest.raises(ValueError, match="agree in shape"):
        bounds.certify([[1, 0, 0]], [[1, 0, 0], [1, 0, 0]], 0.001, 0.5)


@pytest.mark.process
def test_bounds_metrics_counts_and_estimates_load_nothing_heavy():
    code = (
        "import sys, cadis_ray.smoothing.bounds, cadis_ray.smoothing.metrics, cadis_ray.smoothing.counts,"
        " cadis_ray.smoothing.estimate, cadis_ray.smoothing.sequential, cadis_ray.certification.logs; "
        "print(sorted({'torch', 'ray', 'mlflow', 'scipy.stats'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
