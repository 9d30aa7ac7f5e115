"""`nextstate report`: report.json and report.html of a run folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import check_writable, file_errors_are_user_errors
from model.durable import replace_file
from model.errors import UserError

HELP = """Write report.json and report.html of a run folder, from the figures that its parts left.

The page holds its pictures and charts itself and needs no network. Parts that have not run yet are left out.

examples:
  nextstate report run_folder=runs/demo"""


@dataclass
class Config:
    run_folder: str = "runs/demo"  # the folder of the curriculum
    json: bool = False  # print the figures as one JSON object


def run(config: Config) -> dict[str, Any]:
    folder = Path(config.run_folder)
    if not folder.is_dir():
        raise UserError("there is no such run folder", got=str(folder), fix="nextstate report run_folder=runs/NAME")
    check_writable(folder)
    with file_errors_are_user_errors(folder):
        return write_report(folder)


def write_report(folder: Path) -> dict[str, Any]:
    from launch.report.answers import publish_answer
    from launch.report.collect import collect
    from launch.report.page import render_page

    report = collect(folder)
    for line in report["damaged"]:
        print(f"damaged, read as far as possible: {line}", file=sys.stderr)
    publish_answer(folder / "report.json", report)
    replace_file(folder / "report.html", render_page(report, folder))
    return report


def render(report: dict[str, Any]) -> str:
    figures = [f"  {name}: {value}" for name, value in report["metrics"].items()]
    return "\n".join(["report.html and report.json are written", *figures])
