import numpy as np
import pytest
from scipy import special

from cadis_ray.certification.logs import inferred_counts, read_log
from cadis_ray.smoothing.estimate import contributions, next_samples
from cadis_ray.smoothing.racing import Rung, may_still_win, rungs, upper_bound
from tests.helpers.places import SHARED

LOGS = sorted((SHARED / "reference" / "certification_logs").glob("*_sigma_0.50.tsv"))
SETTINGS = {"sigma": 0.5, "alpha": 0.001, "at_n": 10_000}
IMAGES = 600


def count(rng, p, k, n, rung):
    """Add the rung's votes to (k, n) of all images."""
    k, n = k.copy(), n.copy()
    of = slice(0, rung.images)
    for _ in rung.schedule:
        following = next_samples(k[of], n[of], rung.schedule)
        k[of] += rng.binomial(following - n[of], p[of])
        n[of] = following
    return k, n


def race(rng, models, comparisons, error=0.05):
    """One search over p_A (T, IMAGES): (the trials stopped, calls made, calls without stopping)."""
    incumbent, best, stopped, calls, full = [], -1.0, [], 0, 0
    for trial, p in enumerate(models):
        k = n = np.zeros(IMAGES, np.int64)
        found, going = [], True
        for i, rung in enumerate(rungs(IMAGES)):
            k, n = count(rng, p, k, n, rung)
            if going:
                found.append((k[: rung.images], n[: rung.images]))
                going = not incumbent or may_still_win(
                    found[i], incumbent[i], comparisons=comparisons, error=error, **SETTINGS
                )
                calls += 0 if going else n.sum()
        full += n.sum()
        if not going:
            stopped.append(trial)
            continue
        calls += n.sum()
        score = contributions(*found[-1], **SETTINGS).mean()
        if score > best:
            incumbent, best = found, score
    return stopped, calls, full


def many_races(draw, comparisons, repetitions):
    """(Share of searches that stopped the truly best, calls made / calls without stopping)."""
    rng = np.random.default_rng(0)
    false, calls, full = 0, 0, 0
    for _ in range(repetitions):
        models, best = draw(rng)
        stopped, made, without = race(rng, models, comparisons)
        false, calls, full = false + (best in stopped), calls + made, full + without
    return false / repetitions, calls / full


def synthetic(spread):
    """Eight trials alike in what is hard, of qualities that differ by ``spread`` in Phi^-1(p_A)."""

    def draw(rng):
        quality = rng.normal(0, spread, 8)
        u = rng.normal(1, 1.2, IMAGES) + quality[:, None] + rng.normal(0, 0.3, (8, IMAGES))
        return special.ndtr(u), int(quality.argmax())

    return draw


@pytest.mark.parametrize(("spread", "at_most"), [(0.03, 1.0), (0.3, 0.7)])
def test_the_best_is_rarely_stopped_and_calls_are_saved(spread, at_most):
    false, calls = many_races(synthetic(spread), comparisons=3, repetitions=50)
    assert false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 50)
    assert calls < at_most


def test_the_best_of_the_published_methods_is_rarely_stopped():
    if not LOGS:
        pytest.skip("the published certification logs are not there")
    logs = [read_log(path) for path in LOGS]
    p = np.array([np.where(log.correct, inferred_counts(log, 0.5, 100_000, 0.001) / 100_000, 0) for log in logs])
    best = int(np.argmax([(log.radius * log.correct).mean() for log in logs]))

    def draw(rng):
        order, images = rng.permutation(len(p)), rng.integers(p.shape[1], size=IMAGES)
        return p[np.ix_(order, images)], int(np.flatnonzero(order == best)[0])

    false, calls = many_races(draw, comparisons=3, repetitions=30)
    assert false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 30)
    assert calls < 0.95


def test_the_bound_is_missed_as_often_as_it_says():
    rng = np.random.default_rng(1)
    rung = Rung(IMAGES, (32, 128, 512))
    none = np.zeros(IMAGES, np.int64)
    missed = []
    for _ in range(400):
        models = special.ndtr(rng.normal(1, 1.2, IMAGES) + rng.normal(0, 0.3, (2, IMAGES)))
        missed.append(upper_bound(*(count(rng, p, none, none, rung) for p in models), error=0.2, **SETTINGS) < 0)
    assert np.mean(missed) == pytest.approx(0.2, abs=3 * np.sqrt(0.16 / 400))


def test_more_comparisons_make_stopping_harder():
    rng = np.random.default_rng(2)
    p = special.ndtr(rng.normal(1, 1.2, 400))
    n = np.full(400, 64)
    better, worse = (rng.binomial(n, q) for q in (p, 0.99 * p))
    goes_on = [may_still_win((worse, n), (better, n), comparisons=c, **SETTINGS) for c in (1, 10**9)]
    assert goes_on == [False, True]
    assert may_still_win((better, n), (worse, n), comparisons=1, **SETTINGS)
    assert may_still_win((better, n), (better, n), comparisons=1, **SETTINGS)  # itself: the bound is 0


def test_rungs_grow_to_all_images():
    whole = (32, 128, 512)
    assert rungs(2_000) == (Rung(125, whole[:2]), Rung(500, whole), Rung(2_000, whole))
    assert rungs(401, (64,), count=2, factor=2) == (Rung(201, (64,)), Rung(401, (64,)))
    assert rungs(5, count=1) == (Rung(5, whole),)
    with pytest.raises(ValueError, match="images >= 2"):
        rungs(1)


@pytest.mark.parametrize(("comparisons", "error"), [(0, 0.05), (1, 0.0), (1, 0.5)])
def test_impossible_error_rates_are_refused(comparisons, error):
    votes = ([3, 4], [5, 5])
    with pytest.raises(ValueError, match="must hold"):
        may_still_win(votes, votes, comparisons=comparisons, error=error, **SETTINGS)
