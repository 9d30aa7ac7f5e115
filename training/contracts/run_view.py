"""What callbacks and batch sources may see of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from training.config import TrainConfig


@dataclass
class LoopState:
    """Where a run is. All of it is in each checkpoint."""

    step: int = 0  # steps done, applied or skipped
    next_sample: int = 0  # first sample of the next global batch
    num_tokens: int = 0  # positions of all batches so far
    num_skipped_steps: int = 0
    skipped_windows: list[list[int]] = field(default_factory=list)  # [first, end) samples, by rollbacks
    wall_seconds: float = 0.0  # in the loop, restarts included


class RunView(Protocol):
    """A run as its observers see it: they change nothing of it."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def state(self) -> LoopState: ...
