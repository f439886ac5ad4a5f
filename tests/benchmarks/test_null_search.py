"""Thirty trials that are all equally good: what the search, the second count and the certificate say of the best."""

import importlib.util
import sys

import numpy as np
import pytest
from scipy import special

from tests.helpers.places import ROOT

FILE = ROOT / "benchmarks" / "null_search.py"
spec = importlib.util.spec_from_file_location("null_search", FILE)
assert spec
assert spec.loader
null_search = sys.modules["null_search"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(null_search)


def test_the_best_of_equals_looks_better_than_it_is_until_it_is_counted_again() -> None:
    p = special.ndtr(np.random.default_rng(0).normal(1, 1.2, 4_000))
    settings = {"sigma": 0.5, "trials": 30, "images": 300}
    found = [null_search.repetition(np.random.default_rng(seed), p, **settings) for seed in range(12)]
    said = null_search.conclusions(found)
    any_ = said["any_trial"]
    assert said["search"] - any_ > 5 * (said["se_of_search"] + said["se_of_any_trial"])  # the winner's curse
    assert said["winners_search"] - any_ > 4 * (said["se_of_winners_search"] + said["se_of_any_trial"])
    assert said["recount"] - any_ < 0.6 * (said["search"] - any_)  # best of three, no longer of thirty
    assert abs(said["certified"]) < 0.003  # nothing was selected on these images; misses of n0 cost a little
    assert said["covered"] >= 0.75


def test_identical_weights_under_shared_noise_are_one_trial() -> None:
    p = special.ndtr(np.random.default_rng(0).normal(1, 1.2, 500))
    found = null_search.repetition(np.random.default_rng(1), p, sigma=0.5, trials=4, images=100, shared=True)
    assert found["search"] == found["winners_search"] == pytest.approx(found["any_trial"])
