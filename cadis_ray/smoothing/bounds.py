"""Certificates as functions of counts: Cohen, Rosenfeld and Kolter, "Certified adversarial robustness via
randomized smoothing", ICML 2019 (their CERTIFY and PREDICT), in float64.

A bound holds if k of n independent samples, n fixed beforehand, are votes for a class chosen without looking
at them: stopping early, reusing the selection's samples, counting one twice or dropping one voids it.
"""

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

ABSTAIN = -1
MAX_SAMPLES = 2**53  # beyond it float64 cannot tell one n from the next
ROUNDING = 1e-9  # of radii and probabilities, between two processors; one vote moves them by far more
DIGITS = 40  # of a ceiling, before it is rounded to the 16 of float64

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """Lower bound of p from k successes of n, wrong with probability at most alpha (Clopper, Pearson 1934).

    The alpha-quantile of Beta(k, n - k + 1); 0 where k = 0. ``k`` and ``n`` broadcast. Raises ValueError
    outside 0 <= k <= n, n >= 1, 0 < alpha < 1.
    """
    check_level(alpha)
    k, n = checked_trials(k, n)
    ceiling = _ceiling(n, alpha)  # the bound at k = n, which no rounding in the quantile's routine may exceed
    quantile = np.minimum(special.betaincinv(np.maximum(k, 1), n - k + 1, alpha), ceiling)
    return np.where(k == 0, 0.0, np.where(k == n, ceiling, quantile))[()]


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """Upper bound of p from k successes of n, wrong with probability at most alpha; 1 where k = n."""
    k, n = checked_trials(k, n)
    return 1 - clopper_pearson_lower(n - k, n, alpha)


def certified_radius(k: ArrayLike, n: ArrayLike, alpha: float, sigma: float) -> Floats:
    """l2 radius of a class with k of n votes, in the units of sigma: sigma * Phi^-1(p_a_lower).

    0.0 where p_a_lower <= 1/2. With probability at least 1 - alpha the smoothed classifier is constant
    strictly within it (Cohen's theorem 1).
    """
    return radius_of(clopper_pearson_lower(k, n, alpha), sigma)


def radius_of(p_a_lower: ArrayLike, sigma: float) -> Floats:
    """sigma * Phi^-1(p_a_lower), and 0.0 where p_a_lower <= 1/2."""
    return _checked_sigma(sigma) * special.ndtri(np.maximum(p_a_lower, 0.5))


def max_radius(n: ArrayLike, alpha: float, sigma: float) -> Floats:
    """The radius if all n votes agree, sigma * Phi^-1(alpha ** (1 / n)) or 0.0: no certificate exceeds it."""
    return certified_radius(n, n, alpha, sigma)


def samples_needed(radius: float, sigma: float, alpha: float) -> int:
    """The smallest n whose ``max_radius`` is strictly above ``radius`` (>= 0).

    Raises ValueError where no n is enough in float64, from about 8 sigma.
    """
    if not radius >= 0:
        raise ValueError(f"radius >= 0 must hold, but got radius={radius}")
    if not max_radius(MAX_SAMPLES, alpha, sigma) > radius:
        raise ValueError(f"no number of samples certifies radius={radius} at sigma={sigma}, alpha={alpha}")
    below, enough = 0, MAX_SAMPLES
    while enough - below > 1:
        n = (below + enough) // 2
        below, enough = (below, n) if max_radius(n, alpha, sigma) > radius else (n, enough)
    return enough


def votes_needed(radius: ArrayLike, n: int, alpha: float, sigma: float) -> Integers:
    """The fewest of n votes that certify each radius >= 0, or any radius at 0; n + 1 where all n do not."""
    radius = np.asarray(radius, np.float64)
    if not (radius >= 0).all():
        raise ValueError(f"radius >= 0 must hold, but got radius={radius}")
    short, enough = np.zeros(radius.shape, np.int64), np.full(radius.shape, n + 1)
    while (enough - short > 1).any():
        k = (short + enough) // 2
        certified = certified_radius(k, n, alpha, sigma)
        certified = (certified >= radius) & (certified > 0)
        short, enough = np.where(certified, short, k), np.where(certified, k, enough)
    return enough[()]


def linf_radius(radius: ArrayLike, dimensions: int) -> Floats:
    """The l_inf radius that follows from an l2 ``radius``: over sqrt(d), d the numbers an image consists of."""
    return np.asarray(radius, np.float64)[()] / np.sqrt(dimensions)


