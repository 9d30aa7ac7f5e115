"""What a step says of itself. Imports no torch: commands that only read figures come by here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """Of one global batch, on the host, identical on every rank, before the optimizer is applied."""

    loss: float  # weighted sum of losses / total weight of the global batch
    gradient_norm: float  # global, before clipping
    num_tokens: int = 0  # all positions of the global batch, padding included
    has_labels: bool = True  # False: nothing in the global batch is to be learnt
    metrics: dict[str, Any] = field(default_factory=dict)  # as they go to metrics.jsonl: figures, or figures by name
