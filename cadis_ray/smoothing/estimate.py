"""ACR and its companions from few samples on many images: an estimate that ranks models, never a certificate.

Certified radii of a small n are biased, differently for every model, so they misrank. Instead the
distribution of p_A over images is estimated by nonparametric maximum likelihood (Kiefer, Wolfowitz 1956) from
label-aware counts: image i had k_i of n_i votes for its own label. ACR at any n follows from it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from cadis_ray.results import Estimate
from cadis_ray.smoothing.bounds import certified_radius

ITERATIONS = 80  # of EM from equal weights: stopping early regularises
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# p_A: 60 points below 1/2, where nothing is certified; above, Phi(u), as the radius is linear in u.
GRID: Floats = np.concatenate([(np.arange(60) + 0.5) / 120, special.ndtr(np.arange(0, 5.01, 0.02))])


def npmle(k: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """The likeliest distribution of p_A, (p, weights) each (G,), given k (N,) of n (N,) votes for the label.

    EM on sum_i log sum_g w_g p_g^k_i (1 - p_g)^(n_i - k_i). n_i may depend on image i's own earlier votes.
    """
    likelihood, pairs = _likelihood(k, n)
    return GRID, _weights(likelihood, np.bincount(pairs)[None])[0]


def acr_at(p: Floats, weights: Floats, n: int, alpha: float, sigma: float) -> Floats:
    """ACR (...) expected of certification with n: sigma * sum_g w_g rho(p_g); weights are (..., G)."""
    return sigma * (weights @ mean_radius(p, n, alpha))


def certified_accuracy_at(p: Floats, weights: Floats, n: int, alpha: float, sigma: float, r: float) -> float:
    """Expected certified accuracy at radius r: sum_g w_g P(certified_radius(Bin(n, p_g)) >= r, and > 0)."""
    k = _votes_needed(r, n, alpha, sigma)
    return float(weights @ special.betainc(k, n - k + 1, p)) if k <= n else 0.0


def mean_radius(p: ArrayLike, n: int, alpha: float) -> Floats:
    """rho(p) = E certified_radius(Bin(n, p), n, alpha, sigma=1), a finite sum; p is (P,) within (0, 1)."""
    return _mean_radius(tuple(np.asarray(p, np.float64).tolist()), n, alpha)


@lru_cache(maxsize=16)  # a third of a second at n = 100,000, and the same for every estimate of a study
def _mean_radius(p: tuple[float, ...], n: int, alpha: float) -> Floats:
    least = _votes_needed(0.0, n, alpha, 1.0)
    k = np.arange(least, n + 1)
    radius = certified_radius(k, n, alpha, 1.0)
    log_choices = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    mean = np.zeros(len(p))
    for i, chance in enumerate(p):
        # Bernstein: less than 1e-15 of the mass lies outside.
        reach = 9 * np.sqrt(n * chance * (1 - chance)) + 30
        near = slice(max(0, int(n * chance - reach) - least), max(0, int(n * chance + reach) + 1 - least))
        log_mass = log_choices[near] + k[near] * np.log(chance) + (n - k[near]) * np.log1p(-chance)
        mean[i] = np.exp(log_mass) @ radius[near]
    mean.flags.writeable = False
    return mean


def _votes_needed(r: float, n: int, alpha: float, sigma: float) -> int:
    """The fewest of n votes that certify radius r, or anything at r = 0; n + 1 if all n do not."""
    short, enough = 0, n + 1
    while enough - short > 1:
        k = (short + enough) // 2
        radius = certified_radius(k, n, alpha, sigma)
        short, enough = (short, k) if radius > 0 and radius >= r else (k, enough)
    return enough


def resampled_acr(
    k: ArrayLike, n: ArrayLike, *, sigma: float, alpha: float, at_n: int, resamples: int = 200, seed: int = 0
) -> Floats:
    """ACR estimates (resamples,) of bootstrap samples of the N images.

    Equal N, resamples and seed draw the same images for every model: the standard deviation of the difference
    of two results is a paired standard error.
    """
    likelihood, pairs = _likelihood(k, n)
    draws = np.random.default_rng(seed).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=resamples)
    one_hot = np.eye(len(likelihood))[pairs]
    return acr_at(GRID, _weights(likelihood, draws @ one_hot), at_n, alpha, sigma)


def estimate(
    k: ArrayLike,
    n: ArrayLike,
    *,
    sigma: float,
    alpha: float,
    at_n: int,
    radii: Sequence[float],
    resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """What certification with ``at_n`` samples at ``alpha`` would find; k (N,) of n (N,) votes had the label.

    ``sigma`` and ``radii`` are in [0, 1] pixels. No guarantee, however many samples it used.
    """
    p, weights = npmle(k, n)
    replicates = resampled_acr(k, n, sigma=sigma, alpha=alpha, at_n=at_n, resamples=resamples, seed=seed)
    return Estimate(
        acr=float(acr_at(p, weights, at_n, alpha, sigma)),
        se=float(replicates.std(ddof=1)),
        clean=float(weights[p > 0.5].sum()),
        certified_accuracy={r: certified_accuracy_at(p, weights, at_n, alpha, sigma, r) for r in radii},
        n=at_n,
        images=len(np.atleast_1d(k)),
        samples=round(float(np.mean(np.asarray(n)))),
    )


def _likelihood(k: ArrayLike, n: ArrayLike) -> tuple[Floats, Integers]:
    """Likelihood (U, G) of each distinct (k, n), up to a factor, and which of them each image has (N,)."""
    k, n = np.broadcast_arrays(np.asarray(k), np.asarray(n))
    if k.ndim != 1 or not len(k) or not (np.issubdtype(k.dtype, np.integer) and np.issubdtype(n.dtype, np.integer)):
        raise ValueError(f"k and n must hold integers and be (N,) with N >= 1, but got {k.dtype} {k.shape}, {n.dtype}")
    if not ((n >= 1) & (k >= 0) & (k <= n)).all():
        raise ValueError("0 <= k <= n and n >= 1 must hold for every image")
    distinct, pairs = np.unique(np.stack([k, n], axis=1), axis=0, return_inverse=True)
    successes, failures = distinct[:, :1], distinct[:, 1:] - distinct[:, :1]
    log_likelihood = successes * np.log(GRID) + failures * np.log1p(-GRID)
    return np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True)), pairs


def _weights(likelihood: Floats, images: NDArray[np.number]) -> Floats:
    """EM for R data sets at once: ``images`` (R, U) counts each one's images by pair. Returns (R, G)."""
    share = images / images.sum(axis=1, keepdims=True)
    weights = np.full((len(share), likelihood.shape[1]), 1 / likelihood.shape[1])
    for _ in range(ITERATIONS):
        # A pair that a resample left out may have become impossible, 0 / 0: it has no say.
        ratio = np.divide(share, weights @ likelihood.T, out=np.zeros_like(share), where=share > 0)
        weights *= ratio @ likelihood
    return weights
