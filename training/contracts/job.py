"""What the loop runs: an objective, the engine that computes it, and where its batches come from."""

from __future__ import annotations

from dataclasses import dataclass

from training.contracts.batches import BatchSource
from training.contracts.engine import Engine
from training.contracts.objective import Objective


@dataclass
class Job:
    engine: Engine
    objective: Objective
    batches: BatchSource
