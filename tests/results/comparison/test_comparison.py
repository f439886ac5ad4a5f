from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from cadis_ray.errors import UsageError
from cadis_ray.results.comparison.compare import (
    Certified,
    ComparedModel,
    Comparison,
    Protocol,
    differences,
    differing,
    holm,
    records,
    standard_error,
)
from cadis_ray.results.comparison.tables import best_table, certificates_table, estimates_table
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.smoothing.metrics import certified_accuracy

COHEN = Protocol("protocol", 100, 100_000, 0.001)


def certified(radius, sigma: float | None = 0.5, method="m", protocol: Protocol | None = COHEN, label=None, wrong=()):
    radius, images = np.array(radius, float), len(radius)
    labels = np.full(images, 3) if label is None else np.array(label)
    predict = np.where(radius > 0, labels, -1)
    predict[list(wrong)] = 9
    return Certified(method, sigma, protocol, np.arange(images), labels, predict, radius, predict == labels)


def comparison(baseline: str | None = None, /, **models: Certified) -> Comparison:
    return Comparison(
        "t", None, tuple(ComparedModel(name, {}, c) for name, c in models.items()), (0.0, 0.5, 1.0), baseline=baseline
    )


def drawn(seed: int, images: int = 40, shift: float = 0.0) -> Certified:
    generator = np.random.default_rng(seed)
    return certified(np.maximum(0, generator.normal(0.4 + shift, 0.4, images)), wrong=(1, 5))


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.5], [0.9, 0.001, 0.6, 0.02, 0.02], [0.3], []])
def test_holm_is_the_closure_of_bonferroni(p: list[float]):
    everyone = range(len(p))
    subsets = [s for size in range(1, len(p) + 1) for s in combinations(everyone, size)]
    closed = [max(min(1, len(s) * min(p[i] for i in s)) for s in subsets if one in s) for one in everyone]
    assert holm(p) == pytest.approx(closed)


def test_differences_are_paired_t_tests_against_the_baseline():
    a, b, c = drawn(1), drawn(2, shift=0.3), drawn(3)
    found = differences(comparison("b", a=a, b=b, c=c))
    tests = {}
    for name, one in (("a", a), ("c", c)):
        tests[name] = stats.ttest_rel(one.radius * one.correct, b.radius * b.correct)
        d, interval = found[name], tests[name].confidence_interval(0.95)
        assert (d.low_95, d.high_95, d.p) == pytest.approx((interval.low, interval.high, tests[name].pvalue))
        assert d.mean == pytest.approx(np.mean(one.radius * one.correct) - np.mean(b.radius * b.correct))
    assert list(found) == ["a", "c"]
    assert [d.p_holm for d in found.values()] == pytest.approx(holm([tests["a"].pvalue, tests["c"].pvalue]))
    assert differences(comparison(a=a, b=b)) == {}


def test_models_without_any_difference_have_p_1():
    found = differences(comparison("a", a=drawn(1), b=drawn(1)))
    assert (found["b"].mean, found["b"].p, found["b"].p_holm) == (0, 1, 1)


@pytest.mark.parametrize(
    "other",
    [
        certified([0.5, 0.6, 0.7], label=[3, 3, 4]),
        certified([0.5, 0.6]),
        certified([0.5, 0.6, 0.7], protocol=Protocol("protocol", 100, 10_000, 0.001)),
        certified([0.5, 0.6, 0.7], protocol=Protocol("sequential", 100, 100_000, 0.001)),
        certified([0.5, 0.6, 0.7], protocol=None),
    ],
)
def test_other_images_labels_or_protocols_are_not_subtracted(other: Certified):
    made = comparison("a", a=certified([0.5, 0.6, 0.7]), b=other, c=certified([0.1, 0.2, 0.4]))
    assert list(differences(made)) == ["c"]
    table = certificates_table(made)
    assert [row[-2] == "-" for row in table.rows] == [True, True, False]
    assert any("another n0, n, alpha" in note for note in table.notes)


def test_an_unknown_baseline_is_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match="'x' has no certificates; give one of a, b"):
        differences(comparison("x", a=drawn(1), b=drawn(2)))


