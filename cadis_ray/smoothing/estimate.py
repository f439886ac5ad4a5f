"""ACR and its companions from few samples on many images: an estimate that ranks models, never a certificate.

Certified radii of a small n are biased, differently for every model, so they misrank. Instead the
distribution of p_A over images is estimated by nonparametric maximum likelihood (Kiefer, Wolfowitz 1956) from
label-aware counts: image i had k_i of n_i votes for its own label. ACR at any n follows from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from cadis_ray.smoothing.bounds import certified_radius, votes_needed

ITERATIONS = 80  # of EM from equal weights: stopping early regularises
SCHEDULE = (32, 128, 512)
FAILURES = 2
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Votes = tuple[ArrayLike, ArrayLike]  # (k, n) of one model

# p_A: 60 points below 1/2, where nothing is certified; above, Phi(u), as the radius is linear in u.
GRID: Floats = np.concatenate([(np.arange(60) + 0.5) / 120, special.ndtr(np.arange(0, 5.01, 0.02))])


@dataclass(frozen=True)
class Estimate:
    """ACR and its companions estimated from few samples on validation images. Never a certificate.

    ``acr_at_n`` is the estimated ACR at certification's ``n`` and ``alpha``; ``se`` its bootstrap standard error
    over images; ``certified_accuracy`` maps radius to share; ``clean`` is the share of images with P(label) > 1/2.
    """

    acr: float
    se: float
    clean: float
    certified_accuracy: dict[float, float]
    n: int
    images: int
    samples: int


def next_samples(k: ArrayLike, n: ArrayLike, schedule: Sequence[int] = SCHEDULE, failures: int = FAILURES) -> Integers:
    """How many samples each image should have next (N,), its n where it is done, given k (N,) of n (N,) >= 0.

    The next larger number of the schedule while at most ``failures`` samples missed the label: only near
    p_A = 1 does the radius change much with more. An image goes on by its own counts alone, so that they keep
    the likelihood of ``npmle``.
    """
    steps = np.asarray(schedule)
    if not (steps.ndim == 1 and len(steps) and (np.diff(steps, prepend=0) > 0).all() and failures >= 0):
        raise ValueError(f"schedule must increase from >= 1, and failures >= 0, but got {schedule} and {failures}")
    k, n = _votes(k, n, least=0)
    following = np.searchsorted(steps, n, side="right")
    on = (following < len(steps)) & (n - k <= failures)
    return np.where(on, steps[np.minimum(following, len(steps) - 1)], n)


def npmle(k: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """The likeliest distribution of p_A, (p (G,), weights (..., G)), given k (..., N) of n (..., N) label votes.

    EM on sum_i log sum_g w_g p_g^k_i (1 - p_g)^(n_i - k_i) for each data set of the leading axes. n_i may
    depend on image i's own earlier votes, as in ``next_samples``.
    """
    likelihood, pairs = _likelihood(k, n)
    flat = pairs.reshape(-1, pairs.shape[-1])
    offsets = np.arange(len(flat))[:, None] * len(likelihood)
    images = np.bincount((flat + offsets).ravel(), minlength=len(flat) * len(likelihood))
    weights = _weights(likelihood, images.reshape(len(flat), -1) / flat.shape[1])
    return GRID, weights.reshape(*pairs.shape[:-1], -1)


def acr_at(p: Floats, weights: Floats, n: int, alpha: float, sigma: float) -> Floats:
    """ACR (...) expected of certification with n: sigma * sum_g w_g rho(p_g); weights are (..., G)."""
    return sigma * (weights @ mean_radius(p, n, alpha))


def certified_accuracy_at(p: Floats, weights: Floats, n: int, alpha: float, sigma: float, r: float) -> Floats:
    """Expected certified accuracy (...) at radius r: sum_g w_g P(certified_radius(Bin(n, p_g)) >= r, and > 0)."""
    k = votes_needed(r, n, alpha, sigma)
    return weights @ (special.betainc(k, n - k + 1, p) if k <= n else np.zeros_like(p))


def mean_radius(p: ArrayLike, n: int, alpha: float) -> Floats:
    """rho(p) = E certified_radius(Bin(n, p), n, alpha, sigma=1), a finite sum; p is (P,) within (0, 1)."""
    return _mean_radius(tuple(np.asarray(p, np.float64).tolist()), n, alpha)


@lru_cache(maxsize=16)  # a third of a second at n = 100,000, and the same for every estimate of a study
def _mean_radius(p: tuple[float, ...], n: int, alpha: float) -> Floats:
    least = int(votes_needed(0.0, n, alpha, 1.0))
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


def resampled_weights(k: ArrayLike, n: ArrayLike, *, resamples: int = 200, seed: int = 0) -> Floats:
    """Weights (resamples, G) on GRID from bootstrap samples of the N images.

    Equal N, resamples and seed draw the same images for every model. So the standard deviation of any function
    of the weights is its standard error, and that of its difference between two models a paired one.
    """
    k, n = _votes(k, n)
    draws = np.random.default_rng(seed).integers(len(k), size=(resamples, len(k)))
    return npmle(k[draws], n[draws])[1]


def resampled_acr(
    k: ArrayLike, n: ArrayLike, *, sigma: float, alpha: float, at_n: int, resamples: int = 200, seed: int = 0
) -> Floats:
    """ACR estimates (resamples,) of bootstrap samples of the N images, paired between models."""
    weights = resampled_weights(k, n, resamples=resamples, seed=seed)
    return acr_at(GRID, weights, at_n, alpha, sigma)


def contributions(k: ArrayLike, n: ArrayLike, *, sigma: float, alpha: float, at_n: int) -> Floats:
    """Each image's contribution (N,) to the ACR estimate: their mean is the estimate, its standard error theirs.

    The derivative of the estimate by the image's share in the sample, through every EM iteration: the
    infinitesimal jackknife (Jaeckel 1972). Two models' contributions on the same images are paired data,
    in a fraction of the bootstrap's time.
    """
    likelihood, pairs = _likelihood(k, n)
    share = np.bincount(pairs) / len(pairs)
    weights, steps = np.full(len(GRID), 1 / len(GRID)), []
    for _ in range(ITERATIONS):
        mixture = likelihood @ weights
        growth = (share / mixture) @ likelihood
        steps.append((weights, mixture, growth))
        weights = weights * growth
    # Backwards. EM is homogeneous of degree 1 in the shares, hence Euler: mean(by_share[pairs]) = ACR.
    by_weights, by_share = sigma * mean_radius(GRID, at_n, alpha), np.zeros(len(share))
    for weights, mixture, growth in reversed(steps):
        by_ratio = likelihood @ (by_weights * weights)
        by_share += by_ratio / mixture
        by_weights = by_weights * growth - (by_ratio * share / mixture**2) @ likelihood
    return by_share[pairs]


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
        certified_accuracy={r: float(certified_accuracy_at(p, weights, at_n, alpha, sigma, r)) for r in radii},
        n=at_n,
        images=len(np.atleast_1d(k)),
        samples=round(float(np.mean(np.asarray(n)))),
    )


def _votes(k: ArrayLike, n: ArrayLike, least: int = 1) -> tuple[Integers, Integers]:
    k, n = np.broadcast_arrays(np.asarray(k), np.asarray(n))
    if not k.size or not k.ndim or not all(np.issubdtype(votes.dtype, np.integer) for votes in (k, n)):
        raise ValueError(f"k and n must hold integers and be (..., N), N >= 1, but got {k.dtype} {k.shape}, {n.dtype}")
    if not ((n >= least) & (k >= 0) & (k <= n)).all():
        raise ValueError(f"0 <= k <= n and n >= {least} must hold for every image")
    return k.astype(np.int64), n.astype(np.int64)


def _likelihood(k: ArrayLike, n: ArrayLike) -> tuple[Floats, Integers]:
    """Likelihood (U, G) of each distinct (k, n), up to a factor, and which of them each image has (..., N)."""
    k, n = _votes(k, n)
    base = n.max() + 1
    distinct, pairs = np.unique(n * base + k, return_inverse=True)
    samples, successes = np.divmod(distinct[:, None], base)
    log_likelihood = successes * np.log(GRID) + (samples - successes) * np.log1p(-GRID)
    return np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True)), pairs.reshape(k.shape)


def _weights(likelihood: Floats, share: Floats) -> Floats:
    """EM for R data sets at once: ``share`` (R, U) of each one's images that have a pair. Returns (R, G)."""
    weights = np.full((len(share), likelihood.shape[1]), 1 / likelihood.shape[1])
    for _ in range(ITERATIONS):
        # A pair that a resample left out may have become impossible, 0 / 0: it has no say.
        ratio = np.divide(share, weights @ likelihood.T, out=np.zeros_like(share), where=share > 0)
        weights *= ratio @ likelihood
    return weights
