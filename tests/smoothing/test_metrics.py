from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cadis_ray.smoothing.metrics import acr, certified_accuracy, paired_difference

LOGS = Path(__file__).parents[3] / "shared" / "reference" / "cohen"


def test_acr_and_certified_accuracy_by_hand():
    radii, correct = [0.5, 0.2, 0.9, 0.0, 0.4996], [True, True, False, False, True]
    assert acr(radii, correct) == pytest.approx((0.5 + 0.2 + 0.4996) / 5)
    assert [certified_accuracy(radii, correct, r) for r in (0, 0.2, 0.3, 0.5, 0.9)] == [0.6, 0.6, 0.4, 0.2, 0]


def test_a_radius_of_zero_is_not_certified_at_zero():
    assert certified_accuracy([0.0, 0.1], [True, True], 0) == 0.5


@pytest.mark.parametrize(
    ("name", "expected_acr", "abstentions", "curve"),
    [
        ("cifar10_resnet110_noise_0.25_test_sigma_0.25", 0.4289, None, {}),
        (
            "cifar10_resnet110_noise_0.50_test_sigma_0.50",
            0.5375,
            83,
            {0: 0.652, 0.25: 0.546, 0.5: 0.414, 0.75: 0.320, 1.0: 0.234, 1.5: 0.094},
        ),
        ("imagenet_resnet50_noise_0.50_test_sigma_0.50", 0.7325, None, {}),
    ],
)
def test_published_logs_give_the_known_values(name, expected_acr, abstentions, curve):
    path = LOGS / f"{name}.tsv"
    if not path.exists():
        pytest.skip("the published certification logs are not beside this checkout")
    predict, radii, correct = np.loadtxt(path, skiprows=1, usecols=(2, 3, 4), unpack=True)
    assert acr(radii, correct) == pytest.approx(expected_acr, abs=5e-5)
    assert {r: certified_accuracy(radii, correct, r) for r in curve} == pytest.approx(curve, abs=1e-9)
    assert abstentions is None or (predict == -1).sum() == abstentions


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
