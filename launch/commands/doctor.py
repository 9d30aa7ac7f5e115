"""`nextstate doctor`: what is installed, what works, what is missing and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import Problems

HELP = """Examine this machine: versions, memory, storage, network, scheduler, clocks, limits; each with its cure.

Exits with 2 when something required does not work.

examples:
  nextstate doctor
  nextstate doctor collective_seconds=30     a longer test of the network between this node's processes
  nextstate doctor json=true"""


@dataclass
class Config:
    run_folder: str = "runs"  # where runs are to be written; its disk is examined
    collective_seconds: float = 2.0  # processes of this node exchange data for as long; 0: not at all
    json: bool = False  # print one JSON object on stdout

    def validate(self) -> None:
        problems = Problems()
        problems.check(
            0 <= self.collective_seconds <= 30, "collective_seconds", "must be in [0, 30]", "collective_seconds=30"
        )
        problems.raise_if_any()


def run(config: Config) -> dict[str, Any]:
    from launch.doctor.machine import examine, report

    answer = report(examine(Path(config.run_folder), config.collective_seconds))
    return answer if answer["ok"] else answer | {"exit_code": 2}


def render(answer: dict[str, Any]) -> str:
    lines = []
    for finding in answer["findings"]:
        mark = "ok" if finding["ok"] else "MISSING" if finding["required"] else "absent"
        lines.append(f"{mark:<8} {finding['name']:<14} {finding['detail']}")
        if not finding["ok"]:
            lines.append(f"{'':<23} cure: {finding['cure']}")
    lines.append("everything required works" if answer["ok"] else "something required does not work: see MISSING")
    return "\n".join(lines)
