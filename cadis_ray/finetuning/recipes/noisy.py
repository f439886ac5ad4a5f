"""Training on x + noise without a denoiser: Gaussian augmentation (Cohen et al. 2019), SmoothAdv (Salman et al. 2019).

Images are on the [-1, 1] scale: clean ones within it, noisy ones not clamped.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.finetuning.attack import TINY, class_logits, frozen
from cadis_ray.finetuning.recipes.ft_cadis import Losses, mean_ce_loss


def smoothadv_loss(
    classifier: nn.Module,
    clean: Tensor,
    noisy: Tensor,
    labels: Tensor,
    *,
    radius: float,
    steps: int,
    attack_classifier: nn.Module | None = None,
) -> Losses:
    """Mean cross-entropy at x + delta + noise_i, with the delta of ``perturbation`` and the noises it was made for.

    ``attack_classifier``: the bare module where ``classifier`` is wrapped for data parallelism.
    """
    bare = classifier if attack_classifier is None else attack_classifier
    delta = perturbation(bare, clean, noisy, labels, radius=radius, steps=steps)
    return mean_ce_loss(classifier, noisy + delta, labels)


def perturbation(
    classifier: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, *, radius: float, steps: int
) -> Tensor:
    """delta (B, C, H, W) by ``steps`` of ``attack_step``, from 0; ``classifier`` in evaluation mode.

    ``clean`` x (B, C, H, W), ``noisy`` x + noise_i (M, B, C, H, W): the noises stay fixed during the attack.
    ``radius`` is on the [-1, 1] scale, twice the paper's.
    """
    delta = torch.zeros_like(clean)
    with frozen(classifier):
        for _ in range(steps):
            delta = attack_step(classifier, clean, noisy, labels, delta, radius=radius, length=2 * radius / steps)
    return delta


def attack_step(
    classifier: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, delta: Tensor, *, radius: float, length: float
) -> Tensor:
    """One step of SmoothAdv's projected gradient ascent on -log mean_i softmax f(x + delta + noise_i)[y].

    A step of ``length`` along the l2-normalised gradient of each image, x + delta clamped to [-1, 1], delta scaled
    back into the l2 ball of ``radius``, in this order, as the authors do. Where the gradient is zero delta stays.
    """
    with torch.enable_grad():
        moving = delta.detach().requires_grad_()
        logits = class_logits(classifier, noisy + moving)
        mean = F.log_softmax(logits, dim=-1).logsumexp(0) - math.log(len(noisy))
        (gradient,) = torch.autograd.grad(F.nll_loss(mean, labels, reduction="sum"), moving)
    moved = delta + length * gradient / _norm(gradient).clamp_min(TINY)
    moved = (clean + moved).clamp(-1, 1) - clean
    return moved * (radius / _norm(moved).clamp_min(TINY)).clamp(max=1)


def _norm(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1)[:, None, None, None]
