"""How many samples does sequential certification save, and what does it lose? Simulated on published logs.

    python benchmarks/sequential.py [LOG.tsv ...] [--sigma 0.5] [--n 100000] [--n0 100] [--alpha 0.001] [--beta 0.01]

The logs' radii tell p_A of every image (``inferred_counts``). Where the log's program abstained, p_A is unknown: it is
spread evenly over 0.4 to what just abstains, which keeps the density of p_A about what it is above 1/2. Votes are
binomial, an image is looked at after 64 samples and then after half as many again, at most 512, and both ways to
certify see the same votes, so that their difference is not noise. Every image pays for its selection, n0 samples, too.

Prints a JSON line per log and table of radii: mean samples an image, the factor against n0 + n, and by radius the
points of certified accuracy lost against CERTIFY with n samples at the same alpha. Then the worst of each table.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cadis_ray.certification.logs import Log, inferred_counts, read_log
from cadis_ray.smoothing.bounds import ABSTAIN, votes_needed
from cadis_ray.smoothing.sequential import BETA, decide, next_look

LOGS = Path(__file__).parents[2] / "shared" / "reference" / "certification_logs"
TABLES = {"whole table": np.arange(7) * 0.25, "one radius": np.array([0.5])}
LOWEST = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, default=sorted(LOGS.glob("*_sigma_0.50.tsv")), metavar="LOG.tsv")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--n0", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--beta", type=float, default=BETA)
    arguments = parser.parse_args()
    if not arguments.logs:
        parser.error(f"no logs in {LOGS}; name some")
    n, sigma, alpha = arguments.n, arguments.sigma, arguments.alpha
    logs = [read_log(path) for path in arguments.logs]
    for table, radii in TABLES.items():
        certifies, hopes, looks = thresholds(radii, sigma, alpha, arguments.beta, n)
        needed = votes_needed(radii, n, alpha, sigma)
        lines = []
        for log in logs:
            rng = np.random.default_rng(0)
            p = vote_shares(log, sigma, n, alpha, rng)
            samples, certified, votes = simulated(p, certifies, hopes, looks, rng)
            lost = ((votes[:, None] >= needed).astype(int) - certified)[log.correct].sum(axis=0) / len(p)
            mean = arguments.n0 + float(samples.mean())
            points = dict(zip(radii.tolist(), (100 * lost).round(3).tolist(), strict=True))
            lines.append({"table": table, "log": log.path.stem, "images": len(p), "mean_samples": round(mean, 1),
                          "factor": round((arguments.n0 + n) / mean, 2), "points_lost": points})  # fmt: skip
            print(json.dumps(lines[-1]), flush=True)
        summary = {"table": table, "logs": len(logs), "sigma": sigma, "n": n, "alpha": alpha, "beta": arguments.beta,
                   "smallest_factor": min(line["factor"] for line in lines),
                   "most_points_lost": max(max(line["points_lost"].values()) for line in lines)}  # fmt: skip
        print(json.dumps(summary), flush=True)


def vote_shares(log: Log, sigma: float, n: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """p_A (N,) of the class that was or, where the log abstains, would be selected."""
    p = inferred_counts(log, sigma, n, alpha) / n
    return np.where(log.predict == ABSTAIN, rng.uniform(LOWEST, p), p)


def thresholds(
    radii: NDArray[np.float64], sigma: float, alpha: float, beta: float, n: int
) -> tuple[NDArray[np.int64], ...]:
    """(certifies, hopes, looks): the looks (T,) and at each the fewest votes with which ``decide`` certifies a radius,
    and does not give it up, (T, R). Found by bisection: more votes never speak against a radius."""
    looks = np.array([next_look(0, n)])
    while looks[-1] < n:
        looks = np.append(looks, next_look(looks[-1], n))

    def fewest(is_enough, radius: float) -> NDArray[np.int64]:
        short, enough = np.full(len(looks), -1), looks + 1
        while (enough - short > 1).any():
            k = np.clip((short + enough) // 2, 0, looks)
            yes = is_enough(decide(k, looks, [radius], sigma=sigma, alpha=alpha, beta=beta, cap=n))[:, 0]
            more = enough - short > 1
            short, enough = np.where(more & ~yes, k, short), np.where(more & yes, k, enough)
        return enough

    certifies = [fewest(lambda decision: decision.certified, radius) for radius in radii]
    hopes = [fewest(lambda decision: ~decision.given_up, radius) for radius in radii]
    return np.stack(certifies, axis=1), np.stack(hopes, axis=1), looks


def simulated(
    p: NDArray[np.float64],
    certifies: NDArray[np.int64],
    hopes: NDArray[np.int64],
    looks: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """(samples (N,), certified (N, R), votes (N,) that the last look would see had nothing been settled before)."""
    votes, samples = np.zeros(len(p), np.int64), np.full(len(p), looks[-1])
    certified = np.zeros((len(p), certifies.shape[1]), np.bool_)
    for n, size, enough, hope in zip(looks, np.diff(looks, prepend=0), certifies, hopes, strict=True):
        votes += rng.binomial(size, p)
        k = votes[:, None]
        settled = (samples == looks[-1]) & ((k >= enough) | (k < hope)).all(axis=1)
        samples[settled] = n
        certified[settled] = (k >= enough)[settled]
    return samples, certified, votes


if __name__ == "__main__":
    main()
