"""`nextstate train`: one stage of a curriculum."""

from __future__ import annotations

import os
from typing import Any

from training.config import TrainConfig
from training.stage import finished_summary, run_stage

HELP = "train one stage: fresh, from another stage's weights, or on from where it was interrupted"
Config = TrainConfig


def run(config: TrainConfig) -> dict[str, Any]:
    """The stage's summary. Under torchrun or srun this process is one rank, else it starts the ranks itself."""
    config.validate()
    summary = finished_summary(config)
    if summary is not None:
        return summary
    if "RANK" in os.environ:
        return run_stage(config)
    from launch.local import run_local

    return run_local(config)
