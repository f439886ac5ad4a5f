import numpy as np
import pytest
from scipy import stats

from cadis_ray.smoothing.metrics import (
    acr,
    best_over_sigma,
    certified_accuracy,
    paired_difference,
)


def test_acr_and_certified_accuracy_by_hand():
    radii, correct = [0.5, 0.2, 0.9, 0.0, 0.4996], [True, True, False, False, True]
    assert acr(radii, correct) == pytest.approx((0.5 + 0.2 + 0.4996) / 5)
    assert [certified_accuracy(radii, correct, r) for r in (0, 0.2, 0.3, 0.5, 0.9)] == [0.6, 0.6, 0.4, 0.2, 0]


def test_a_radius_of_zero_is_not_certified_at_zero():
    assert certified_accuracy([0.0, 0.1], [True, True], 0) == 0.5


def test_paired_difference_is_the_t_interval():
    rng = np.random.default_rng(0)
    a = rng.normal(size=30)
    b = 0.9 * a + rng.normal(0.1, 0.2, size=30)
    oracle = stats.ttest_rel(a, b).confidence_interval(0.9)
    difference = paired_difference(a, b, confidence=0.9)
    assert (difference.low, difference.high) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert difference.mean == pytest.approx((a - b).mean())
    assert difference.se == pytest.approx(stats.sem(a - b))


@pytest.mark.parametrize(
    ("radii", "correct", "r"),
    [
        ([], [], 0),
        ([0.1], [True, False], 0),
        ([-0.1], [True], 0),
        ([float("nan")], [True], 0),
        ([0.1], [2], 0),
        ([0.1], [True], -1),
        ([0.1], [True], float("nan")),
    ],
)
def test_impossible_certificates_are_refused(radii, correct, r):
    with pytest.raises(ValueError, match="must"):
        certified_accuracy(radii, correct, r)


@pytest.mark.parametrize(("a", "b", "confidence"), [([1], [1], 0.95), ([1, 2], [1], 0.95), ([1, 2], [1, 3], 1.0)])
def test_impossible_pairs_are_refused(a, b, confidence):
    with pytest.raises(ValueError, match="must"):
        paired_difference(a, b, confidence)


def test_the_envelope_takes_each_radius_from_the_sigma_that_is_best_there():
    certificates = {
        0.5: ([0.4, 0.9, 0.0, 1.1], [True, True, False, True]),
        0.25: ([0.3, 0.5, 0.2, 0.6], [True, True, True, False]),
    }
    best = best_over_sigma(certificates, [0.0, 0.25, 0.35, 1.0, 2.0])
    assert best == {0.0: (0.75, 0.25), 0.25: (0.75, 0.5), 0.35: (0.75, 0.5), 1.0: (0.25, 0.5), 2.0: (0.0, 0.25)}
    with pytest.raises(ValueError, match="at least one sigma"):
        best_over_sigma({}, [0.5])
