"""What an engine promises: how something is computed. It knows no loss and no data; objectives and sources bring them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from training.contracts.batches import Policy, Ranks
from training.contracts.shards import ShardStore


@dataclass(frozen=True)
class StepSums:
    """Of one global batch, reduced, the same on every rank, still on the device: the loop reads it once a step."""

    totals: torch.Tensor  # float64 [n], what the objective counted before the forward pass
    sums: torch.Tensor  # float64 [m], what its loss added up
    squared_gradient_norm: torch.Tensor  # [1], of the global gradient, before clipping

    def read(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Totals, sums and the gradient norm on the host: the one wait for the device in a step."""
        squared = self.squared_gradient_norm.reshape(1).double()
        values = torch.cat((self.totals, self.sums, squared)).cpu().numpy()
        num_totals = self.totals.numel()
        return values[:num_totals], values[num_totals:-1], float(values[-1]) ** 0.5


class Engine(Policy, Protocol):
    """One optimizer step in two halves, so that a bad step can be refused between them."""

    ranks: Ranks
    shards: ShardStore

    def forward_backward(self, batches: Sequence[Any], objective: Any) -> StepSums:
        """Reduced gradients of the objective's loss over the global batch; nothing is applied yet."""
        ...

    def optimizer_step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip by `gradient_norm`, which is that of the last `forward_backward`, and apply."""
        ...

    def discard_gradients(self) -> None: ...
    def close(self) -> None: ...
