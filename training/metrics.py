"""The record of one step, as it goes to metrics.jsonl and the loggers, and the figures taken from that file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.contracts.results import StepResult
from training.reliability.json_lines import read_json_lines

METRICS_NAME = "metrics.jsonl"
PICTURES_NAME = "answers"  # folder of a stage; STEP/best_0_0.png and others: what an objective wants eyes to see
NUM_LAST_STEPS = 10
# What two runs of the same steps do not share.
MACHINE_KEYS = (
    *("step_seconds", "data_seconds", "held_out_seconds"),
    *("tokens_per_second", "tflops_per_second", "mfu", "memory_bytes"),
)
HELD_OUT = "held_out_loss"  # {set: {class: loss}}
HELD_OUT_SECONDS = "held_out_seconds"  # that the sets took together


@dataclass(frozen=True)
class StepRecord:
    """One step as it happened. `skipped` holds the guard's reason; empty when the step was applied."""

    step: int  # counted from 1
    result: StepResult
    learning_rate: float
    consumed_samples: int  # after this step
    step_seconds: float
    skipped: str = ""
    held_out: dict[str, Any] = field(
        default_factory=dict
    )  # of `training.objectives.held_out.Validation`, where it was due
    speed: dict[str, float] = field(default_factory=dict)  # figures of `training.engines.speed.SpeedMeter`, on rank 0

    @property
    def tokens_per_second(self) -> float:
        return self.result.num_tokens / self.step_seconds if self.step_seconds > 0 else 0.0

    def to_line(self) -> dict[str, Any]:
        """JSON values; a loss that is not finite becomes null."""
        result = self.result
        line = {
            "step": self.step,
            "loss": _finite(result.loss),
            "gradient_norm": _finite(result.gradient_norm),
            "learning_rate": self.learning_rate,
            "tokens": result.num_tokens,
            "consumed_samples": self.consumed_samples,
            "step_seconds": round(self.step_seconds, 6),
        } | self.speed
        line |= {name: _finite(value) for name, value in (result.metrics | self.held_out).items()}
        return line | ({"skipped": self.skipped} if self.skipped else {})


def first_and_last_loss(stage_folder: Path) -> tuple[float | None, float | None]:
    """Loss of the first step, and the mean over the last 10 logged steps; skipped steps do not count."""
    lines = [line for line in read_json_lines(stage_folder / METRICS_NAME) if "skipped" not in line]
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), int | float)]
    if not losses:
        return None, None
    last = losses[-NUM_LAST_STEPS:]
    return losses[0], sum(last) / len(last)


def last_held_out(stage_folder: Path) -> dict[str, Any]:
    """The figures of the last validation; {} without one."""
    lines = [line for line in read_json_lines(stage_folder / METRICS_NAME) if HELD_OUT in line]
    return {name: lines[-1][name] for name in (HELD_OUT, f"{HELD_OUT}_by_source") if name in lines[-1]} if lines else {}


def _finite(value: Any) -> Any:
    """A figure, or figures by name, as JSON can hold them; None: nothing was there to measure."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return value if value is not None and math.isfinite(value) else None
