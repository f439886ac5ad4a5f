"""FT-CADIS's objective (eqs. 7-10, algorithm 1) and plain cross-entropy on denoised images."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.errors import DataError
from cadis_ray.finetuning.attack import adversarial_residuals, class_logits, frozen


class Losses(NamedTuple):
    """Scalars of one batch, means over its images. ``total`` carries the gradient; the parts are detached.

    ``madv`` is before lambda. ``mask_share``: images that the adversarial term sees. ``selected_share``:
    denoised images that the selection rule keeps, before the warm start.
    """

    total: Tensor
    sce: Tensor
    madv: Tensor
    mask_share: Tensor
    selected_share: Tensor


def ft_cadis_loss(
    classifier: nn.Module,
    clean: Tensor,
    denoised: Tensor,
    labels: Tensor,
    *,
    adv_weight: float,
    attack_radius: float,
    attack_steps: int,
    renormalise: bool = True,
    warm_start: bool = True,
    detach_target: bool = False,
    select: Literal["non_hallucinated", "all", "confidence"] = "non_hallucinated",
    confidence: float = 0.5,
    mask: Literal["all_correct", "none"] = "all_correct",
    target: Literal["consistency", "label"] = "consistency",
    reduction: Literal["max", "mean"] = "max",
    selection_classifier: nn.Module | None = None,
    attack_classifier: nn.Module | None = None,
) -> Losses:
    """Compute L_SCE + lambda * L_MAdv of FT-CADIS (eq. 10); the defaults are the authors' program.

    L_SCE (eq. 8) = 1/M sum of CE(f(x_i), y) over the selected x_i. L_MAdv (eq. 9) = max_i KL(target || f(x + eta*_i))
    for the images of the mask, else 0; eta*: see ``adversarial_residuals``. Only masked images are attacked: without
    batch normalisation and drop path, whose training mode sees the batch, the loss is that of attacking all of them.

    Args:
        classifier: f: images in [-1, 1] -> logits (B, K).
        clean: x (B, C, H, W), in [-1, 1].
        denoised: x_i (M, B, C, H, W), in [-1, 1] and of the dtype of ``clean``.
        labels: y int64 (B,).
        adv_weight: lambda >= 0; 0 does no adversarial work.
        attack_radius: epsilon >= 0, l2 on the [-1, 1] scale.
        attack_steps: T >= 0.
        renormalise: As in ``adversarial_residuals``.
        warm_start: If none of an image's x_i is selected, its lowest CE counts.
        detach_target: Whether no gradient flows through the target.
        select: Those with arg max f(x_i) = y; all; or those with softmax f(x_i)[y] >= ``confidence``.
        confidence: In [0, 1].
        mask: Images whose M arg maxes are all y; "none": every image.
        target: mean_i softmax f(x_i), or the label.
        reduction: max or mean over i.
        selection_classifier: Decides selection and mask instead of ``classifier`` (table 4: a copy of the
            off-the-shelf model).
        attack_classifier: The bare module where ``classifier`` is wrapped for data parallelism. All but the first
            forward pass goes through it: whether there is a second differs between workers, and the wrapper's forward
            exchanges buffers.

    Returns:
        Means over the batch, as scalars; call ``backward`` on ``total``.

    Raises:
        DataError: Images are outside [-1, 1] or not finite.
        ValueError: Shapes do not fit.
    """
    _check(clean, denoised, labels)
    num_noises, num_images = denoised.shape[:2]
    logits = class_logits(classifier, denoised)
    cross_entropy = _cross_entropy(logits, labels)

    with torch.no_grad():
        judged = logits
        if selection_classifier is not None:
            with frozen(selection_classifier):
                judged = class_logits(selection_classifier, denoised)
        correct = judged.argmax(-1) == labels
        selected = correct
        if select == "all":
            selected = torch.ones_like(correct)
        elif select == "confidence":
            selected = _cross_entropy(judged, labels).neg().exp() >= confidence
        counted = selected
        if warm_start:
            lowest = F.one_hot(cross_entropy.argmin(0), num_noises).T.bool()
            counted = selected | (lowest & ~selected.any(0))
        masked = correct.all(0) if mask == "all_correct" else torch.ones_like(correct[0])

    sce = torch.where(counted, cross_entropy, 0).sum() / (num_noises * num_images)
    madv = torch.zeros_like(sce)
    rows = masked.nonzero().squeeze(1) if adv_weight > 0 else masked.new_empty(0)
    if len(rows) > 0:
        bare = classifier if attack_classifier is None else attack_classifier
        if target == "consistency":
            # In the log domain: the gradient of p log p stays finite where a probability underflows.
            log_target = F.log_softmax(logits[:, rows], dim=-1).logsumexp(0) - math.log(num_noises)
            distribution = log_target.exp()
            entropy = -(distribution * log_target).sum(-1)
        else:
            distribution = F.one_hot(labels[rows], logits.shape[-1]).to(logits.dtype)
            entropy = torch.zeros_like(distribution[:, 0])
        if detach_target:
            distribution, entropy = distribution.detach(), entropy.detach()
        residuals = adversarial_residuals(
            bare,
            clean[rows],
            denoised[:, rows],
            distribution.detach(),
            radius=attack_radius,
            steps=attack_steps,
            renormalise=renormalise,
        )
        adversarial = F.log_softmax(class_logits(bare, clean[rows] + residuals), dim=-1)
        divergence = -(distribution * adversarial).sum(-1) - entropy
        worst = divergence.amax(0) if reduction == "max" else divergence.mean(0)
        madv = worst.sum() / num_images
    return Losses(sce + adv_weight * madv, sce.detach(), madv.detach(), masked.float().mean(), selected.float().mean())


def denoised_ce_loss(classifier: nn.Module, denoised: Tensor, labels: Tensor) -> Losses:
    """Cross-entropy on all denoised images (eq. 6; the fine-tuned rival of Carlini et al. 2023).

    ``denoised`` (M, B, C, H, W) in [-1, 1], ``labels`` (B,). Raises as ``ft_cadis_loss``.
    """
    _check(denoised[0], denoised, labels)
    return mean_ce_loss(classifier, denoised, labels)


def mean_ce_loss(classifier: nn.Module, noisy: Tensor, labels: Tensor) -> Losses:
    """Average the cross-entropy of ``noisy`` (M, B, C, H, W), denoised or not. ValueError for other shapes."""
    if noisy.dim() != 5 or not noisy.numel() or len(labels) != noisy.shape[1]:
        raise ValueError(f"need noisy (M, B, C, H, W) and labels (B,), got {tuple(noisy.shape)}, {tuple(labels.shape)}")
    logits = class_logits(classifier, noisy)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
    zero, one = torch.zeros_like(loss), torch.ones_like(loss)
    return Losses(loss, loss.detach(), zero, zero, one)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE (M, B) of logits (M, B, K)."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return losses.view(logits.shape[:2])


def _check(clean: Tensor, denoised: Tensor, labels: Tensor) -> None:
    if denoised.dim() != 5 or denoised.shape[1:] != clean.shape or len(labels) != len(clean) or not denoised.numel():
        raise ValueError(
            f"need clean (B, C, H, W), denoised (M, B, C, H, W) and labels (B,) with M, B >= 1, but got "
            f"{tuple(clean.shape)}, {tuple(denoised.shape)} and {tuple(labels.shape)}"
        )
    if clean.dtype != denoised.dtype:
        raise ValueError(f"clean is {clean.dtype} and denoised {denoised.dtype}: give both in one dtype")
    # One transfer from the device for all four; aminmax hands NaN on.
    bounds = torch.stack([*torch.aminmax(clean), *torch.aminmax(denoised)]).tolist()
    for name, low, high in (("clean", *bounds[:2]), ("denoised", *bounds[2:])):
        if not (low >= -1 and high <= 1):
            raise DataError(
                f"{name}: values from {low:g} to {high:g}, but images must be finite and in [-1, 1]; "
                f"images in [0, 1] become that by 2 * x - 1"
            )
