"""The UNet of OpenAI's improved-diffusion and guided-diffusion, with their state dict keys and shapes.

Three things make it fast: all tensors are channels-last; attention is torch's fused kernel; and for a timestep that the
whole batch shares, ``fold`` computes the embedding once and multiplies it into each residual block's norm (or bias).
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.models.denoisers.architecture import Architecture
from cadis_ray.models.denoisers.layers import (
    AttentionBlock,
    Downsample,
    Norm,
    ResBlock,
    Upsample,
    timestep_embedding,
    zeroed,
)

Folded = tuple[tuple[Tensor, ...], ...]


"""Per residual block, what ``ResBlock.fold`` made of one timestep."""


class Layers(nn.ModuleList):
    """A sequence in which residual blocks are given their condition."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, conditions: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor:
        for layer in self:
            x = layer(x, conditions[layer.index]) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The network of ``arch``: images (B, in_channels, H, W) on the [-1, 1] scale -> noise (and variance) estimate.

    H and W are multiples of ``2 ** (levels - 1)``. The output has twice the channels with ``learn_sigma``: the second
    half is the variance. Timesteps (B,) are what the network was trained on (already rescaled where the program does).
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        widths, embedding = arch.widths, 4 * arch.num_channels
        self.model_channels, self.halvings = arch.num_channels, len(widths) - 1
        self.time_embed = nn.Sequential(
            nn.Linear(arch.num_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        blocks = 0

        def block(inputs: int, outputs: int, resample: str = "") -> ResBlock:
            nonlocal blocks
            blocks += 1
            return ResBlock(blocks - 1, inputs, outputs, arch, resample)

        def attention(channels: int, upsample: bool = False) -> AttentionBlock:
            return AttentionBlock(channels, arch.heads(channels, upsample), arch.use_new_attention_order)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Layers(nn.Conv2d(arch.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, width in enumerate(widths):
            attends = 2**level in arch.attention_ds
            for _ in range(arch.num_res_blocks):
                self.input_blocks.append(Layers(block(channels, width), *([attention(width)] if attends else [])))
                channels = width
                skips.append(channels)
            if level < self.halvings:
                down = (
                    block(channels, channels, "down")
                    if arch.resblock_updown
                    else Downsample(channels, arch.conv_resample)
                )
                self.input_blocks.append(Layers(down))
                skips.append(channels)
        self.middle_block = Layers(block(channels, channels), attention(channels), block(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            attends = 2**level in arch.attention_ds
            for i in range(arch.num_res_blocks + 1):
                layers: list[nn.Module] = [block(channels + skips.pop(), width)]
                channels = width
                if attends:
                    layers.append(attention(channels, upsample=True))
                if level and i == arch.num_res_blocks:
                    up = (
                        block(channels, channels, "up")
                        if arch.resblock_updown
                        else Upsample(channels, arch.conv_resample)
                    )
                    layers.append(up)
                self.output_blocks.append(Layers(*layers))
        outputs = arch.in_channels * (2 if arch.learn_sigma else 1)
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, outputs, 3, padding=1)))

    def project(self, timesteps: Tensor) -> list[Tensor]:
        """The embedding's projection in every residual block: (B,) -> (B, C or 2C) each."""
        embedding = timestep_embedding(timesteps, self.model_channels).to(next(self.time_embed.parameters()).dtype)
        active = F.silu(self.time_embed(embedding))
        return [block.emb_layers[1](active) for block in self._blocks()]

    def fold(self, timestep: Tensor) -> Folded:
        """What ``forward`` takes instead of timesteps when one timestep, shape (1,), holds for every image."""
        blocks = zip(self._blocks(), self.project(timestep), strict=True)
        return tuple(block.fold(projected) for block, projected in blocks)

    def forward(self, x: Tensor, timesteps: Tensor | Folded) -> Tensor:
        """Raw output (B, C or 2C, H, W) in x's type. ``timesteps``: one per image, or ``fold`` of the one of all."""
        conditions = self.project(timesteps) if isinstance(timesteps, Tensor) else timesteps
        h = x.to(next(self.input_blocks.parameters()).dtype, memory_format=torch.channels_last)
        skips = []
        for layers in self.input_blocks:
            h = layers(h, conditions)
            skips.append(h)
        h = self.middle_block(h, conditions)
        for layers in self.output_blocks:
            h = layers(torch.cat([h, skips.pop()], dim=1), conditions)
        return self.out(h.to(cast(Tensor, self.out[2].weight).dtype)).to(x.dtype)

    def _blocks(self) -> list[ResBlock]:
        return [module for module in self.modules() if isinstance(module, ResBlock)]