def test_records_hold_the_metrics_and_their_standard_errors():
    c = drawn(4)
    (row,) = records(comparison(a=c))
    sure = c.radius * c.correct
    assert (row["name"], row["sigma"], row["n_images"]) == ("a", 0.5, 40)
    assert row["abstained"] == np.sum(c.radius == 0)
    assert (row["acr"], row["acr_se"]) == pytest.approx((sure.mean(), stats.sem(sure)))
    assert list(row["certified_accuracy"]) == ["0.0", "0.5", "1.0"]
    for r, share in row["certified_accuracy"].items():
        reached = c.correct & (c.radius >= float(r)) & (c.radius > 0)
        assert share == reached.mean()
        assert row["certified_accuracy_se"][r] == pytest.approx(stats.sem(reached))
    assert row["clean_accuracy"] == c.correct.mean()
    (one,) = records(comparison(a=certified([0.7])))
    assert (one["acr_se"], one["certified_accuracy_se"]["0.5"]) == (None, None)
    assert standard_error([1.0]) is None


def test_only_parameters_that_differ_are_columns_and_what_a_recipe_lacks_does_not_differ():
    models = [
        ComparedModel("a", {"sigma": 0.5, "x.r": 4, "x.lr": 0.1, "x.recipe": "f"}, drawn(1)),
        ComparedModel("b", {"sigma": 0.5, "x.r": 8, "x.lr": 0.1, "x.recipe": "f"}, drawn(2)),
        ComparedModel("c", {"sigma": 0.5, "x.recipe": "none"}, drawn(3)),
    ]
    assert differing(models) == ("x.r", "x.recipe")
    table = certificates_table(Comparison("t", "d", tuple(models), (0.5,)))
    assert table.columns[:4] == ("model", "sigma", "r", "recipe")
    assert [row[2:4] for row in table.rows] == [("4", "f"), ("8", "f"), ("-", "none")]


def test_estimates_never_stand_among_certificates():
    guess = Estimate(0.777, 0.01, 0.9, {0.0: 0.999}, 100_000, 400, 64)
    trials = [TrialResult(i, name, i == 0, "complete", None, {}, guess) for i, name in enumerate("ab")]
    models = (ComparedModel("a", {}, drawn(1), trials[0]), ComparedModel("b", {}, None, trials[1]))
    made = Comparison("t", "d", models, (0.0, 0.5), winner="b")
    table = certificates_table(made)
    assert [row[0] for row in table.rows] == ["a"]
    assert "certified ACR@100000" in table.columns
    assert not any("0.777" in cell or "99.9" in cell for row in table.rows for cell in row)
    estimates = estimates_table(made)
    assert estimates is not None
    assert "not certificates" in estimates.title
    assert [row[0] for row in estimates.rows] == ["a (b)", "b *"]
    assert set(estimates.columns) & set(table.columns) == {"clean", "r = 0", "r = 0.5"}
    first, second = records(made)
    assert first["acr"] != 0.777 == first["estimate"]["acr"]
    assert (second["acr"], second["certified_accuracy"], second["n_images"]) == (None, None, None)
    assert estimates_table(comparison(a=drawn(1))) is None


def test_the_envelope_takes_the_best_sigma_at_every_radius():
    small, large = certified([0.6, 0.7, 0.8, 0.9], 0.25), certified([0, 0, 1.2, 1.4], 1.0)
    table = best_table(comparison(small=small, large=large, alone=certified([1, 1, 1, 1], 0.5, method="other")))
    assert table is not None
    assert table.rows == [("m", "0.25/1", "100.0 (100.0) 0.25", "100.0 (100.0) 0.25", "50.0 (50.0) 1")]
    best = [max(certified_accuracy(c.radius, c.correct, r) for c in (small, large)) for r in (0.0, 0.5, 1.0)]
    assert [float(cell.split()[0]) for cell in table.rows[0][2:]] == [100 * share for share in best]


def test_sequential_certificates_are_said_to_have_an_acr_of_their_own():
    sequential = certified([0.5, 0.6], protocol=Protocol("sequential", 100, 100_000, 0.001))
    assert any("Sequential" in note for note in certificates_table(comparison(a=sequential)).notes)
    assert not any("Sequential" in note for note in certificates_table(comparison(a=drawn(1))).notes)


def test_no_envelope_over_other_images_the_same_sigma_twice_or_one_sigma():
    pair = {"a": certified([0.6, 0.7], 0.25, "kept"), "b": certified([0.6, 0.7], 0.5, "kept")}
    twice = {"c": certified([0.6, 0.7], 0.25, "twice"), "d": certified([0.6, 0.7], 0.25, "twice")}
    other = {"e": certified([0.6, 0.7], 0.25, "odd"), "f": certified([0.6], 0.5, "odd")}
    unknown = {"g": certified([0.6], None), "h": certified([0.6], None)}
    table = best_table(comparison(**pair, **twice, **other, **unknown))
    assert table is not None
    assert [row[0] for row in table.rows] == ["kept"]
    assert table.notes[-1].endswith(": twice, odd.")
    assert best_table(comparison(**twice, **unknown)) is None
