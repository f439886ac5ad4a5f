"""Counting a classifier's votes on denoised images."""

import torch
from torch import Tensor, nn

from cadis_ray.models.classifiers import evaluation
from cadis_ray.smoothing.votes import count_votes


@torch.inference_mode()
def votes_on(classifier: nn.Module, denoised: Tensor, *, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Votes (N, K + 1), int64, of S denoised images of each of N images; the last column: votes for no class.

    ``denoised`` (S, N, C, H, W) in [-1, 1], of any float type and on any device; ``classifier`` is on
    ``device``, runs in float32 and evaluation mode, and is left in the mode it had. Counts of several calls
    add up.
    """
    samples, images = denoised.shape[:2]
    flat = denoised.flatten(0, 1)
    rows = torch.arange(images).repeat(samples).to(device)
    counts = []
    with evaluation(classifier):
        for chunk, chunk_rows in zip(flat.split(batch_size), rows.split(batch_size), strict=True):
            counts.append(count_votes(classifier(chunk.to(device, torch.float32)), chunk_rows, images))
    return torch.stack(counts).sum(0)
