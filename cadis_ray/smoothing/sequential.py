"""Certificates that may stop at any time: tests by betting instead of one look at a fixed n.

Samples are votes for a class chosen without looking at them. For the null hypothesis p <= p0, a bet on p > p0 starts
with wealth 1 and multiplies it with every sample by q / p0 for a vote, (1 - q) / (1 - p0) for none, q > p0. On average
it cannot grow if p <= p0, so by Ville's inequality it ever reaches 1 / alpha with probability at most alpha: at any
time, after batches of any size, however the decision to go on was made. The bet here is the mixture over q of a Beta
distribution truncated to q > p0 (Robbins 1970; Howard et al. 2021), in closed form.

What voids it: an order of samples that depends on their votes, a sample counted twice or left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from cadis_ray.smoothing.bounds import (
    Floats,
    Integers,
    check_level,
    checked_trials,
    clopper_pearson_lower,
    votes_needed,
)

BISECTIONS = 60  # of [0, 1], down to float64's spacing
LARGEST = 1 - 2.0**-53  # below 1 in float64
STEP = (64, 512)  # samples between two looks: fewer cost more batches, more are samples for nothing
BETA = 0.01  # on published logs it loses no more than 1e-4 does, and takes a tenth fewer samples

Flags = NDArray[np.bool_]


def log_e_value(k: ArrayLike, n: ArrayLike, p0: ArrayLike, prior: float = 0.5) -> Floats:
    """Log of the wealth of the bet against p <= p0 after k votes in n samples; arguments broadcast.

    log of the mean over q ~ Beta(prior, prior), given q > p0, of (q / p0)^k ((1 - q) / (1 - p0))^(n - k). p0 is in
    [0, 1). The bet against p >= p0 is ``log_e_value(n - k, n, 1 - p0)``. Minus infinity where it underflows.
    """
    k, n = checked_trials(k, n, least=0)
    p0 = np.asarray(p0, np.float64)
    if not ((p0 >= 0) & (p0 < 1)).all():
        raise ValueError(f"0 <= p0 < 1 must hold, but got p0={p0}")
    votes, others = k + prior, n - k + prior
    with np.errstate(divide="ignore"):
        mixture = special.betaln(votes, others) + np.log(special.betaincc(votes, others, p0))
    truncated = special.betaln(prior, prior) + np.log(special.betaincc(prior, prior, p0))
    return mixture - truncated - special.xlogy(k, p0) - special.xlog1py(n - k, -p0)


def lower_sequence(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """Lower confidence bound of p, wrong at any time with probability at most alpha < 1/2; 0 where k = 0.

    The largest p0 that the bets reject, to rounding. They reject every smaller one too: the wealth falls in p0
    wherever k - n p0 > 1/2, and elsewhere it is below 2.
    """
    k, n = checked_trials(k, n, least=0)
    if not 0 < alpha < 0.5:
        raise ValueError(f"0 < alpha < 1/2 must hold, but got alpha={alpha}")
    low, high = np.zeros(k.shape), k / np.maximum(n, 1)
    for _ in range(BISECTIONS):
        middle = np.minimum((low + high) / 2, LARGEST)
        rejected = log_e_value(k, n, middle) >= -np.log(alpha)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return np.where(k == 0, 0.0, low)[()]


def capped_lower(k: ArrayLike, n: ArrayLike, alpha: float, cap: int) -> Floats:
    """p_a_lower of a sequential certificate, wrong with probability at most alpha < 1/2 whenever sampling stopped.

    Half of alpha is for the sequence, half for one Clopper-Pearson bound at n = ``cap``, a number fixed beforehand
    that no image exceeds; there the larger of both counts. It is that of the present k and n, not the largest of all
    looks, which would be as sound, so that a record of k and n suffices to check a certificate.
    """
    k, n = _capped(k, n, cap)
    sequence = lower_sequence(k, n, alpha / 2)
    fixed = np.where(n == cap, clopper_pearson_lower(k, np.maximum(n, 1), alpha / 2), 0.0)
    return np.maximum(sequence, fixed)


@dataclass(frozen=True)
class Decision:
    """What is known of N images and R radii: ``certified`` and ``given_up`` (N, R), ``settled`` (N,): nothing open."""

    certified: Flags
    given_up: Flags
    settled: Flags


def decide(
    k: ArrayLike, n: ArrayLike, radii: ArrayLike, *, sigma: float, alpha: float, cap: int, beta: float = BETA
) -> Decision:
    """Which of ``radii`` (R,) are settled for images with k (N,) votes for their class in n (N,) samples, n <= cap.

    ``certified``: p_A > Phi(radius / sigma), by ``capped_lower``. With probability at least 1 - alpha an image has
    no false certificate, at any radius and any look. ``given_up``: the certificate at the cap, which needs a share
    of votes s, would fail: p_A < s by a bet that is wrong with probability at most ``beta`` if p_A >= s, or too few
    samples are left. That costs certificates, never soundness. At the cap everything is settled.
    """
    k, n = _capped(k, n, cap)
    check_level(beta)
    radii = np.asarray(radii, np.float64)
    needed = votes_needed(radii, cap, alpha / 2, sigma)
    k, n = k[:, None], n[:, None]
    p0 = np.minimum(special.ndtr(radii / sigma), LARGEST)
    certified = (log_e_value(k, n, p0) >= np.log(2 / alpha)) | ((n == cap) & (k >= needed))
    hopeless = log_e_value(n - k, n, np.maximum(cap - needed, 0) / cap) >= -np.log(beta)
    given_up = ~certified & (hopeless | (k + cap - n < needed))
    return Decision(certified, given_up, (certified | given_up).all(axis=1))


def next_look(n: ArrayLike, cap: int) -> Integers:
    """Samples (N,) an open image should have before the next look: half as many again, by 64 to 512 more, up to cap."""
    n = np.asarray(n, np.int64)
    return np.minimum(n + np.clip(n // 2, *STEP), cap)


def _capped(k: ArrayLike, n: ArrayLike, cap: int) -> tuple[Integers, Integers]:
    k, n = checked_trials(k, n, least=0)
    if (n > cap).any():
        raise ValueError(f"n <= cap must hold, but got n={n.max()}, cap={cap}")
    return k, n
