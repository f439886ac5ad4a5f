"""Floating-point operations of a study's networks, counted on the meta device: without weights, in a second or two."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cadis_ray.finetuning.base_classifier import adapted_classifier
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.models.adapters.lora import trainable_parameters
from cadis_ray.models.denoisers.diffusion import load_denoiser, make_denoiser


class Flops(NamedTuple):
    """Of one image's pass forward, a multiplication and an addition being two; and how many numbers a trial trains."""

    denoiser: float
    classifier: float
    trained: int


def flops_of(configuration: Configuration, shape: tuple[int, int, int]) -> Flops:
    """For images (C, H, W). Weights are not read, but for the family diffusers.

    Raises as ``load_classifier`` and ``load_denoiser``.
    """
    wanted = configuration.denoiser
    # Drop path costs nothing, and libraries read its rates from tensors, which hold none here.
    plain = configuration.model_copy(
        update={"finetuning": configuration.finetuning.model_copy(update={"drop_path": 0.0})}
    )
    with torch.device("meta"):
        classifier = adapted_classifier(plain, seed=0)
        network = None if wanted.family == "diffusers" else make_denoiser(wanted.family, wanted.config).eval()
    network = network or load_denoiser(wanted.family, wanted.checkpoint)
    device = next(network.parameters()).device
    return Flops(
        _count(network.network, torch.zeros(1, *shape, device=device), torch.zeros(1, device=device)),
        _count(classifier, torch.zeros(1, *shape, device="meta")),
        trainable_parameters(classifier),
    )


def _count(network: nn.Module, *inputs: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return float(counter.get_total_flops())
