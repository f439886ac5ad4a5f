"""Which search protocol ranks models rightly, and at what cost? Simulated on published certification logs.

    python benchmarks/ranking.py LOG.tsv... --sigma 0.5 [--repetitions 300] [--seed 0] [--images 1600]

Each log is one model; images are those that all logs have. An image's p_A is taken to be the share of votes that its
radius tells; where the prediction was wrong or an abstention, p_A is the most that the log allows, near 1/2 being the
hardest for few samples. Votes are binomial draws, independent between models. Images are drawn with replacement, so
that logs stand for a population however few their rows, and are the same for all models and protocols.

Protocols: official (1,000 images x n), naive (the mean certified radius at a small n), and ours: samples added by
``next_samples``, then ACR at n by the likeliest distribution of p_A. 1,600 images keep ours below 1/200 of the
official calls even where a third of the images is saturated. Prints a JSON line each: calls_per_model (on average),
kendall_tau with the ranking by ACR at n on all images of the logs, and of one model's ACR over repetitions the standard
deviation (sd) and the error of the mean (bias), averaged over models; bias_spread is the largest bias less the
smallest, which is what misranks, se_of_tau the simulation's own error. With one log there is no ranking: null.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadis_ray.certification.logs import ROUNDING, Log, inferred_counts, read_log
from cadis_ray.errors import CadisError, UsageError
from cadis_ray.smoothing.bounds import certified_radius, max_radius
from cadis_ray.smoothing.estimate import SCHEDULE, acr_at, mean_radius, next_samples, npmle

ALPHAS = (0.001, 0.01)  # of published logs: Cohen et al.'s own end at the largest radius of the second
BATCH = 50  # repetitions at a time, for memory
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Protocol:
    """How a model is measured: ``images`` drawn, samples by ``schedule``, ACR by estimate or by its own radii."""

    name: str
    images: int
    schedule: tuple[int, ...]
    estimated: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG.tsv")
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--n", type=int, default=100_000, help="samples an image that the logs were made with")
    parser.add_argument("--alpha", type=float, help="0.001, or 0.01 if a radius is too large for that")
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=1_600, help="of our protocol")
    arguments = parser.parse_args()
    if arguments.repetitions < 2 or arguments.images < 1 or arguments.seed < 0:
        parser.error("need --repetitions >= 2, --images >= 1 and --seed >= 0")
    try:
        logs = [read_log(path) for path in arguments.logs]
        alpha = arguments.alpha or alpha_of(logs, arguments.sigma, arguments.n)
        p = label_probabilities(logs, arguments.sigma, arguments.n, alpha)
    except CadisError as error:
        parser.exit(error.exit_code, f"{error}\n")
    settings = {"alpha": alpha, **{name: getattr(arguments, name) for name in ("sigma", "n", "repetitions", "seed")}}
    for line in compare(p, images=arguments.images, **settings):
        print(json.dumps(line), flush=True)


def alpha_of(logs: list[Log], sigma: float, n: int) -> float:
    """The first of ALPHAS that can give the largest radius."""
    largest = max(log.radius.max() for log in logs) / (1 + ROUNDING)
    return next((alpha for alpha in ALPHAS if max_radius(n, alpha, sigma) >= largest), ALPHAS[0])


def label_probabilities(logs: list[Log], sigma: float, n: int, alpha: float) -> Floats:
    """p_A (M, N) of M logs' models on the N images that all logs have."""
    common = reduce(np.intersect1d, (log.idx for log in logs))
    if not len(common):
        raise UsageError(f"no image is in all of the {len(logs)} logs; give logs of the same images")
    table = []
    for log in logs:
        share = inferred_counts(log, sigma, n, alpha) / n
        p = np.where((log.predict != log.label) & (log.predict >= 0), 1 - share, share)
        order = np.argsort(log.idx)
        table.append(p[order][np.isin(log.idx[order], common)])
    return np.clip(table, 1e-12, 1 - 1e-12)


