import json
import subprocess
import sys

import numpy as np
import pytest

from cadis_ray.models.denoisers.schedule import make_schedule
from tests.helpers.places import GOLDEN

PROGRAMS = {"improved": ("cosine", 4000), "guided": ("linear", 1000)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_timesteps_are_those_of_the_authors_program(program):
    schedule = make_schedule(*PROGRAMS[program])
    table = json.loads((GOLDEN / f"{program}_manifest.json").read_text())["timesteps"]
    assert len(table) == 7
    for sigma, row in table.items():
        t = schedule.timestep(float(sigma))
        assert t == row["timestep"]
        assert 2 * schedule.sigma_at(t) == pytest.approx(row["model_sigma"], rel=1e-12)
        assert schedule.alpha_bar[t] == pytest.approx(row["sqrt_alpha_bar"] ** 2, rel=1e-12)


@pytest.mark.parametrize(("name", "steps", "timesteps"), [
    ("cosine", 4000, (1158, 1984, 2809)), ("linear", 1000, (145, 259, 396)),
])  # fmt: skip
def test_known_timesteps(name, steps, timesteps):
    schedule = make_schedule(name, steps)
    assert tuple(schedule.timestep(sigma) for sigma in (0.25, 0.5, 1.0)) == timesteps


@pytest.mark.parametrize(("name", "steps"), [("cosine", 50), ("linear", 100), ("cosine", 1000)])
def test_timestep_is_the_first_with_at_least_sigma(name, steps):
    schedule = make_schedule(name, steps)
    low, high = schedule.sigma_range
    sigmas = [low, *np.geomspace(low, high, 57)[1:-1], high, *(schedule.sigma_at(t) for t in range(steps))]
    for sigma in sigmas:
        t = schedule.timestep(sigma)
        first = next(i for i in range(1, steps) if np.sqrt(1 / schedule.alpha_bar[i] - 1) >= 2 * sigma * (1 - 1e-12))
        assert t == first
        assert schedule.sigma_at(t) >= sigma


def test_linear_schedule_is_scaled_to_its_number_of_steps():
    betas = 1 - make_schedule("linear", 250).alpha_bar[1:] / make_schedule("linear", 250).alpha_bar[:-1]
    assert betas[-1] == pytest.approx(0.02 * 4)
    assert make_schedule("linear", 250).alpha_bar[0] == pytest.approx(1 - 1e-4 * 4)


@pytest.mark.parametrize("factor", [0.999, 0.0, -1.0, float("nan")])
def test_sigma_below_the_range_is_refused_with_the_range(factor):
    schedule = make_schedule("linear", 1000)
    low, high = schedule.sigma_range
    with pytest.raises(ValueError, match=rf"\[{low:.6g}, {high:.6g}\].*got {factor * low}"):
        schedule.timestep(factor * low)


def test_sigma_above_the_range_is_refused():
    schedule = make_schedule("linear", 1000)
    with pytest.raises(ValueError, match=r"78\.7036\].*got 79"):
        schedule.timestep(79)


@pytest.mark.parametrize(("name", "steps"), [("sigmoid", 1000), ("linear", 20), ("cosine", 1)])
def test_impossible_schedules_are_refused(name, steps):
    with pytest.raises(ValueError, match=f"{steps}|{name}"):
        make_schedule(name, steps)


@pytest.mark.process
def test_schedule_and_architecture_do_not_import_torch():
    code = "from cadis_ray.models.denoisers import architecture, schedule; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
