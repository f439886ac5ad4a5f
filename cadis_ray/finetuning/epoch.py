"""One epoch of fine-tuning: what every worker runs, with or without Ray around it."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from cadis_ray.finetuning.batch import BEGINNING, Batch, NonFiniteLoss, Standing
from cadis_ray.finetuning.optimiser import apply_schedule, clip_gradients
from cadis_ray.finetuning.recipes.ft_cadis import Losses, denoised_ce_loss, ft_cadis_loss, mean_ce_loss
from cadis_ray.finetuning.recipes.noisy import smoothadv_loss
from cadis_ray.models.sharding import reduce_gradients, sharded

if TYPE_CHECKING:
    from cadis_ray.finetuning.settings import FineTuning


def train_epoch(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[Sequence[Batch]],
    settings: "FineTuning",
    *,
    epoch: int,
    first_step: int,
    total_steps: int,
    bare: nn.Module | None = None,
    selection_classifier: nn.Module | None = None,
    done: Standing = BEGINNING,
    after_step: Callable[[Standing], None] = lambda standing: None,
) -> dict[str, float]:
    """Takes one optimiser step per batch, given in parts that fit into memory; returns this worker's means over its
    images.

    ``epoch`` counts from 0, ``first_step`` is its first iteration among ``total_steps``; ``done`` of its steps were
    taken before these batches, and are in the means. ``after_step`` hears how far the epoch has come. ``bare``: the
    module inside ``model`` where that is wrapped for data parallelism. ``selection_classifier``: the frozen
    off-the-shelf copy for ``update_selection: frozen``. bf16 autocast covers the forward passes; losses are float32.

    Keys: loss, sce, madv, mask_share, selected_share, gradient_norm (before clipping), learning_rate and
    weight_decay (of the last step), images. Raises NonFiniteLoss before a step that is not finite would be
    taken: with averaged gradients a gradient that is not finite anywhere stops every worker at the same step.
    """
    model.train()
    sums = torch.tensor(done.sums, dtype=torch.float64)
    images, rate, decay = done.images, math.nan, math.nan
    for step, parts in enumerate(batches, first_step + done.steps):
        rate, decay = apply_schedule(optimiser, step, total_steps, settings)
        optimiser.zero_grad(set_to_none=True)
        means, step_images = torch.zeros(5), sum(len(part.labels) for part in parts)
        for part in parts:
            with _averaged(model, last=part is parts[-1]):
                with torch.autocast(part.clean.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    losses = _losses(model, part, settings, epoch, bare, selection_classifier)
                (losses.total * part.scale).backward()
            # What leaves the device here is also what notices a diverged run.
            means += torch.stack([*losses]).detach().cpu() * (len(part.labels) / step_images)
        reduce_gradients(model)
        with sharded(model):
            norm = clip_gradients(model.parameters(), settings.clip, settings.clip_norm)
            values = torch.cat([means, norm.detach().cpu().view(1)])
            if not values.isfinite().all():
                raise NonFiniteLoss(epoch, step)
            optimiser.step()
        sums += values * step_images
        images += step_images
        after_step(Standing(step - first_step + 1, images, tuple(sums.tolist())))
    if not images and not done.steps:
        raise ValueError(f"epoch {epoch} has no batches")
    names = (*(("loss" if name == "total" else name) for name in Losses._fields), "gradient_norm")
    return dict(zip(names, (sums / max(images, 1)).tolist(), strict=True)) | {
        "learning_rate": rate,
        "weight_decay": decay,
        "images": float(images),
    }


def _averaged(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Where workers average gradients they do it once a step, in the backward pass of the last part."""
    no_sync = getattr(model, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()


def _losses(
    model: nn.Module,
    batch: Batch,
    settings: "FineTuning",
    epoch: int,
    bare: nn.Module | None,
    selection_classifier: nn.Module | None,
) -> Losses:
    if settings.recipe == "none":
        raise ValueError("recipe 'none' does not train")
    if settings.recipe == "denoised_ce":
        return denoised_ce_loss(model, batch.denoised, batch.labels)
    if settings.recipe in ("gaussian", "peft_smoothing"):
        return mean_ce_loss(model, batch.denoised, batch.labels)
    if settings.recipe == "smoothadv":
        share = min(1.0, (epoch + 1) / max(settings.attack_warmup_epochs, 1))
        return smoothadv_loss(
            model, batch.clean, batch.denoised, batch.labels,
            radius=settings.attack_radius * share, steps=settings.attack_steps, attack_classifier=bare,
        )  # fmt: skip
    if (settings.update_selection == "frozen") != (selection_classifier is not None):
        raise ValueError("selection_classifier goes with update_selection 'frozen', and only with it")
    after = settings.attack_radius_doubles_after
    return ft_cadis_loss(
        model,
        batch.clean,
        batch.denoised,
        batch.labels,
        adv_weight=settings.adv_weight,
        attack_radius=settings.attack_radius * (2 if after is not None and epoch >= after else 1),
        attack_steps=settings.attack_steps,
        renormalise=settings.renormalise,
        warm_start=settings.warm_start,
        detach_target=settings.detach_target,
        select=settings.select,
        confidence=settings.confidence,
        mask=settings.mask,
        target=settings.target,
        reduction=settings.reduction,
        selection_classifier=selection_classifier,
        attack_classifier=bare,
    )
