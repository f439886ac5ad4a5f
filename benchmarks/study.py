"""How good a configuration does a whole search find, and for how many classifier calls?

    python benchmarks/study.py [--table FOLDER] [--seeds 20] [--images 1000]

Searches lambda and epsilon on two response surfaces made by hand and, with the FOLDER that
``benchmarks/digits_table.py`` made, on real fine-tunings of the digits. Votes are binomial draws from each image's p_A,
new ones for every trial. Of the digits p_A is drawn from its posterior given the table's counts, by one quantile an
image for all configurations.

  grid   every configuration of a grid trained to its end, 1,000 images (or --images) x (100 + 100,000) samples
  naive  Optuna's TPE and ASHA on the mean certified radius at 100 samples, as many trials as the grid has
  ours   the same TPE on the estimate of ACR at 100,000, racing, and three finalists counted again

A search is judged by the true ACR at n = 100,000 of what it chose, over all images of the population. ``within_se``:
seeds in which that is at most one standard error below what the grid chose; the error is of the grid's ACR on its
images, ``within_paired_se`` that of the paired difference between the two choices on them, which is smaller. Prints a
JSON line a problem and protocol: means over seeds.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy import special

from cadis_ray.search.sampling import draw
from cadis_ray.smoothing.bounds import certified_radius
from cadis_ray.smoothing.estimate import GRID, SCHEDULE, acr_at, mean_radius, next_samples, npmle
from cadis_ray.smoothing.racing import Rung, may_still_win, rung_at, rungs_of
from cadis_ray.study.load import load_study
from cadis_ray.study.space import distributions, grid
from cadis_ray.study.study import Study

DIGITS = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
LAMBDA, EPSILON = "finetuning.adv_weight", "finetuning.attack_radius"
EPOCHS, N0, N, NAIVE, ALPHA = 5, 100, 100_000, 100, 0.001
FINALISTS, REDUCTION = 3, 3
Floats = NDArray[np.float64]
Parameters = dict[str, Any]


class Problem(NamedTuple):
    """``p(parameters, epoch)``: p_A (N,) of the population's images; ``grid``'s and ``study``'s spaces are alike."""

    name: str
    sigma: float
    population: int
    images: int
    grid: list[Parameters]
    study: Study
    p: Callable[[Parameters, int], Floats]


class Found(NamedTuple):
    """What a search chose, and the classifier calls it took."""

    parameters: Parameters
    calls: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="the folder of benchmarks/digits_table.py")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--images", type=int, default=1_000, help="validation images of the response surface")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    problems = [surface(arguments.images, trade) for trade in (False, True)]
    problems += [digits(arguments.table)] if arguments.table else []
    for problem in problems:
        for line in compare(problem, arguments.seeds):
            print(json.dumps(line), flush=True)


def compare(problem: Problem, seeds: int) -> list[dict[str, Any]]:
    """A line a protocol."""
    found: dict[str, list[tuple[Found, float, float, float]]] = {"grid": [], "naive": [], "ours": []}
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 1])
        images = rng.permutation(problem.population)[: problem.images]
        best = by_grid(problem, images, rng)
        choices = {"grid": best, "naive": by_asha(problem, images, seed, rng), "ours": ours(problem, images, seed, rng)}
        top = contribution(problem, best.parameters)
        for name, choice in choices.items():
            own = contribution(problem, choice.parameters)
            paired = float((top - own)[images].std(ddof=1) / np.sqrt(len(images)))
            alone = float(top[images].std(ddof=1) / np.sqrt(len(images)))
            found[name].append((choice, float(top.mean() - own.mean()), alone, paired))
    reference = np.mean([choice.calls for choice, *_ in found["grid"]])
    lines = []
    for name, searches in found.items():
        lost = np.array([lost for _, lost, _, _ in searches])
        calls = float(np.mean([choice.calls for choice, *_ in searches]))
        line = {
            "problem": problem.name, "protocol": name, "seeds": seeds, "images": problem.images,
            "calls": round(calls), "calls_less": round(float(reference) / calls, 1),
            "acr": round(float(np.mean([contribution(problem, c.parameters).mean() for c, *_ in searches])), 5),
            "acr_lost_to_grid": round(float(lost.mean()), 5), "acr_lost_at_worst": round(float(lost.max()), 5),
            "within_se": int(sum(drop <= alone for _, drop, alone, _ in searches)),
            "within_paired_se": int(sum(drop <= paired for _, drop, _, paired in searches)),
            "se": round(float(np.mean([alone for *_, alone, _ in searches])), 5),
        }  # fmt: skip
        lines.append(line)
    return lines


