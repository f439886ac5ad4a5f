"""A search among trials that are all equally good: what does it report, and what is true?

    python benchmarks/null_search.py LOG.tsv [--sigma 0.5] [--repetitions 200] [--trials 30] [--images 1000]

The log gives the p_A of a model; every trial has it, so that no configuration is better than another. Each repetition
draws validation and test images from the log, counts the trials by the search's samples, chooses three finalists by the
estimate of ACR at 100,000, counts these again, and certifies the winner on the test images with n = 100,000: by the
program's own functions, on simulated votes. Prints JSON: how far the winner's search score, its second count and its
certified ACR are above the truth on their own images, over repetitions (``any_trial``: the bias of an estimate without
selection; the truth does not hold the few images whose class the n0 samples miss); and the share of repetitions whose
certified ACR's 95% interval, over images, covers the ACR of all images.

With ``--shared`` all trials have the same votes, as with identical weights under the search's shared noise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from cadis_ray.certification.logs import inferred_counts, read_log
from cadis_ray.search.objective import best_trial, finalists
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.bounds import certify
from cadis_ray.smoothing.estimate import GRID, SCHEDULE, Estimate, acr_at, mean_radius, next_samples, npmle
from cadis_ray.smoothing.metrics import acr, paired_difference
from cadis_ray.study.sections import Objective

N0, N, ALPHA = 100, 100_000, 0.001
Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, metavar="LOG.tsv")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--shared", action="store_true", help="all trials have the same votes")
    arguments = parser.parse_args()
    log = read_log(arguments.log)
    share = inferred_counts(log, arguments.sigma, N, ALPHA) / N
    p = np.clip(np.where((log.predict != log.label) & (log.predict >= 0), 1 - share, share), 1e-9, 1 - 1e-9)
    settings = {"sigma": arguments.sigma, "trials": arguments.trials, "images": arguments.images}
    found = [
        repetition(np.random.default_rng(seed), p, shared=arguments.shared, **settings)
        for seed in range(arguments.repetitions)
    ]
    print(json.dumps(settings | {"repetitions": len(found), "shared": arguments.shared} | conclusions(found)))


def repetition(
    rng: np.random.Generator, p: Floats, *, sigma: float, trials: int, images: int, shared: bool = False
) -> dict[str, float]:
    """One search among equal trials: the winner's three figures less the truth on their images, and the interval."""
    validation, test = (p[rng.integers(len(p), size=images)] for _ in range(2))
    expected = float(expected_radius(validation, sigma).mean())
    counts = [counted(rng, validation)] * trials if shared else [counted(rng, validation) for _ in range(trials)]
    searched = [trial(number, *votes, sigma) for number, votes in enumerate(counts)]
    last = finalists(searched, Objective(), 3)
    again = [trial(one.number, *counted(rng, validation), sigma) for one in last]
    winner = best_trial(again)
    assert winner
    assert winner.estimate
    score = searched[winner.number].estimate
    assert score
    radius, correct = certified(rng, test, sigma)
    interval = paired_difference(radius * correct, np.zeros(images))
    truth = float(expected_radius(p, sigma).mean())
    return {
        "search": max(one.estimate.acr for one in searched if one.estimate) - expected,
        "winners_search": score.acr - expected,
        "recount": winner.estimate.acr - expected,
        "any_trial": float(np.mean([one.estimate.acr for one in searched if one.estimate])) - expected,
        "certified": acr(radius, correct) - float(expected_radius(test, sigma).mean()),
        "covered": float(interval.low <= truth <= interval.high),
    }


def conclusions(found: list[dict[str, float]]) -> dict[str, Any]:
    """Means over repetitions with their standard errors."""
    table = {name: np.array([one[name] for one in found]) for name in found[0]}
    means = {name: round(float(values.mean()), 5) for name, values in table.items()}
    errors = {f"se_of_{name}": round(float(v.std(ddof=1) / np.sqrt(len(v))), 5) for name, v in table.items()}
    return means | errors


def trial(number: int, k: NDArray[np.int64], n: NDArray[np.int64], sigma: float) -> TrialResult:
    """A complete trial with the search's estimate of its votes."""
    found = float(acr_at(*npmle(k, n), N, ALPHA, sigma))
    return TrialResult(
        number, f"trial-{number:04d}", False, "complete", None, {}, Estimate(found, 0.0, 1.0, {}, N, len(k), 0)
    )


def counted(rng: np.random.Generator, p: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Votes (k, n) by the search's samples."""
    k = np.zeros(len(p), np.int64)
    n = np.zeros_like(k)
    for _ in SCHEDULE:
        following = next_samples(k, n)
        k, n = k + rng.binomial(following - n, p), following
    return k, n


def certified(rng: np.random.Generator, p: Floats, sigma: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Radius and correctness (N,) by CERTIFY of images of class 0, all other votes being for class 1."""
    votes = [np.stack([k, n - k, np.zeros_like(k)], axis=1) for n in (N0, N) for k in [rng.binomial(n, p)]]
    predict, radius, _ = certify(votes[0], votes[1], ALPHA, sigma)
    return radius, predict == 0


def expected_radius(p: Floats, sigma: float) -> Floats:
    """E certified_radius (N,) at N samples for the label."""
    return sigma * np.interp(special.ndtri(p), special.ndtri(GRID), mean_radius(GRID, N, ALPHA))


if __name__ == "__main__":
    main()
