"""A rank environment that another launcher left behind: told at once, before a rank waits for others that never come."""

from __future__ import annotations

from collections.abc import Mapping

from model.errors import UserError
from model.parallel.groups import RENDEZVOUS_VARIABLE
from training.config import TrainConfig

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


def refuse_left_environment(config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Raises `UserError` unless the variables of this rank describe ranks of this stage's layout."""
    expected = config.parallel.world_size
    problem = problem_of(environment, expected)
    if problem:
        found = {name: environment[name] for name in NAMES if name in environment}
        raise UserError(
            f"the environment says that this process is one rank of several, but {problem}",
            where=" ".join(f"{name}={value}" for name, value in found.items()),
            expected=f"{expected} ranks, as parallel.tensor * pipeline * context * data",
            fix="env " + " ".join(f"-u {name}" for name in found) + " nextstate ... starts the ranks itself; "
            f"or torchrun --nproc-per-node={expected} of this layout",
        )


def refuse_tasks_without_ranks(environment: Mapping[str, str]) -> None:
    """Raises `UserError` where srun started several copies of this command: each would start all ranks of its own."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} copies of this command, and none of them is told to be a rank (RANK, WORLD_SIZE)",
            where=f"SLURM_PROCID={environment['SLURM_PROCID']} SLURM_STEP_NUM_TASKS={tasks}",
            expected="one process, which starts the ranks of this machine itself",
            fix="nextstate submit cluster=NAME ... runs a stage on a cluster; srun --ntasks=1 here",
        )


def problem_of(environment: Mapping[str, str], expected: int) -> str:
    """Empty when these variables can be meant for this stage."""
    numbers = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    for name, text in numbers.items():
        if not text.isdigit():
            return f"{name} is {text!r}" if text else f"{name} is missing"
    rank, world_size = int(numbers["RANK"]), int(numbers["WORLD_SIZE"])
    if world_size != expected:
        return f"WORLD_SIZE is {world_size} and the layout has {expected}"
    if rank >= world_size:
        return f"RANK is {rank} of {world_size}"
    if world_size > 1 and "MASTER_ADDR" not in environment and RENDEZVOUS_VARIABLE not in environment:
        return "MASTER_ADDR is missing: nobody says where the ranks meet"
    return ""