def by_grid(problem: Problem, images: NDArray[np.int64], rng: np.random.Generator) -> Found:
    """The largest mean certified radius of the official protocol; radii without the selection's misses."""
    table = partial(certified_radius, n=N, alpha=ALPHA, sigma=problem.sigma)
    scores = [table(rng.binomial(N, problem.p(parameters, EPOCHS)[images])).mean() for parameters in problem.grid]
    return Found(problem.grid[int(np.argmax(scores))], len(problem.grid) * len(images) * (N0 + N))


def by_asha(problem: Problem, images: NDArray[np.int64], seed: int, rng: np.random.Generator) -> Found:
    """TPE and ASHA on the mean certified radius at NAIVE samples."""
    radius = certified_radius(np.arange(NAIVE + 1), NAIVE, ALPHA, problem.sigma)
    past: list[FrozenTrial] = []
    rungs: dict[int, list[float]] = {}
    calls, score = 0, 0.0
    for index in range(len(problem.grid)):
        parameters = drawn(problem, seed, index, past)
        values = {}
        for epoch in range(1, EPOCHS + 1):
            score = float(radius[rng.binomial(NAIVE, problem.p(parameters, epoch)[images])].mean())
            calls += len(images) * NAIVE
            values[epoch] = score
            reached = rungs.setdefault(epoch, [])
            behind = bool(reached) and score < np.percentile(reached, 100 * (1 - 1 / REDUCTION))
            reached.append(score)
            if epoch in (1, REDUCTION) and behind:
                break
        past.append(told(problem, parameters, score, values, whole=len(values) == EPOCHS))
    best = max((trial for trial in past if trial.state == TrialState.COMPLETE), key=lambda trial: trial.values[0])
    return Found(best.params, calls)


def ours(problem: Problem, images: NDArray[np.int64], seed: int, rng: np.random.Generator) -> Found:
    """TPE on the estimate of ACR at N, racing against the best so far, and the finalists' second count."""
    settings = {"sigma": problem.sigma, "alpha": ALPHA, "at_n": N}
    budgets = rungs_of(len(images), SCHEDULE)
    past: list[FrozenTrial] = []
    incumbent: dict[int, Any] = {}
    calls, best = 0, -1.0
    for index in range(len(problem.grid)):
        parameters = drawn(problem, seed, index, past)
        values, votes = {}, {}
        for epoch in range(1, EPOCHS + 1):
            rung = rung_at(budgets, epoch, EPOCHS)
            votes[epoch] = counted(rng, problem.p(parameters, epoch)[images], rung)
            calls += int(votes[epoch][1].sum())
            values[epoch] = estimated(problem, votes[epoch])
            behind = epoch < EPOCHS and bool(incumbent)
            if behind and not may_still_win(votes[epoch], incumbent[epoch], comparisons=EPOCHS - 1, **settings):
                break
        whole = len(values) == EPOCHS
        past.append(told(problem, parameters, values[max(values)], values, whole))
        if whole and values[EPOCHS] > best:
            best, incumbent = values[EPOCHS], votes
    complete = [trial for trial in past if trial.state == TrialState.COMPLETE]
    scores = []
    finalists = sorted(complete, key=lambda trial: -trial.values[0])[:FINALISTS]
    for trial in finalists:
        again = counted(rng, problem.p(trial.params, EPOCHS)[images], budgets[-1])
        calls += int(again[1].sum())
        scores.append(estimated(problem, again))
    return Found(finalists[int(np.argmax(scores))].params, calls)


def drawn(problem: Problem, seed: int, index: int, past: list[FrozenTrial]) -> Parameters:
    """The next trial's parameters, by the program's own sampler."""
    return draw(problem.study.model_copy(update={"seed": seed}), index, past, [])


def told(problem: Problem, parameters: Parameters, score: float, values: dict[int, float], whole: bool) -> FrozenTrial:
    described = distributions(problem.study.space, parameters)
    state = TrialState.COMPLETE if whole else TrialState.PRUNED
    return create_trial(
        state=state, params=parameters, distributions=described, value=score if whole else None,
        intermediate_values=values,
    )  # fmt: skip


