"""`nextstate curriculum`: runs a list of stages and the steps between them, here or on a cluster, or shows them."""

from __future__ import annotations

from typing import Any

from launch.curriculum import actions
from launch.curriculum.entries import CurriculumConfig

HELP = """Run a curriculum: data, stages, evaluation, in order; what is up to date is skipped.

A curriculum is a file of conf/curriculum. Its entries run as processes of their own, or with cluster=slurm as jobs
that wait for each other; the state stands in <run_folder>. Give the same command again after any interruption.

examples:
  nextstate curriculum curriculum=demo                     everything that is not done yet
  nextstate curriculum curriculum=demo cluster=slurm       the same as a chain of jobs
  nextstate curriculum status curriculum=demo              one line an entry
  nextstate curriculum logs curriculum=demo entry=sft      the end of its log
  nextstate curriculum cancel curriculum=demo              what is queued or running
  nextstate curriculum resume curriculum=demo              goes on where it was cancelled or failed
  nextstate curriculum curriculum=demo until=pretrain_1    stop after an entry
  nextstate curriculum curriculum=demo 'force=[sft]'       run an entry again, and what depends on it
  nextstate curriculum curriculum=emu35 dry_run=true       what would run"""

Config = CurriculumConfig
POSITIONAL = "action"


def run(config: CurriculumConfig) -> dict[str, Any]:
    return actions.act(config)


def render(answer: dict[str, Any]) -> str:
    return actions.render(answer)
