"""Rotary position embeddings at given positions, so that documents may start anywhere and any layout sees one angle."""

from __future__ import annotations

import torch


def rotary_tables(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoPE's angles at the given positions, each [*positions, head_dim] (two equal halves)."""
    frequency = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    )
    angles = position_ids.to(torch.float32)[..., None] * frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `heads` [..., num_heads, head_dim] by tables that broadcast to it."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
