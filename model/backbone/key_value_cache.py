"""Static key/value cache of autoregressive decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class KeyValueCache:
    """Keys (after RoPE) and values of every layer of this process; each row is filled from slot 0 on.

    `keys` and `values`: [layers, B, groups, max_length, head_dim]; groups are those of this tensor-parallel rank.
    `lengths`: int64 [B], slots filled in each row. Writing never looks at what lies behind a row's length, so a
    row is shortened by lowering its length.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_groups: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KeyValueCache:
        shape = (num_layers, batch_size, num_groups, max_length, head_dim)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def num_groups(self) -> int:
        return self.keys.shape[2]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value [B, t, groups, head_dim] of one layer at `slots` [B, t]."""
        rows = torch.arange(self.batch_size, device=slots.device)[:, None]
        self.keys[layer][rows, :, slots] = key
        self.values[layer][rows, :, slots] = value

    def fill(self, other: KeyValueCache, rows: torch.Tensor) -> None:
        """Row b becomes row `rows[b]` (int64 [B]) of another cache, which is not longer than this one."""
        length = other.max_length
        self.keys[:, :, :, :length] = other.keys[:, rows]
        self.values[:, :, :, :length] = other.values[:, rows]
        self.lengths.copy_(other.lengths[rows])
