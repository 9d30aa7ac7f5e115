"""`nextstate demo`: the whole curriculum on real input at toy size."""

from __future__ import annotations

from typing import Any

from launch.curriculum import actions
from launch.curriculum.entries import CurriculumConfig

HELP = """Run the whole curriculum at toy size on this machine: raw media to a trained model, images and a report.

The same as nextstate curriculum curriculum=demo. Everything lands below runs/demo; open runs/demo/report.html.

examples:
  nextstate demo                       runs what is not done yet
  nextstate demo status                where it stands
  nextstate demo run_folder=/tmp/try   somewhere else"""

Config = CurriculumConfig
POSITIONAL = "action"


def run(config: CurriculumConfig) -> dict[str, Any]:
    return actions.act(config) | {"report": f"{config.run_folder}/report.html"}


def render(answer: dict[str, Any]) -> str:
    return f"{actions.render(answer)}\nreport: {answer['report']}"
