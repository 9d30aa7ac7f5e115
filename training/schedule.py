"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of `step` (counted from 0): linear warm-up, then cosine or linear decay, or constant.

    The first warm-up step is 1/warmup_steps of the peak; the last step of a decay has `min_learning_rate`.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    num_decay_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / num_decay_steps)
    if config.schedule == "linear":
        return peak + (low - peak) * progress
    assert config.schedule == "cosine", config.schedule
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
