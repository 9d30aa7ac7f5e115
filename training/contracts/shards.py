"""Model weights and optimizer state as pieces of logical tensors: what engines keep and checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Shard:
    """A rectangular piece of a logical tensor, owned by exactly one rank.

    `key` and `global_shape` do not depend on the layout. The union of all ranks' shards of a key covers it once.
    """

    key: str  # "model/decoder.layers.3.mlp.linear_fc2.weight", "optimizer/exp_avg/decoder..."
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]


class ShardReader(Protocol):
    """A complete checkpoint, read by logical name whatever layout wrote it."""

    def keys(self) -> Iterable[str]: ...
    def global_shape(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor: ...


class ShardStore(Protocol):
    """What an engine keeps between steps, as shards of logical tensors: the same keys in every layout."""

    def model_shards(self) -> list[Shard]: ...
    def optimizer_shards(self) -> list[Shard]: ...
    def load_model(self, reader: ShardReader) -> None: ...
    def load_optimizer(self, reader: ShardReader) -> None: ...
    def random_state(self) -> dict[str, torch.Tensor]:
        """Random generator states of this rank, by logical stream name (tensors of bytes)."""
        ...

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None: ...
    def describe(self) -> dict[str, Any]:
        """Engine, layout and sizes for the manifest: tensor, pipeline, context, data, num_parameters."""
        ...
