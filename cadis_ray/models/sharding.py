"""Fully sharded data parallelism (FSDP2) for classifiers that do not fit on one device beside their optimiser.

Each worker updates 1 / workers of the weights, and keeps the averaged gradients and the optimiser's state of these
alone. Outside the optimiser's step it has all weights, gathered once a step: an attack takes a number of passes that
differs between workers, and a pass over sharded weights would wait for the other workers. For the same reason gradients
are reduced once a step, after the last backward pass. Weights that do not fit on one device could not be certified
either.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# The block a parameter or module lies in: the longest prefix that ends in a number after one of these names.
BLOCK = re.compile(r".*\b(?:blocks|layers?)\.\d+\.")
M = TypeVar("M", bound=nn.Module)


def shard(module: M) -> M:
    """Shards what trains of ``module`` in place, each of its blocks by itself, over all processes of the default group.

    Every process holds equal weights before, on its device. The optimiser is made afterwards, inside ``sharded``.
    """
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    blocks = [part for name, part in module.named_modules() if BLOCK.fullmatch(f"{name}.")]
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    for part in [*reversed(blocks), module]:  # inner ones first
        fully_shard(part, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    root = _parts(module)[0]
    root.set_reshard_after_backward(False)
    root.set_requires_gradient_sync(False)
    root.set_manual_backward_finalization(True)
    _gather(module)
    return module


def reduce_gradients(module: nn.Module) -> None:
    """Averages the gradients of the backward passes since the last step over the workers, where weights are sharded."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(True)
        module.finalize_backward()
        module.set_requires_gradient_sync(False)


@contextmanager
def sharded(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a sharded module are this worker's shards, for the optimiser and for checkpoints.

    All workers enter and leave together. Nothing happens to a module that is not sharded.
    """
    for part in _parts(module):
        part.reshard()
    try:
        yield
    finally:
        _gather(module)


def whole(value: Tensor) -> Tensor:
    """A copy on the CPU; of a shard, the tensor it is a part of. All workers ask together."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu().clone()


def like(value: Tensor, target: Tensor) -> Tensor:
    """``value``, or this worker's shard of it where ``target``, of the same shape, is sharded."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def _gather(module: nn.Module) -> None:
    for part in _parts(module):
        part.unshard()


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
