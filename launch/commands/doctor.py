"""`nextstate doctor`: what is installed, what works, what is missing and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP = """Examine this machine: versions, memory, disk, backends; every missing thing with its cure.

Exits with 2 when something required does not work.

examples:
  nextstate doctor
  nextstate doctor json=true"""


@dataclass
class Config:
    run_folder: str = "runs"  # where runs are to be written; its disk is examined
    json: bool = False  # print one JSON object on stdout


def run(config: Config) -> dict[str, Any]:
    from launch.doctor import examine, report

    answer = report(examine(Path(config.run_folder)))
    return answer if answer["ok"] else answer | {"exit_code": 2}


def render(answer: dict[str, Any]) -> str:
    lines = []
    for finding in answer["findings"]:
        mark = "ok" if finding["ok"] else "MISSING" if finding["required"] else "absent"
        lines.append(f"{mark:<8} {finding['name']:<14} {finding['detail']}")
        if not finding["ok"]:
            lines.append(f"{'':<23} cure: {finding['cure']}")
    lines.append(
        "everything required works"
        if answer["ok"]
        else "something required does not work: see MISSING"
    )
    return "\n".join(lines)
