"""Weights compared bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor


def same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, types, shapes and values."""
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype and torch.equal(value, other[key]) for key, value in one.items()
    )
