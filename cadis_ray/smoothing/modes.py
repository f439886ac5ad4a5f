"""What the ways to count on test images differ in: how many samples an image gets, and what follows from its votes.

All are functions of votes alone, so that counting can stop and go on anywhere, by any worker.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cadis_ray.smoothing.bounds import ABSTAIN, certify, radius_of
from cadis_ray.smoothing.estimate import SCHEDULE, next_samples
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.sequential import capped_lower, decide, next_look
from cadis_ray.smoothing.settings import Certification

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Votes = Mapping[Stream, Integers]


class Mode(NamedTuple):
    """``most(settings)``: the most samples an image can get of each stream of noise. ``wanted(settings, sigma, labels,
    votes)``: how many (N,) it should have, given votes (N, K + 1) of each; with them it is done. ``conclude(settings,
    sigma, votes)``: (predict, radius, p_a_lower), each (N,); None where votes make no certificate.
    """

    most: Callable[[Certification], Mapping[Stream, int]]
    wanted: Callable[[Certification, float, Integers, Votes], Mapping[Stream, Integers]]
    conclude: Callable[[Certification, float, Votes], tuple[Integers, Floats, Floats]] | None

    def lacking(self, settings: Certification, sigma: float, labels: Integers, votes: Votes) -> NDArray[np.bool_]:
        """Which images (N,) have fewer votes than they should have: nothing may be concluded of them."""
        wanted = self.wanted(settings, sigma, labels, votes)
        return np.any([votes[stream].sum(axis=1) < n for stream, n in wanted.items()], axis=0)


def _selected(votes: Votes) -> tuple[Integers, Integers, Integers]:
    """(top_class, k, n), each (N,): the selection's class, and its votes among the estimation's."""
    top_class = votes[Stream.SELECTION][:, :-1].argmax(axis=1)
    k = np.take_along_axis(votes[Stream.ESTIMATION], top_class[:, None], axis=1)[:, 0]
    return top_class, k, votes[Stream.ESTIMATION].sum(axis=1)


def _both(settings: Certification) -> Mapping[Stream, int]:
    return {Stream.SELECTION: settings.n0, Stream.ESTIMATION: settings.n}


def _all(settings: Certification, sigma: float, labels: Integers, votes: Votes) -> Mapping[Stream, Integers]:
    return {stream: np.full(len(labels), n) for stream, n in _both(settings).items()}


def _protocol(settings: Certification, sigma: float, votes: Votes) -> tuple[Integers, Floats, Floats]:
    return certify(votes[Stream.SELECTION], votes[Stream.ESTIMATION], settings.alpha, sigma)


def _until_settled(settings: Certification, sigma: float, labels: Integers, votes: Votes) -> Mapping[Stream, Integers]:
    """A next look at every image that is not settled; none before its class is selected."""
    _, k, n = _selected(votes)
    done = decide(k, n, settings.radii, sigma=sigma, alpha=settings.alpha, cap=settings.n).settled
    selected = votes[Stream.SELECTION].sum(axis=1) >= settings.n0
    return {
        Stream.SELECTION: np.full(len(labels), settings.n0),
        Stream.ESTIMATION: np.where(selected & ~done, next_look(n, settings.n), n),
    }


def _sequential(settings: Certification, sigma: float, votes: Votes) -> tuple[Integers, Floats, Floats]:
    top_class, k, n = _selected(votes)
    p_a_lower = capped_lower(k, n, settings.alpha, cap=settings.n)
    return np.where(p_a_lower > 0.5, top_class, ABSTAIN), radius_of(p_a_lower, sigma), p_a_lower


def few_samples(stream: Stream, schedule: Sequence[int]) -> Mode:
    """As many samples of ``stream`` as ``next_samples`` wants by ``schedule``: for an estimate, no certificate."""

    def most(settings: Certification) -> Mapping[Stream, int]:
        return {stream: max(schedule)}

    def wanted(settings: Certification, sigma: float, labels: Integers, votes: Votes) -> Mapping[Stream, Integers]:
        table = votes[stream]
        k = np.take_along_axis(table, labels[:, None], axis=1)[:, 0]
        return {stream: next_samples(k, table.sum(axis=1), schedule)}

    return Mode(most, wanted, None)


MODES = {
    "protocol": Mode(_both, _all, _protocol),
    "sequential": Mode(_both, _until_settled, _sequential),
    "estimate": few_samples(Stream.SEARCH, SCHEDULE),
}
