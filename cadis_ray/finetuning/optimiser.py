"""AdamW with layer-wise decay, its schedules, and gradient clipping, as in the authors' program."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cadis_ray.models.sharding import BLOCK

if TYPE_CHECKING:
    from cadis_ray.finetuning.settings import FineTuning

EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed", "position_embeddings")


def layer_ids(module: nn.Module) -> dict[str, int]:
    """Parameter name -> depth: 0 before the first block, 1 to L in the blocks, L + 1 after them.

    Adapters count with the block they sit in. A model without numbered blocks has only depth 0.
    """
    ids: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for name, _ in module.named_parameters():
        if match := BLOCK.match(name):
            ids[name] = blocks.setdefault(match.group(), len(blocks) + 1)
        else:
            ids[name] = len(blocks) + 1 if blocks else 0
    return ids


def make_optimiser(module: nn.Module, settings: "FineTuning") -> torch.optim.AdamW:
    """AdamW (0.9, 0.999) over the trainable parameters, in groups by depth and weight decay.

    Depth ``d`` of L blocks learns at ``layer_decay ** (L + 1 - d)`` of the rate. Biases, norms, cls token and
    position embeddings do not decay. Rates and decays are 0 until ``apply_schedule`` sets them.
    """
    ids = layer_ids(module)
    last = max(ids.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(EMBEDDINGS)
            groups[ids[name], decays].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_scale": settings.layer_decay ** (last - depth), "decays": decays}
            for (depth, decays), parameters in groups.items()
        ],
        lr=0.0,
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )


def schedule_at(step: int, total_steps: int, settings: "FineTuning") -> tuple[float, float]:
    """Learning rate and weight decay of iteration ``step`` (from 0) of ``total_steps`` (all epochs).

    The rate rises linearly from 0 to base_lr * batch_size / 256 over ``warmup_epochs``, then follows half a
    cosine to ``min_lr``; the decay follows half a cosine from start to end over the whole training.
    """
    peak = settings.base_lr * settings.batch_size / 256
    warmup = settings.warmup_epochs * total_steps / settings.epochs
    if step < warmup:
        rate = peak * step / warmup
    else:
        rate = _half_cosine(peak, settings.min_lr, (step - warmup) / max(total_steps - warmup, 1))
    return rate, _half_cosine(settings.weight_decay, settings.weight_decay_end, step / total_steps)


def apply_schedule(
    optimiser: torch.optim.Optimizer, step: int, total_steps: int, settings: "FineTuning"
) -> tuple[float, float]:
    """Sets every group's rate and decay for iteration ``step``; returns ``schedule_at``."""
    rate, decay = schedule_at(step, total_steps, settings)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate, decay


def clip_gradients(parameters: Iterable[nn.Parameter], how: Literal["per_tensor", "global"], max_norm: float) -> Tensor:
    """Scales gradients down to l2 norm ``max_norm``, each tensor (the authors') or all as one vector.

    Returns the global norm before clipping, which is not finite if any gradient is not. Of sharded gradients, whose
    norms are those of whole tensors, all workers clip together.
    """
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]
    norms = torch.stack([gradient.norm() for gradient in gradients])
    if isinstance(found[0], DTensor):
        norms = norms.square_()
        dist.all_reduce(norms, group=found[0].device_mesh.get_group())
        norms = norms.sqrt_()
    total = norms.norm()
    limits = norms if how == "per_tensor" else total.expand_as(norms)
    for gradient, factor in zip(gradients, (max_norm / (limits + 1e-6)).clamp(max=1), strict=True):
        gradient.mul_(factor)
    return total


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
