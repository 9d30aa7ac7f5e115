"""`-m`: one process for each combination of swept values, each with a run folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf

from launch.composition import compose as configs
from launch.composition import registry
from launch.composition.secrets import without_secrets
from launch.composition.written_text import quoted_text


def plan_jobs(command: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job; every one is composed, so that mistakes show before the first job starts.

    Sweeps use Hydra's grammar (`key=1,2`, `key=range(1,4)`, `group=glob(*)`). Job n writes to
    `<run folder>/multirun/<n>` where the command has a run folder.
    """
    schema = registry.load_command(command).Config
    parsed = [
        configs.parse_override(text if "," in text or "(" in text else quoted_text(schema, text)) for text in overrides
    ]
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    jobs = []
    for index, combination in enumerate(combinations):
        tree = configs.compose_tree(command, list(combination))
        run_folder = OmegaConf.select(tree, "run_folder")
        own = [f"run_folder='{run_folder}/multirun/{index:03d}'"] if run_folder else []
        jobs.append(list(combination) + own)
    return jobs


def run_all(command: str, jobs: list[list[str]], *, as_json: bool) -> int:
    """Runs the jobs one after another, or submits them all; the exit code is the highest of theirs.

    A sweep of stages ends with a table and a page of the loss curves; on a cluster a last job makes them.
    """
    if command == "submit":
        results = [submit_job(index, job, as_json) for index, job in enumerate(jobs)]
    else:
        results = [run_job(command, index, job, as_json) for index, job in enumerate(jobs)]
    answer: dict[str, Any] = {"jobs": results}
    if command == "train" or "job_ids" in results[0]:
        answer |= finish_sweep(command, jobs, results)
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    elif "sweep" in answer:
        from launch.report import sweep

        print(f"{sweep.table(answer['sweep'])}\npage: {answer['page']}")
    return max((int(result["exit_code"]) for result in results), default=0)


def finish_sweep(command: str, jobs: list[list[str]], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of what there is now. Where jobs are still queued, another one is to write it after them."""
    from launch.report import sweep

    folder = sweep.record_sweep(command, jobs)
    waiting = [job_id for result in results for job_id in result.get("job_ids", [])]
    answer: dict[str, Any] = {"page": str(folder / sweep.PAGE_NAME)}
    if waiting:
        config = configs.compose_config(command, jobs[0])
        answer["summary_job_id"] = registry.load_command(command).submit_sweep_summary(config, folder, waiting)
    return answer | {"sweep": sweep.publish_sweep(folder)}


def submit_job(index: int, overrides: list[str], as_json: bool) -> dict[str, Any]:
    """Submit in this process; `job_ids` holds the job unless the stage is finished, and is missing in a dry run."""
    submit = registry.load_command("submit")
    shown = without_secrets(overrides)
    print(f"job {index}: nextstate submit {' '.join(shown)}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"job": index, "overrides": shown, "exit_code": 0}
    answer = submit.run(configs.compose_config("submit", overrides))
    if submit.is_dry(answer):
        print("" if as_json else answer["script"], end="")
    else:
        result["job_ids"] = [answer["job_id"]] if answer.get("state") in ("queued", "running") else []
    return result | {"answer": answer, "exit_code": int(answer.get("exit_code", 0))}


def run_job(command: str, index: int, overrides: list[str], as_json: bool) -> dict[str, Any]:
    shown = without_secrets(overrides)
    print(f"job {index}: nextstate {command} {' '.join(shown)}", file=sys.stderr, flush=True)
    arguments = [sys.executable, "-m", "launch.command_line.cli", command, *overrides]
    finished = subprocess.run(arguments, stdout=subprocess.PIPE if as_json else None, check=False)
    result: dict[str, Any] = {"job": index, "overrides": shown, "exit_code": finished.returncode}
    if as_json:
        text = finished.stdout.decode().strip()
        result["answer"] = json.loads(text) if text else None
    return result
