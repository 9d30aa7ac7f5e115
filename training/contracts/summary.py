"""`summary.json` of a stage, typed: what a run says of itself when it has ended well."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from model.durable import record_of


@dataclass(frozen=True)
class StageSummary:
    """Figures of the stage's whole life, over all restarts. `values` holds them all, those of its objective included."""

    values: dict[str, Any] = field(repr=False)
    name: str = ""
    objective: str | None = None
    config_fingerprint: str | None = None
    tensor: int | None = None  # ranks of each kind
    pipeline: int | None = None
    context: int | None = None
    data: int | None = None
    steps: int | None = None
    tokens: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None  # mean of the last steps
    held_out_loss: dict[str, Any] | None = None  # {set: {class: loss}} of the last validation
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None  # summed over the ranks
    skipped_steps: int | None = None
    skipped_windows: list[Any] | None = None  # [first, end) samples, by rollbacks
    checkpoint: str | None = None  # folder of the last one

    @classmethod
    def of(cls, values: object) -> StageSummary:
        """Raises ValueError that names the field whose value has another type."""
        return record_of(cls, values)
