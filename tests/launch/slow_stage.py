"""The real next-token stage, slow enough to be interrupted until it has saved something; or crashing, if told to."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from training.config import TrainConfig
from training.contracts.engine import StepSums
from training.contracts.objective import TokenObjective
from training.engines.megatron.engine import MegatronEngine

STEP_SECONDS, CRASH_AT = "TEST_STEP_SECONDS", "TEST_CRASH_AT"


class SlowEngine(MegatronEngine):
    """`engine=slow_stage.SlowEngine`."""

    def __init__(self, config: TrainConfig, objective: TokenObjective | None = None):
        super().__init__(config, objective)
        has_saved = any(config.stage_folder.glob("checkpoints/step_*"))
        self.step_seconds = 0.0 if has_saved else float(os.environ.get(STEP_SECONDS, 0.0))
        self.steps_to_crash = int(os.environ.get(CRASH_AT, 0))

    def forward_backward(self, batches: Sequence[Any], objective: TokenObjective) -> StepSums:
        self.steps_to_crash -= 1
        if self.steps_to_crash == 0:
            os._exit(9)
        time.sleep(self.step_seconds)
        return super().forward_backward(batches, objective)
