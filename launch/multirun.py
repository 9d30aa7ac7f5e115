"""`-m`: one process for each combination of swept values, each with a run folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf

from launch import configs


def plan_jobs(command: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job; every one is composed, so that mistakes show before the first job starts.

    Sweeps use Hydra's grammar (`key=1,2`, `key=range(1,4)`, `group=glob(*)`). Job n writes to
    `<run folder>/multirun/<n>` where the command has a run folder.
    """
    parsed = [configs.parse_override(text) for text in overrides]
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    jobs = []
    for index, combination in enumerate(combinations):
        tree = configs.compose_tree(command, list(combination))
        run_folder = OmegaConf.select(tree, "run_folder")
        own = [f"run_folder='{run_folder}/multirun/{index:03d}'"] if run_folder else []
        jobs.append(list(combination) + own)
    return jobs


def run_all(command: str, jobs: list[list[str]], *, as_json: bool) -> int:
    """Runs the jobs one after another; the exit code is the highest of theirs."""
    results = [run_job(command, index, job, as_json) for index, job in enumerate(jobs)]
    if as_json:
        print(json.dumps({"jobs": results}, ensure_ascii=False))
    return max((int(result["exit_code"]) for result in results), default=0)


def run_job(command: str, index: int, overrides: list[str], as_json: bool) -> dict[str, Any]:
    print(f"job {index}: nextstate {command} {' '.join(overrides)}", file=sys.stderr, flush=True)
    arguments = [sys.executable, "-m", "launch.cli", command, *overrides]
    finished = subprocess.run(arguments, stdout=subprocess.PIPE if as_json else None, check=False)
    result: dict[str, Any] = {
        "job": index,
        "overrides": overrides,
        "exit_code": finished.returncode,
    }
    if as_json:
        text = finished.stdout.decode().strip()
        result["answer"] = json.loads(text) if text else None
    return result
