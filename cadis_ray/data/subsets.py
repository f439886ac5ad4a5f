"""Which images of a data set a study uses: seeded, named, and the same wherever they are chosen."""

from collections.abc import Callable
from enum import IntEnum
from typing import Literal

import numpy as np

from cadis_ray.errors import DataError, UsageError

Subset = Literal["first", "per_class", "every"]


class Order(IntEnum):
    """What is put into a seeded order; the orders of one seed are independent."""

    TRAIN = 0
    TEST = 1


def seeded(count: int, seed: int, order: Order) -> np.ndarray:
    """A permutation of 0...count - 1, a function of its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, int(order)])).permutation(count)


def training_rows(total: int, validation: int, train: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to validate on, in seeded order, and to train on, sorted: the first ``train`` of the rest, None: all.

    More validation images keep the old ones. Raises UsageError when ``total`` is too small.
    """
    needed = validation + (train or 1)
    if needed > total:
        raise UsageError(f"data.validation {validation} and data.train {train or 'null'}: need {needed} of the data "
                         f"set's {total} training images")  # fmt: skip
    order = seeded(total, seed, Order.TRAIN)
    return order[:validation], np.sort(order[validation:][:train])


def test_rows(subset: Subset, labels: np.ndarray, count: int, classes: int, seed: int) -> np.ndarray:
    """``count`` rows of the test images with ``labels`` (N,), of which any first ones are a fair subset but for every.

    first: of a seeded order. per_class: the same number of each class, by seed, class after class in turn. every:
    every k-th in the data set's own order from the first on, k = N // count, as in the logs of Cohen et al. 2019.
    Raises UsageError when there are not so many.
    """
    if count > len(labels):
        raise UsageError(f"data.test: got {count}; need at most the {len(labels)} test images of the data set")
    return SUBSETS[subset](labels, count, classes, seed)


def _first(labels: np.ndarray, count: int, classes: int, seed: int) -> np.ndarray:
    return seeded(len(labels), seed, Order.TEST)[:count]


def _per_class(labels: np.ndarray, count: int, classes: int, seed: int) -> np.ndarray:
    each, rest = divmod(count, classes)
    if rest:
        raise UsageError(f"data.test: got {count}; need a multiple of the {classes} classes for test_subset: per_class")
    order = seeded(len(labels), seed, Order.TEST)
    rows = [order[labels[order] == label][:each] for label in range(classes)]
    if short := [label for label in range(classes) if len(rows[label]) < each]:
        raise DataError(f"class {short[0]} has {len(rows[short[0]])} test images; per_class needs {each} of each")
    return np.stack(rows, axis=1).ravel()


def _every(labels: np.ndarray, count: int, classes: int, seed: int) -> np.ndarray:
    return np.arange(count) * (len(labels) // count)


SUBSETS: dict[Subset, Callable[[np.ndarray, int, int, int], np.ndarray]] = {
    "first": _first, "per_class": _per_class, "every": _every,
}  # fmt: skip
