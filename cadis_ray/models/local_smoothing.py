"""Local smoothing of a classifier (DiffSmooth, Zhang et al. 2023)."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.smoothing.noise import Stream, gaussian


class LocalSmoothing(nn.Module):
    """Denoised images (B, C, H, W) in [-1, 1] -> log of the mean over j = 1 .. m of softmax f(x + noise'_j), (B, K).

    ``sigma`` (sigma') is the std of noise' on [0, 1] pixels. The m noises are functions of (``seed``, image shape)
    only, so that the whole is a deterministic function of one denoised image and a sample has one vote, whatever m:
    certificates are for the outer noise. Which noises they are is part of the classifier.
    """

    def __init__(self, classifier: nn.Module, noises: int, sigma: float, seed: int) -> None:
        super().__init__()
        self.classifier, self.noises, self.sigma, self.seed = classifier, noises, sigma, seed

    def forward(self, images: Tensor) -> Tensor:
        local = _local_noises(self.seed, self.noises, tuple(images.shape[1:]), images.device)
        answers = [F.log_softmax(self.classifier(images + 2 * self.sigma * noise).float(), dim=1) for noise in local]
        return torch.stack(answers).logsumexp(0) - math.log(self.noises)


@lru_cache(maxsize=8)
def _local_noises(seed: int, noises: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return gaussian(seed, Stream.LOCAL, torch.zeros(noises, dtype=torch.int64), torch.arange(noises), shape, device)
