"""Adapters of PEFTSmoothing that peft has not for timm's vision transformers: deep prompts and series adapters."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.errors import UsageError
from cadis_ray.models.classifiers.classifier import Classifier


class Prompted(nn.Module):
    """A transformer block with tokens of its own after the prefix (class token ...); theirs leave with it."""

    def __init__(self, block: nn.Module, prompts: Tensor, prefix: int) -> None:
        super().__init__()
        self.block, self.prompts, self.prefix = block, nn.Parameter(prompts), prefix

    def forward(self, tokens: Tensor) -> Tensor:
        prompts = self.prompts.expand(len(tokens), -1, -1)
        found = self.block(torch.cat([tokens[:, : self.prefix], prompts, tokens[:, self.prefix :]], dim=1))
        return torch.cat([found[:, : self.prefix], found[:, self.prefix + len(self.prompts) :]], dim=1)


class Series(nn.Module):
    """``inner`` and after it h + up(gelu(down(h))); ``up`` begins at zero."""

    def __init__(self, inner: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor, **options: object) -> Tensor:
        found = self.inner(tokens, **options)
        return found + self.up(F.gelu(self.down(found)))


def add_prompts(classifier: Classifier, *, tokens: int, seed: int) -> Classifier:
    """A copy with ``tokens`` prompts at every block, replaced at each (deep visual prompts, Jia et al. 2022).

    They begin as U(-v, v), v = sqrt(6 / (channels * patch area + width)), a function of ``seed``, have no position
    embedding, and only they and the heads train. Raises UsageError for anything but a timm vision transformer.
    """
    adapted, blocks, width = _copy(classifier, "prompt")
    patch = adapted.backbone.get_submodule("patch_embed.proj").weight
    bound = math.sqrt(6 / (patch[0].numel() + width))  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(blocks):
        prompts = torch.empty(tokens, width, device="cpu").uniform_(-bound, bound, generator=generator)
        blocks[index] = Prompted(block, prompts.to(patch.device), adapted.backbone.num_prefix_tokens)  # type: ignore[arg-type]
    return adapted


def add_series(classifier: Classifier, *, bottleneck: int, seed: int) -> Classifier:
    """A copy with an adapter after the attention and the MLP of every block (Houlsby et al. 2019).

    At first the copy computes what ``classifier`` does; only the adapters and the heads train. ``seed`` draws the
    down-projections. Raises UsageError for anything but a timm vision transformer.
    """
    adapted, blocks, width = _copy(classifier, "series")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for block in blocks:
            for part in ("attn", "mlp"):
                inner = block.get_submodule(part)
                block.set_submodule(part, Series(inner, width, bottleneck).to(next(inner.parameters()).device))
    return adapted


def _copy(classifier: Classifier, adapter: str) -> tuple[Classifier, nn.Sequential, int]:
    """A copy of which only the heads train, its blocks and their width."""
    adapted = copy.deepcopy(classifier).requires_grad_(False)
    backbone = adapted.backbone
    blocks, width = getattr(backbone, "blocks", None), getattr(backbone, "embed_dim", None)
    if (
        not isinstance(blocks, nn.Sequential)
        or not hasattr(backbone, "num_prefix_tokens")
        or not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in blocks)
    ):
        raise UsageError(
            f"finetuning.adapter: got {adapter!r}, which needs a vision transformer of timm; the classifier is "
            f"{type(backbone).__name__}; need lora or full"
        )
    for head in adapted.heads:
        backbone.get_submodule(head).requires_grad_(True)
    assert isinstance(width, int)
    return adapted, blocks, width
