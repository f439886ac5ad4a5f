"""Should a trial go on? Only while its ACR could still be the incumbent's or more, judged on the same images.

Most trials are told apart from the incumbent with few images, so the budget grows by rung, and a trial that is
behind beyond its paired error stops before it costs much. An estimate decides: nothing here is a certificate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from cadis_ray.smoothing.estimate import SCHEDULE, Votes, contributions
from cadis_ray.smoothing.metrics import paired_difference


@dataclass(frozen=True)
class Rung:
    """A counting budget: the first ``images`` validation images, samples by ``schedule`` (see ``next_samples``)."""

    images: int
    schedule: tuple[int, ...]


def rungs(images: int, schedule: Sequence[int] = SCHEDULE, count: int = 3, factor: int = 4) -> tuple[Rung, ...]:
    """``count`` budgets, the last of which is all ``images`` with the whole schedule.

    Each has 1/``factor`` of the next one's images; the first of several lacks the schedule's last step. A rung's
    images and samples are the first of the next one's, so that votes add up; the images must stand in random order.
    """
    if not (images >= 2 and len(schedule) >= 1 and count >= 1 and factor >= 2):
        raise ValueError("images >= 2, one step of a schedule, count >= 1 and factor >= 2 must hold, but got"
                         f" images={images}, schedule={schedule}, count={count}, factor={factor}")  # fmt: skip
    steps = tuple(schedule)
    first = steps[:-1] if count > 1 and len(steps) > 1 else steps
    return tuple(
        Rung(max(2, -(-images // factor ** (count - 1 - i))), first if i == 0 else steps) for i in range(count)
    )


def rungs_of(images: int, schedule: Sequence[int]) -> tuple[Rung, ...]:
    """At most three budgets that end with all ``images``, the first of which has 100 or more, or is the only one."""
    return rungs(images, schedule, count=1 + sum(images >= 100 * 4**power for power in (1, 2)))


def rung_at(budgets: Sequence[Rung], epoch: int, last: int) -> Rung:
    """The budget after ``epoch`` of 1 .. ``last``: the last one only after the last epoch."""
    return budgets[-1] if epoch >= last else budgets[(epoch - 1) * len(budgets) // last]


def upper_bound(candidate: Votes, incumbent: Votes, *, sigma: float, alpha: float, at_n: int, error: float) -> float:
    """Upper confidence bound, missed with probability ``error``, of the candidate's ACR less the incumbent's.

    Both are (k (N,), n (N,)) on the same images in one order, counted by one schedule: the estimate's bias depends
    on it. Student's t bound of the paired contributions, in the units of sigma; good from about 100 images.
    """
    if not 0 < error < 0.5:
        raise ValueError(f"0 < error < 0.5 must hold, but got error={error}")
    a, b = (contributions(*votes, sigma=sigma, alpha=alpha, at_n=at_n) for votes in (candidate, incumbent))
    difference = paired_difference(a, b)
    return difference.mean - float(special.stdtrit(len(a) - 1, error)) * difference.se


def may_still_win(
    candidate: Votes,
    incumbent: Votes,
    *,
    sigma: float,
    alpha: float,
    at_n: int,
    comparisons: int,
    error: float = 0.05,
) -> bool:
    """Whether the candidate's ACR could be the incumbent's or more, from the counts of both at the same rung.

    False for a trial as good as its incumbents with a chance of about ``error`` at most in all its life, if it is
    compared at most ``comparisons`` times (Bonferroni). The number of rungs is enough for incumbents chosen on other
    images; chosen on these, rungs * (trials - 1) covers all that it could meet. Simulated with the number of rungs
    and incumbents chosen on these images, the best was stopped in at most 5% of searches at error 0.05.

    It speaks of the models as they are: where training goes on, compare with the incumbent at the same epoch, and
    expect to stop trials that would have overtaken it.
    """
    if comparisons < 1:
        raise ValueError(f"comparisons >= 1 must hold, but got {comparisons}")
    bound = upper_bound(candidate, incumbent, sigma=sigma, alpha=alpha, at_n=at_n, error=error / comparisons)
    return bool(bound >= 0)
