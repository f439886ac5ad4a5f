"""The winner is the best complete searched trial by its estimate; the estimate looks at the label's votes only."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cadis_ray.config import load_study
from cadis_ray.results import Estimate, TrialResult
from cadis_ray.smoothing.estimate import estimate
from cadis_ray.summary import best_trial, estimate_from

BASE = load_study(Path(__file__).parents[1] / "search_spaces" / "digits.yaml").base


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
