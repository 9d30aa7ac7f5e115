"""What the loop asks of an engine. The loop, the callbacks and the checkpoints see nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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

    metadata: dict[str, Any]

    def keys(self) -> Iterable[str]: ...
    def global_shape(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor: ...


@dataclass
class StepResult:
    """Of one global batch, identical on every rank, before the optimizer is applied."""

    loss: float  # weighted sum of losses / total weight of the global batch
    gradient_norm: float  # global, before clipping
    loss_by_class: dict[str, float] = field(default_factory=dict)  # unweighted mean per class of token
    loss_by_source: dict[str, float] = field(default_factory=dict)
    tokens_by_class: dict[str, int] = field(default_factory=dict)  # labels with loss
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0  # all positions of the global batch, padding included
    extra: dict[str, float] = field(default_factory=dict)  # figures of the objective: psnr_db, codes_used, ...


class Engine(Protocol):
    """One optimizer step in two halves, so that a bad step can be refused between them."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def forward_backward(self, micro_batches: Sequence[Any]) -> StepResult: ...
    def optimizer_step(self, learning_rate: float) -> None: ...
    def discard_gradients(self) -> None: ...
    def model_shards(self) -> list[Shard]: ...
    def optimizer_shards(self) -> list[Shard]: ...
    def load_model(self, reader: ShardReader) -> None: ...
    def load_optimizer(self, reader: ShardReader) -> None: ...
    def random_state(self) -> dict[str, torch.Tensor]:
        """Random generator states of this rank, by logical stream name (tensors of bytes)."""
        ...

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None: ...
    def describe(self) -> dict[str, Any]:
        """Layout and sizes for the manifest: tensor, pipeline, context, data, num_parameters."""
        ...

    def final_metrics(self) -> dict[str, float]:
        """Figures of the trained model for the summary; raises `UserError` when it is of no use."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when true on any: the ranks' common decision (signals, stops)."""
        ...

    def barrier(self) -> None: ...
    def close(self) -> None: ...


class DataSource(Protocol):
    """Batches as a pure function of the number of samples consumed so far."""

    fingerprint: str

    def batch(self, first_sample: int) -> Sequence[Any]:
        """The micro-batches of this data-parallel rank for the global batch that starts at `first_sample`."""
        ...

    def close(self) -> None: ...