def counted(rng: np.random.Generator, p: Floats, rung: Rung) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Votes (k, n) of the rung's images."""
    k = np.zeros(rung.images, np.int64)
    n = np.zeros_like(k)
    for _ in rung.schedule:
        following = next_samples(k, n, rung.schedule)
        k, n = k + rng.binomial(following - n, p[: rung.images]), following
    return k, n


def estimated(problem: Problem, votes: tuple[NDArray[np.int64], NDArray[np.int64]]) -> float:
    return float(acr_at(*npmle(*votes), N, ALPHA, problem.sigma))


def contribution(problem: Problem, parameters: Parameters) -> Floats:
    """Expected certified radius (N,) of every image of the population at N samples; ``p`` is on GRID's scale."""
    at = special.ndtri(problem.p(parameters, EPOCHS))
    known = special.ndtri(GRID)
    return problem.sigma * np.interp(at, known, mean_radius(GRID, N, ALPHA))


def study_of(space: dict[str, Any], seed: int = 0) -> Study:
    """The digits study with another space, one metric and no constraint."""
    content = load_study(DIGITS).model_dump(mode="json")
    content |= {"space": space, "seed": seed, "objective": {"maximise": "acr"}}
    return Study.model_validate_json(json.dumps(content))


def surface(images: int, trade: bool, population: int = 10_000) -> Problem:
    """Images as hard as in the published logs; what is good for one image is not for another; quality grows by epoch.

    Best at lambda 2.5, epsilon 0.2, alike for easy and hard images; with ``trade`` a larger lambda buys radius on easy
    images with the hard ones, as it does in FT-CADIS, and a measure that does not see large radii prefers a smaller.
    """
    rng = np.random.default_rng(0)
    hardness = rng.normal(1.0, 1.2, population)
    own = rng.normal(0, 0.15, (2, population))

    def p(parameters: Parameters, epoch: int) -> Floats:
        x, y = np.log(parameters[LAMBDA] / 2.5), np.log(parameters[EPSILON] / 0.2)
        learnt = 1 - np.exp(-epoch / 1.5)
        moved = own[0] * x + own[1] * y + 0.5 - 0.10 * y**2
        if trade:
            x = np.log(parameters[LAMBDA])
            moved = moved + 0.2 * x * hardness - 0.15 * x - 0.08 * x**2
        else:
            moved = moved - 0.12 * x**2 + 0.06 * x * y
        return np.clip(special.ndtr(hardness + learnt * moved), 1e-9, 1 - 1e-9)

    axes = {LAMBDA: (0.5, 1, 2, 4, 8), EPSILON: (0.0625, 0.125, 0.25, 0.5)}
    levels = study_of({path: {"choices": list(values)} for path, values in axes.items()})
    space = {path: {"low": min(values), "high": max(values), "log": True} for path, values in axes.items()}
    return Problem("trade" if trade else "shift", 0.5, population, images, grid(levels.space), study_of(space), p)


def digits(folder: Path) -> Problem:
    """The fine-tunings of ``benchmarks/digits_table.py``."""
    files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    population = files[0]["k"].shape[1]
    quantile = np.random.default_rng(0).uniform(size=population)
    table = {
        (float(file["weight"]), float(file["radius"])): posterior(file["k"], file["n"], quantile) for file in files
    }

    def p(parameters: Parameters, epoch: int) -> Floats:
        return table[parameters[LAMBDA], parameters[EPSILON]][epoch - 1]

    axes = {LAMBDA: sorted({weight for weight, _ in table}), EPSILON: sorted({radius for _, radius in table})}
    study = study_of({path: {"choices": values} for path, values in axes.items()})
    return Problem("digits", study.base.sigma, population, population // 2, grid(study.space), study, p)


def posterior(k: NDArray[np.int64], n: NDArray[np.int64], quantile: Floats) -> Floats:
    """p_A (epochs, N) at each image's ``quantile`` (N,) of its posterior, the prior being all images' likeliest one."""
    found = []
    for right, samples in zip(k, n, strict=True):
        p, weights = npmle(right, np.full_like(right, samples))
        log = np.log(weights + 1e-300) + right[:, None] * np.log(p) + (samples - right[:, None]) * np.log1p(-p)
        mass = np.exp(log - log.max(axis=1, keepdims=True))
        share = np.cumsum(mass, axis=1) / mass.sum(axis=1, keepdims=True)
        found.append(p[(share < quantile[:, None]).sum(axis=1).clip(max=len(p) - 1)])
    return np.array(found)


if __name__ == "__main__":
    main()