def certify(
    selection_counts: ArrayLike, estimation_counts: ArrayLike, alpha: float, sigma: float
) -> tuple[Integers, Floats, Floats]:
    """CERTIFY of N images: (predict, radius, p_a_lower), each (N,).

    Both counts are (N, K + 1), the last column being votes for no class. The selection's samples choose the
    class; the estimation's, which must be others, bound its probability. n is the whole row, so that a vote
    for no class counts against. Where p_a_lower <= 1/2, ``predict`` is ABSTAIN and ``radius`` 0.0. Each
    certificate fails with probability at most alpha.
    """
    selection, estimation = checked_counts(selection_counts), checked_counts(estimation_counts)
    if selection.shape != estimation.shape:
        raise ValueError(f"counts must agree in shape, but got {selection.shape} and {estimation.shape}")
    top_class = selection[:, :-1].argmax(axis=1)
    k = np.take_along_axis(estimation, top_class[:, None], axis=1)[:, 0]
    p_a_lower = clopper_pearson_lower(k, estimation.sum(axis=1), alpha)
    radius = radius_of(p_a_lower, sigma)
    return np.where(p_a_lower > 0.5, top_class, ABSTAIN), radius, p_a_lower


def predict(counts: ArrayLike, alpha: float) -> Integers:
    """PREDICT of N images from counts (N, K + 1): the top class, or ABSTAIN where it may not be the top one.

    Two-sided binomial test of the two largest counts at level alpha: another class than the smoothed
    classifier's is returned with probability at most alpha. "No class" competes as one of the outcomes, and
    its win is an abstention.
    """
    table = checked_counts(counts)
    check_level(alpha)
    order = table.argsort(axis=1)
    runner_up, first = np.take_along_axis(table, order[:, -2:], axis=1).T
    p_value = 2 * special.betainc(first, runner_up + 1.0, 0.5)  # 2 P(Bin(first + runner_up, 1/2) >= first)
    top = order[:, -1]
    return np.where((p_value <= alpha) & (top < table.shape[1] - 1), top, ABSTAIN)


def same_numbers(found: Any, expected: ArrayLike) -> bool:
    """Whether radii or probabilities are those that another machine's floating point would give for the same votes."""
    found = np.asarray(found)
    return found.dtype.kind == "f" and found.shape == np.shape(expected) and np.allclose(found, expected, 0, ROUNDING)


def check_level(alpha: float) -> None:
    """ValueError unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"0 < alpha < 1 must hold, but got alpha={alpha}")


def checked_trials(k: ArrayLike, n: ArrayLike, least: int = 1) -> tuple[Integers, Integers]:
    """k and n as int64 of one shape; ValueError unless 0 <= k <= n and n >= ``least``."""
    k, n = np.broadcast_arrays(_integers("k", k), _integers("n", n))
    wrong = (n < least) | (k < 0) | (k > n)
    if wrong.any():
        raise ValueError(f"0 <= k <= n and n >= {least} must hold, but got k={k[wrong][0]}, n={n[wrong][0]}")
    return k, n


def checked_counts(counts: ArrayLike) -> Integers:
    """Counts (N, K + 1) as int64; ValueError for a negative one or an image without votes."""
    table = _integers("counts", counts)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"counts must be (N, K + 1) with K >= 1, but got {table.shape}")
    wrong = (table < 0).any(axis=1) | (table.sum(axis=1) < 1)
    if wrong.any():
        raise ValueError(
            f"counts must be >= 0 and not all 0, but row {int(wrong.argmax())} is {table[wrong][0].tolist()}"
        )
    return table


def _ceiling(n: Integers, alpha: float) -> Floats:
    """alpha ** (1 / n), rounded down.

    NumPy's power differs in the last bit between a scalar and an array, and between processors; decimal does not.
    """
    each, where = np.unique(n, return_inverse=True)
    return np.array([_root(alpha, int(one)) for one in each])[where].reshape(n.shape)


@lru_cache(maxsize=1 << 16)
def _root(alpha: float, n: int) -> float:
    with localcontext(prec=DIGITS):
        exact = (Decimal(alpha).ln() / n).exp()
    near = float(exact)
    return near if Decimal(near) <= exact else math.nextafter(near, 0.0)


def _checked_sigma(sigma: float) -> float:
    if not 0 < sigma < np.inf:
        raise ValueError(f"sigma > 0 must hold, but got sigma={sigma}")
    return sigma


def _integers(name: str, values: ArrayLike) -> Integers:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, but got {array.dtype}")
    return array.astype(np.int64)
