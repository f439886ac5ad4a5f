"""The winner is the best complete searched trial by its estimate; the estimate looks at the label's votes only."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cadis_ray.results.study import summarise
from cadis_ray.search.objective import best_trial, finalists, pareto_front, to_recount
from cadis_ray.search.trials import TrialResult, estimate_from
from cadis_ray.smoothing.estimate import Estimate, estimate
from cadis_ray.study.load import load_study
from cadis_ray.study.sections import CleanAtLeast, Objective
from cadis_ray.study.study import Study
from tests.helpers.places import DIGITS

BASE = load_study(DIGITS).base


def trial(number: int, acr: float | None, **changes) -> TrialResult:
    found = None if acr is None else Estimate(acr, 0.01, 0.9, {0.0: 0.9}, 1000, 10, 10)
    return replace(TrialResult(number, f"trial-{number}", False, "complete", None, {}, found), **changes)


def test_only_complete_searched_trials_can_win() -> None:
    others = [
        trial(0, 0.9, baseline=True),
        trial(1, None, state="failed"),
        trial(2, 0.8, state="pruned"),
        trial(3, 0.7, state="running"),
    ]
    assert best_trial(others) is None
    winner = best_trial([*others, trial(4, 0.2), trial(5, 0.3), trial(6, 0.3)])
    assert winner is not None
    assert winner.name == "trial-5"


def test_the_estimate_is_that_of_the_labels_votes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    counts = rng.multinomial(20, [0.5, 0.2, 0.2, 0.1], size=50)
    settings = BASE.certification
    expected = estimate(
        np.array([row[label] for row, label in zip(counts, labels, strict=True)]),
        np.full(50, 20),
        sigma=BASE.sigma,
        alpha=settings.alpha,
        at_n=settings.n,
        radii=settings.radii,
    )
    assert estimate_from(BASE, labels, counts) == expected


def scored(number: int, acr: float, clean: float, **changes) -> TrialResult:
    return replace(trial(number, acr, **changes), estimate=Estimate(acr, 0.01, clean, {0.5: acr / 2}, 1000, 10, 10))


LIMITED = Objective(maximise="acr", clean_at_least=CleanAtLeast(baseline="shelf", minus=0.01))


def names(trials: list[TrialResult]) -> list[str]:
    return [found.name for found in trials]


def test_an_infeasible_trial_wins_only_where_none_is_feasible() -> None:
    shelf = scored(0, 0.1, 0.90, baseline=True, name="shelf")
    drifted, near, feasible = scored(1, 0.9, 0.70), scored(2, 0.5, 0.88), scored(3, 0.2, 0.89)
    assert names(pareto_front([shelf, drifted, near, feasible], LIMITED)) == ["trial-3"]
    assert names(pareto_front([shelf, drifted, near], LIMITED)) == ["trial-2"]
    assert names(pareto_front([shelf, drifted, near, feasible])) == ["trial-1"]
    failed = replace(shelf, estimate=None, state="failed")
    assert names(pareto_front([failed, drifted, near], LIMITED)) == ["trial-1"]


def test_the_front_is_that_of_brute_force() -> None:
    both = Objective(maximise=("acr", "clean"))
    rng = np.random.default_rng(3)
    for _ in range(20):
        trials = [scored(i, *(rng.integers(0, 6, 2) / 10)) for i in range(12)]
        points = [(found.estimate.acr, found.estimate.clean) for found in trials if found.estimate]
        expected = {
            f"trial-{i}"
            for i, (x, y) in enumerate(points)
            if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        }
        front = pareto_front(trials, both)
        assert set(names(front)) == expected
        winner = best_trial(trials, both)
        assert winner is not None
        assert winner.estimate
        assert winner.estimate.acr == max(x for x, _ in points)


def limited_study(count: int = 3) -> Study:
    study = load_study(DIGITS)
    chosen = study.finalists.model_copy(update={"count": count})
    return study.model_copy(update={"objective": LIMITED, "finalists": chosen})


def test_finalists_are_the_feasible_best_and_then_those_nearest_to_the_limit() -> None:
    shelf = scored(0, 0.1, 0.9, baseline=True, name="shelf")
    trials = [shelf, scored(1, 0.9, 0.6), scored(2, 0.3, 0.89), scored(3, 0.8, 0.7), scored(4, 0.4, 0.95)]
    pruned = scored(5, 0.7, 0.95, state="pruned")
    assert names(finalists([*trials, pruned], LIMITED, 3)) == ["trial-4", "trial-2", "trial-3"]
    assert names(finalists([*trials, pruned], LIMITED, 9)) == ["trial-4", "trial-2", "trial-3", "trial-1"]
    both = Objective(maximise=("acr", "clean"))
    assert names(finalists(trials, both, 3)) == ["trial-1", "trial-3", "trial-4"]  # trial-2 is dominated by trial-4
    assert to_recount(limited_study(2), trials) == ["trial-4", "trial-2", "shelf"]
    assert to_recount(limited_study(), [shelf, pruned]) == []


def test_the_second_count_alone_chooses_the_winner(tmp_path: Path) -> None:
    """Of the finalists only, against the limit as it was counted again; the search's estimates stay as they were."""
    shelf = scored(0, 0.1, 0.9, baseline=True, name="shelf")
    trials = [shelf, scored(1, 0.5, 0.9), scored(2, 0.4, 0.9), scored(3, 0.3, 0.9)]

    def winner(**again: tuple[float, float]) -> str | None:
        recounts = {name.replace("_", "-"): scored(0, *found).estimate for name, found in again.items()}
        result = summarise(limited_study(2), tmp_path, trials, {k: v for k, v in recounts.items() if v})
        assert [t.estimate for t in result.trials] == [t.estimate for t in trials]
        assert [t.name for t in result.trials if t.recount] == [t.name for t in trials if t.name in recounts]
        assert (result.clean_limit, result.front) == (0.9 - 0.01, ("trial-1",))
        return result.winner

    assert winner(trial_1=(0.35, 0.9), trial_2=(0.38, 0.9), shelf=(0.1, 0.9)) == "trial-2"
    assert winner(trial_1=(0.39, 0.9), trial_2=(0.38, 0.9), shelf=(0.1, 0.9)) == "trial-1"
    assert winner(trial_1=(0.39, 0.9), trial_2=(0.38, 0.92), shelf=(0.1, 0.92)) == "trial-2"
    assert winner() is None
