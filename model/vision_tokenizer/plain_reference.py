"""The released IBQ tokenizer's forward pass once more, as plainly as possible: what `convert` compares exports with.

Nothing here is shared with `model.vision_tokenizer`. Weights go by their published names, sizes by the names of the
released `config.yaml`. What the released code fixes is fixed here: groups of 32 channels, zero padding, attention in the
middle, codes chosen and looked up by the plain dot product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

NUM_GROUPS = 32
EPSILON = 1e-6


@dataclass(frozen=True)
class VisionSizes:
    """Of `ddconfig` in the released `config.yaml`."""

    num_levels: int
    num_blocks: int
    resolution: int
    attention_sides: Sequence[int]

    @classmethod
    def from_released(cls, network: Mapping[str, Any]) -> VisionSizes:
        return cls(
            len(network["ch_mult"]), network["num_res_blocks"], network["resolution"], network["attn_resolutions"]
        )

    @property
    def factor(self) -> int:
        """Pixels of a side per code."""
        result: int = 2 ** (self.num_levels - 1)
        return result


Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def latents(weights: Weights, sizes: VisionSizes, images: torch.Tensor) -> torch.Tensor:
    """[B, h * w, embed_dim], rows first, of images [B, 3, h*f, w*f] in [-1, 1]."""
    hidden, side = _conv(weights, "encoder.conv_in", images), sizes.resolution
    for level in range(sizes.num_levels):
        for block in range(sizes.num_blocks):
            hidden = _residual(weights, f"encoder.down.{level}.block.{block}", hidden)
            if side in sizes.attention_sides:
                hidden = _attention(weights, f"encoder.down.{level}.attn.{block}", hidden)
        if level < sizes.num_levels - 1:
            # One row below and one column on the right, then every second position.
            hidden = _conv(weights, f"encoder.down.{level}.downsample.conv", F.pad(hidden, (0, 1, 0, 1)), 2, 0)
            side //= 2
    hidden = _end(weights, "encoder", _middle(weights, "encoder.mid", hidden))
    return _conv(weights, "quant_conv", hidden, padding=0).flatten(2).transpose(1, 2)


@torch.no_grad()
def code_scores(weights: Weights, values: torch.Tensor) -> torch.Tensor:
    """[..., number of codes]: the code of a latent is the one with the highest score."""
    return values @ weights["quantize.embedding.weight"].T


@torch.no_grad()
def decode(weights: Weights, sizes: VisionSizes, codes: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, h*f, w*f], nominally in [-1, 1], of codes [B, h, w]."""
    values = weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    hidden = _conv(weights, "decoder.conv_in", _conv(weights, "post_quant_conv", values, padding=0))
    hidden = _middle(weights, "decoder.mid", hidden)
    side = sizes.resolution // sizes.factor
    for level in reversed(range(sizes.num_levels)):
        for block in range(sizes.num_blocks + 1):
            hidden = _residual(weights, f"decoder.up.{level}.block.{block}", hidden)
            if side in sizes.attention_sides:
                hidden = _attention(weights, f"decoder.up.{level}.attn.{block}", hidden)
        if level:
            doubled = hidden.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            hidden, side = _conv(weights, f"decoder.up.{level}.upsample.conv", doubled), side * 2
    return _end(weights, "decoder", hidden)


def _conv(weights: Weights, name: str, x: torch.Tensor, stride: int = 1, padding: int = 1) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=padding)


def _norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Each group of channels to mean zero and variance one over the whole map; then scale and shift by channel."""
    groups = x.reshape(len(x), NUM_GROUPS, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    normed = ((groups - mean) / torch.sqrt(variance + EPSILON)).reshape(x.shape)
    return normed * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def _swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _residual(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    hidden = _conv(weights, f"{name}.conv1", _swish(_norm(weights, f"{name}.norm1", x)))
    hidden = _conv(weights, f"{name}.conv2", _swish(_norm(weights, f"{name}.norm2", hidden)))
    if hidden.shape != x.shape:
        x = _conv(weights, f"{name}.nin_shortcut", x, padding=0)
    return x + hidden


def _attention(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    normed = _norm(weights, f"{name}.norm", x)
    query, key, value = (_conv(weights, f"{name}.{part}", normed, padding=0).flatten(2) for part in "qkv")
    shares = torch.softmax(query.transpose(1, 2) @ key / x.shape[1] ** 0.5, dim=-1)
    mixed = (value @ shares.transpose(1, 2)).reshape(x.shape)
    return x + _conv(weights, f"{name}.proj_out", mixed, padding=0)


def _middle(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    hidden = _attention(weights, f"{name}.attn_1", _residual(weights, f"{name}.block_1", x))
    return _residual(weights, f"{name}.block_2", hidden)


def _end(weights: Weights, side: str, x: torch.Tensor) -> torch.Tensor:
    return _conv(weights, f"{side}.conv_out", _swish(_norm(weights, f"{side}.norm_out", x)))
