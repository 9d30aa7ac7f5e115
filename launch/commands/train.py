"""`nextstate train`: one stage of a curriculum."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from training.config import TrainConfig
from training.stage import finished_summary, run_stage, validate

HELP = """Train one stage: fresh, from another stage's weights, or on from where it was interrupted.

A stage preset sets stage.* and parallel.*; keys on the command line win over it. The stage writes below
<run_folder>/<stage.name>; the same command goes on from its newest complete checkpoint. It runs on this machine, or as
one rank of torchrun's; nextstate submit runs it on a cluster. What the plan says cannot work here is refused first.

examples:
  nextstate train stage=toy_sft run_folder=runs/demo parallel.data=1
  nextstate train stage=toy_pretrain_1 stage.optimizer.learning_rate=1e-3 stage.steps=50
  nextstate train -m stage=toy_pretrain_1 stage.optimizer.learning_rate=1e-3,2e-3"""


@dataclass
class Config(TrainConfig):
    def validate(self) -> None:
        validate(self)


def run(config: TrainConfig) -> dict[str, Any]:
    """The stage's summary. Under torchrun or srun this process is one rank, else it starts the ranks itself."""
    summary = finished_summary(config)
    if summary is not None:
        return summary
    if "RANK" in os.environ:
        from launch.local.left_environment import refuse_left_environment

        refuse_left_environment(config, os.environ)
        return run_stage(config)
    from launch.local.left_environment import refuse_tasks_without_ranks
    from launch.plan.preflight import refuse_impossible

    refuse_tasks_without_ranks(os.environ)
    refuse_impossible(config)
    from launch.local.ranks import run_local

    return run_local(config)
