"""The real next-token stage, slow enough to be interrupted until it has saved something; or crashing, if told to."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from training.config import TrainConfig
from training.objectives import next_token
from training.stage import Job

STEP_SECONDS, CRASH_AT = "TEST_STEP_SECONDS", "TEST_CRASH_AT"


def build(config: TrainConfig) -> Job:
    has_saved = any(config.stage_folder.glob("checkpoints/step_*"))
    step_seconds = 0.0 if has_saved else float(os.environ.get(STEP_SECONDS, 0.0))
    crash_at, step = int(os.environ.get(CRASH_AT, 0)), 0
    job = next_token.build(config)
    train = job.engine.forward_backward

    def forward_backward(micro_batches: Sequence[Any]) -> Any:
        nonlocal step
        step += 1
        if step == crash_at:
            os._exit(9)
        time.sleep(step_seconds)
        return train(micro_batches)

    job.engine.forward_backward = forward_backward  # type: ignore[method-assign]
    return job
