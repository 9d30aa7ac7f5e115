"""Layers of the VQGAN encoder and decoder. Module names make the published state-dict keys; do not rename them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from model.vision_tokenizer.config import VisionTokenizerConfig

NORM_EPSILON = 1e-6


class Normalize(nn.GroupNorm):
    """Group normalisation over [B, C, H, W]. Scope `pixel` normalises the channels of each pixel alone instead."""

    def __init__(self, channels: int, config: VisionTokenizerConfig):
        super().__init__(config.norm_groups, channels, eps=NORM_EPSILON, affine=True)
        self.scope = config.norm_scope

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the base class's name
        if self.scope == "image":
            return super().forward(input)
        pixels = input.permute(0, 2, 3, 1)
        normed = F.layer_norm(pixels, (self.num_channels,), self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def convolution(in_channels: int, out_channels: int, config: VisionTokenizerConfig, kernel_size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size."""
    padding_mode: Literal["zeros", "replicate"] = "replicate" if config.padding_mode == "replicate" else "zeros"
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode=padding_mode)


class ResnetBlock(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv, added to the input (through a 1x1 conv when widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, config: VisionTokenizerConfig, kernel_size: int = 3):
        super().__init__()
        self.norm1 = Normalize(in_channels, config)
        self.conv1 = convolution(in_channels, out_channels, config, kernel_size)
        self.norm2 = Normalize(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = convolution(out_channels, out_channels, config, kernel_size)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        result: torch.Tensor = (x if self.nin_shortcut is None else self.nin_shortcut(x)) + hidden
        return result


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map, added to the input."""

    def __init__(self, channels: int, config: VisionTokenizerConfig):
        super().__init__()
        self.norm = Normalize(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        hidden = self.norm(x)
        query, key, value = (
            layer(hidden).view(batch, channels, height * width).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: torch.Tensor = x + self.proj_out(mixed.transpose(1, 2).reshape(batch, channels, height, width))
        return result


class Downsample(nn.Module):
    """Halves both sides: 3x3 convolution of stride 2, padded at the bottom and the right only."""

    def __init__(self, channels: int, config: VisionTokenizerConfig):
        super().__init__()
        self.padding_mode = "constant" if config.padding_mode == "zeros" else config.padding_mode
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(F.pad(x, (0, 1, 0, 1), mode=self.padding_mode))
        return result


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, config: VisionTokenizerConfig):
        super().__init__()
        self.conv = convolution(channels, channels, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result


class Middle(nn.Module):
    """The two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, channels: int, config: VisionTokenizerConfig, kernel_size: int = 3):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config, kernel_size)
        self.attn_1 = AttnBlock(channels, config) if config.mid_attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, config, kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return result
