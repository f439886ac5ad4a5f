"""From logits to votes, on the device that made them."""

import torch
from torch import Tensor


def count_votes(logits: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Votes per row: int64 (num_rows, K + 1) on the logits' device, the last column being votes for no class.

    ``logits`` is (B, K) of any floating type, ``rows`` int64 (B,) in [0, num_rows): where each sample's vote
    goes. The argmax is taken in float32. A sample votes for no class if any of its logits is not finite or if
    its maximum is tied: argmax would favour the lowest index, so that a model that only says NaN would be
    certified.
    """
    logits = logits.float()
    num_classes = logits.shape[1]
    top, vote = logits.max(dim=1)
    decided = logits.isfinite().all(dim=1) & ((logits == top[:, None]).sum(dim=1) == 1)
    address = rows * (num_classes + 1) + torch.where(decided, vote, num_classes)
    counts = torch.zeros(num_rows * (num_classes + 1), dtype=torch.int64, device=logits.device)
    return counts.scatter_add_(0, address, torch.ones_like(address)).view(num_rows, num_classes + 1)
