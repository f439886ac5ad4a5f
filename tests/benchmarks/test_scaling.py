"""The simulation of ``benchmarks/scaling.py`` is list scheduling."""

import importlib.util

import numpy as np
import pytest

from tests.helpers.places import ROOT

FILE = ROOT / "benchmarks" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", FILE)
assert spec is not None
assert spec.loader is not None
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


def test_efficiency_of_schedules_made_by_hand() -> None:
    assert scaling.efficiency([1.0] * 8, [1, 1]) == 1
    assert scaling.efficiency([1.0] * 9, [1, 1]) == pytest.approx(9 / 2 / 5)
    # The long block comes last and alone: 3 seconds of work in each, then 4 more.
    assert scaling.efficiency([1, 1, 1, 1, 1, 1, 4], [1, 1]) == pytest.approx(10 / 2 / 7)
    # One worker three times as slow does one block while the other does three.
    assert scaling.efficiency([1.0] * 4, [1, 3]) == pytest.approx(4 / (4 / 3) / 3)


def test_no_list_schedule_is_worse_than_its_bound() -> None:
    """Graham 1966: at most the mean load and the longest block, which a slow worker stretches."""
    chance = np.random.default_rng(0)
    for workers in (2, 7, 64):
        durations, slowness = chance.exponential(size=500), np.r_[3.0, np.ones(workers - 1)]
        ideal = durations.sum() / (1 / slowness).sum()
        assert 1 >= scaling.efficiency(durations, slowness) >= ideal / (ideal + 3 * durations.max())
