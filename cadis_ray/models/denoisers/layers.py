"""Blocks of the UNet of OpenAI's two programs, with the programs' state dict keys."""

import math
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.models.denoisers.architecture import GROUPS, Architecture

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B,) -> (B, width) float32: cosines, then sines, of periods 2 pi to 20,000 pi."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class Norm(nn.GroupNorm):
    """Group norm in float32 whatever the type of its input (B, C, H, W), and back to that type."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.affine_by(input, self.weight, self.bias)

    def affine_by(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The norm with another weight and bias (C,)."""
        weight, bias, d = weight.float(), bias.float(), x.shape[1] // self.num_groups
        if x.device.type == "cpu" and d < 8:  # torch's channels-last kernel takes 10 times as long for narrow groups
            return self._narrow(x.float(), weight, bias, d).to(x.dtype)
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)

    def _narrow(self, x: Tensor, weight: Tensor, bias: Tensor, d: int) -> Tensor:
        """Two-pass norm of groups of ``d`` channels."""
        b, c, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(b, height * width, c)

        def over_groups(per_channel: Tensor) -> Tensor:
            if d == 1:
                return per_channel
            return per_channel.view(b, -1, d).mean(2).repeat_interleave(d, dim=1)

        centred = pixels - over_groups(pixels.mean(1))[:, None]
        variance = over_groups((centred * centred).mean(1))
        scale = torch.rsqrt(variance + self.eps) * weight
        return torch.addcmul(bias, centred, scale[:, None]).view(b, height, width, c).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep; ``resample`` "down" halves, "up" doubles the resolution inside it."""

    def __init__(self, index: int, inputs: int, outputs: int, arch: Architecture, resample: str = "") -> None:
        super().__init__()
        self.index, self.resample, self.scale_shift = index, resample, arch.use_scale_shift_norm
        self.in_layers = nn.Sequential(Norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * arch.num_channels, 2 * outputs if self.scale_shift else outputs)
        )
        self.out_layers = nn.Sequential(
            Norm(outputs), nn.SiLU(), nn.Dropout(arch.dropout), zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def fold(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Weights of this block for one timestep, from the embedding's projection (1, C or 2C)."""
        if not self.scale_shift:
            return (cast(Tensor, self.in_layers[2].bias) + projected[0],)
        scale, shift = projected[0].chunk(2)
        norm = cast(Norm, self.out_layers[0])
        return norm.weight * (1 + scale), norm.bias * (1 + scale) + shift

    def forward(self, x: Tensor, condition: Tensor | tuple[Tensor, ...]) -> Tensor:
        """``condition``: the embedding's projection, one row per image, or what ``fold`` made of a single row."""
        h = self._resample(F.silu(self.in_layers[0](x), inplace=True))
        x = self._resample(x)
        conv, norm = cast(nn.Conv2d, self.in_layers[2]), cast(Norm, self.out_layers[0])
        if isinstance(condition, Tensor):
            condition = condition[:, :, None, None].to(h.dtype)
            if self.scale_shift:
                scale, shift = condition.chunk(2, dim=1)
                h = norm(conv(h)) * (1 + scale) + shift
            else:
                h = norm(conv(h) + condition)
        elif self.scale_shift:
            h = norm.affine_by(conv(h), *condition)
        else:
            h = norm(F.conv2d(h, conv.weight, condition[0].to(h.dtype), padding=1))
        h = self.out_layers[3](self.out_layers[2](F.silu(h, inplace=True)))
        return h.add_(self.skip_connection(x))

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class AttentionBlock(nn.Module):
    """Self-attention over all pixels. ``new_order``: rows of qkv are (3, heads, d) rather than (heads, 3, d)."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)
        order = (3, self.heads) if self.new_order else (self.heads, 3)
        qkv = qkv.view(b, height * width, *order, c // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2 if self.new_order else 3))
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        out = F.linear(tokens, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + out.view(b, height, width, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves the resolution, by a strided convolution or by averaging."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution by nearest neighbours, then convolves if ``conv``."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def zeroed(module: M) -> M:
    """The layer with zero parameters, as the programs initialise the last one of every residual branch."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