def compare(
    p: Floats, *, sigma: float, n: int, alpha: float, repetitions: int, seed: int, images: int
) -> Iterator[dict[str, Any]]:
    """Every protocol's line, for models with label probabilities ``p`` (M, N)."""
    protocols = [
        Protocol("official", 1_000, (n,)),
        Protocol("naive", 1_000, (100,)),
        Protocol("naive", 10_000, (100,)),
        Protocol("naive", 1_000, (1_000,)),
        Protocol("estimate", 1_000, (100,), estimated=True),
        Protocol("ours", images, SCHEDULE, estimated=True),
    ]
    truth = expected_acr(p, n, alpha, sigma)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(p.shape[1], size=(repetitions, max(protocol.images for protocol in protocols)))
    for protocol in protocols:
        found, calls = [], []
        for start in range(0, repetitions, BATCH):
            images_of = drawn[start : start + BATCH, : protocol.images]
            votes = [count(rng, p_model[images_of], protocol.schedule) for p_model in p]
            calls.append([samples.sum(axis=1) for _, samples in votes])
            found.append([score(protocol, k, samples, n, alpha, sigma) for k, samples in votes])
        scores = np.concatenate(found, axis=1).T
        tau = kendall_tau(scores, truth)
        bias = scores.mean(axis=0) - truth
        yield {
            "protocol": protocol.name,
            "sigma": sigma,
            "n": n,
            "alpha": alpha,
            "images": protocol.images,
            "samples": list(protocol.schedule),
            "calls_per_model": round(float(np.concatenate(calls, axis=1).mean())),
            "kendall_tau": rounded(tau.mean()),
            "se_of_tau": rounded(tau.std(ddof=1) / np.sqrt(repetitions)),
            "sd": rounded(scores.std(axis=0, ddof=1).mean()),
            "bias": rounded(bias.mean()),
            "bias_spread": rounded(np.ptp(bias)),
            "models": len(p),
            "images_in_logs": p.shape[1],
        }


def count(rng: np.random.Generator, p: Floats, schedule: tuple[int, ...]) -> tuple[Integers, Integers]:
    """Votes for the label, (k, n) each of p's shape, by the schedule."""
    k = np.zeros(p.shape, np.int64)
    n = np.zeros_like(k)
    for _ in schedule:
        following = next_samples(k, n, schedule)
        k, n = k + rng.binomial(following - n, p), following
    return k, n


def score(protocol: Protocol, k: Integers, samples: Integers, n: int, alpha: float, sigma: float) -> Floats:
    """ACR (R,) of k (R, images) of ``samples`` votes: at n if estimated, else as the radii at these samples are."""
    if protocol.estimated:
        return acr_at(*npmle(k, samples), n, alpha, sigma)
    of = protocol.schedule[-1]
    return certified_radius(np.arange(of + 1), of, alpha, sigma)[k].mean(axis=1)


def expected_acr(p: Floats, n: int, alpha: float, sigma: float) -> Floats:
    """ACR (M,) on average over certifications of all images with n samples."""
    distinct, of = np.unique(p, return_inverse=True)
    return sigma * mean_radius(distinct, n, alpha)[of].reshape(p.shape).mean(axis=1)


def kendall_tau(scores: Floats, truth: Floats) -> Floats:
    """Kendall's tau-a (R,) of scores (R, M) with truth (M,): concordant less discordant over all pairs of models."""
    first, second = np.triu_indices(len(truth), 1)
    if not len(first):
        return np.full(len(scores), np.nan)
    return (np.sign(scores[:, first] - scores[:, second]) * np.sign(truth[first] - truth[second])).mean(axis=1)


def rounded(value: float) -> float | None:
    """To 5 digits after the point; None, in JSON null, for what one model has not."""
    return None if np.isnan(value) else round(float(value), 5)


if __name__ == "__main__":
    main()
