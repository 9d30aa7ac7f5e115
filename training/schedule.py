"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Of step 1 ... num_steps: a linear rise over `warmup_steps`, then the schedule.

    `cosine` and `linear` reach `min_learning_rate` at the last step; `constant` stays at the peak.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    if config.schedule == "linear":
        return peak + (floor - peak) * progress
    assert config.schedule == "cosine", config.schedule
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
