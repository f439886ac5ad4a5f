"""The attack inside the FT-CADIS loss: projected gradient ascent on the residual of a denoised image."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.models.classifiers.classifier import evaluation

TINY = 1e-12


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the parameters; both as they were afterwards."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with evaluation(module):
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def adversarial_residuals(
    classifier: nn.Module,
    clean: Tensor,
    denoised: Tensor,
    target: Tensor,
    *,
    radius: float,
    steps: int,
    renormalise: bool,
) -> Tensor:
    """eta*, the worst residuals near eta_i = denoised_i - clean (inner maximisation of FT-CADIS eq. 9).

    ``clean`` (B, C, H, W), ``denoised`` (M, B, C, H, W) in [-1, 1]; ``target`` (B, K) a distribution, held
    constant; returns (M, B, C, H, W) without gradient, so that the adversarial images are ``clean + eta*``.
    ``steps`` (T) steps of length 2 * radius / T along the l2-normalised gradient of KL(target || f(clean +
    eta)), each projected onto the l2 ball of ``radius`` (on the [-1, 1] scale, twice that of [0, 1]) around
    eta_i; no random start, no clamp to [-1, 1]. ``classifier`` runs in evaluation mode, so images do not see
    each other.

    ``renormalise``: the authors' program then gives eta the mean and the root mean square of eta_i again. The
    result may leave the ball. Where eta_i = 0 that takes every step back (eta* = 0).

    Where the M images are equal (M = 1) and ``target`` is their own prediction, KL starts at its minimum: no
    gradient leads away, and eta* = eta_i up to rounding.
    """
    anchor = (denoised - clean).detach()
    if steps == 0 or radius == 0:
        return anchor
    with frozen(classifier), torch.enable_grad():
        eta = anchor
        for _ in range(steps):
            moving = eta.detach().requires_grad_()
            log_probabilities = F.log_softmax(class_logits(classifier, clean + moving), dim=-1)
            # The entropy of a constant target has no gradient: cross-entropy ascends as KL does.
            objective = -(target * log_probabilities).sum(-1).mean(0).sum()
            (gradient,) = torch.autograd.grad(objective, moving)
            eta = eta + 2 * radius / steps * gradient / (_norm(gradient) + 1e-8)
            change = eta - anchor
            eta = anchor + change * (radius / _norm(change).clamp_min(TINY)).clamp(max=1)
            if renormalise:
                eta = _with_moments_of(anchor, eta)
    return eta


def class_logits(classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits (M, B, K) of images (M, B, C, H, W) in one forward pass, in the images' precision."""
    return classifier(images.flatten(0, 1)).to(images.dtype).unflatten(0, images.shape[:2])


def _norm(residuals: Tensor) -> Tensor:
    return residuals.flatten(2).norm(dim=2)[..., None, None, None]


def _with_moments_of(anchor: Tensor, eta: Tensor) -> Tensor:
    """``eta`` with the mean and root mean square of ``anchor``, as the authors compute it."""
    image = (-3, -2, -1)
    rms_anchor, rms = (value.square().mean(image, keepdim=True).sqrt() for value in (anchor, eta))
    # rms = 0 only where eta = 0, where the ratio does not matter: without the guard it would be 0 / 0.
    ratio = rms_anchor / rms.clamp_min(TINY)
    return anchor.mean(image, keepdim=True) + (eta - eta.mean(image, keepdim=True)) * ratio
