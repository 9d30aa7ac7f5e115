"""Real jobs on a real Slurm: whatever interrupts them, they end with the weights of an unbroken run, bit for bit.

The engine is the real one. The interruptions happen to six jobs at once, each followed by a thread of its own; most of the time is waiting.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_cluster import SlurmCluster, wait_until
from slurm_runs import assert_same_weights, last_step, log_of, real_submission, wait_for_step
from tiny_stage import write_packed

from launch.cluster.job_folders import JobFolder
from launch.commands import submit

STAGE = "tiny"
STEP_SECONDS = 0.25
# Of the jobs that lose a node or its daemon.
OWN_NODES = {"lost node": "node05,node06", "killed slurmd": "node07,node08"}


def submit_and(slurm: SlurmCluster, folder: Path, packed: Path, interrupt: Callable[..., None], changes: dict) -> Path:
    cluster = {"exclude": ",".join(OWN_NODES.values())} | changes
    step_seconds = cluster.pop("step_seconds", STEP_SECONDS)
    config = real_submission(folder, packed, step_seconds=step_seconds)
    vars(config.cluster).update(cluster)
    answer = submit.run(config)
    assert answer["submitted"], answer
    interrupt(slurm, answer["job_id"], folder)
    assert slurm.see_through(answer["job_id"]) == "COMPLETED", log_of(folder, STAGE)[-4000:]
    return folder


def send_usr1(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    wait_for_step(folder, 7, STAGE)
    slurm.call("scancel", "--signal=USR1", job_id)


def reach_time_limit(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    """Slurm looks at the limits twice a minute; the signal comes 63 to 91 seconds after the start."""
    wait_until(lambda: "asks to be queued again" in log_of(folder, STAGE), "the signal before the time limit", 180)


def requeue(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    wait_for_step(folder, 7, STAGE)
    slurm.call("scontrol", "requeue", job_id)


def lose_node(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    wait_for_step(folder, 7, STAGE)
    slurm.kill_node("node06")
    wait_until(lambda: slurm.job(job_id)["JobState"] == "PENDING", "the job to be queued again")
    slurm.revive_node("node06")


def lose_slurmd(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    wait_for_step(folder, 7, STAGE)
    slurm.kill_slurmd("node08")
    wait_until(lambda: slurm.job(job_id)["JobState"] == "PENDING", "the job to be queued again")
    slurm.revive_node("node08")


def kill_rank(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    wait_for_step(folder, 7, STAGE)
    ranks = [
        process
        for process in psutil.process_iter()
        if "launch.cluster.rank" in (line := command_line(process)) and str(folder) in line and "srun" not in line
    ]
    assert len(ranks) == 2
    random.choice(ranks).kill()


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def leave_alone(slurm: SlurmCluster, job_id: str, folder: Path) -> None:
    pass


INTERRUPTIONS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "usr1": (send_usr1, {}),
    "time limit": (
        reach_time_limit,
        {"time_limit": "2", "signal_seconds": 30, "max_restarts": 20, "step_seconds": 2.5},
    ),
    "requeue": (requeue, {}),
    "killed rank": (kill_rank, {}),
} | {
    name: (interrupt, {"exclude": "", "options": {"nodelist": OWN_NODES[name]}})
    for name, interrupt in (("lost node", lose_node), ("killed slurmd", lose_slurmd))
}


@pytest.fixture(scope="module")
def runs(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future]:
    """Folders of all runs by name; all jobs are in the queue at once."""
    packed = write_packed(tmp_path_factory.mktemp("packed"))
    everything = INTERRUPTIONS | {"unbroken": (leave_alone, {"step_seconds": 0.0})}
    with ThreadPoolExecutor(len(everything) + 1) as pool:
        futures = {
            name: pool.submit(submit_and, slurm, tmp_path_factory.mktemp("run"), packed, interrupt, changes)
            for name, (interrupt, changes) in everything.items()
        }
        return futures | {"crashing": pool.submit(submit_crashing, slurm, tmp_path_factory.mktemp("run"), packed)}


@pytest.fixture(scope="module")
def unbroken(runs: dict[str, Future]) -> Path:
    return runs["unbroken"].result()


def submit_crashing(slurm: SlurmCluster, folder: Path, packed: Path) -> Path:
    """A stage that ends itself before its first checkpoint, whenever it is started."""
    config = real_submission(folder, packed, crash_at=3)
    config.cluster.max_restarts, config.cluster.exclude = 1, ",".join(OWN_NODES.values())
    answer = submit.run(config)
    assert slurm.see_through(answer["job_id"]) == "FAILED"
    return folder


def test_a_stage_over_two_nodes_trains(unbroken):
    assert "starts at 0 on node" in log_of(unbroken, STAGE)
    assert (unbroken / STAGE / "summary.json").exists()
    assert JobFolder(unbroken, STAGE).num_restarts() == 0


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_the_unbroken_one(runs, unbroken, name):
    folder = runs[name].result()
    assert_same_weights(unbroken / STAGE, folder / STAGE)
    assert JobFolder(folder, STAGE).num_restarts() >= 1
    steps = [
        line.split('"step": ')[1].split(",")[0] for line in (folder / STAGE / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [str(step) for step in range(1, last_step(folder, STAGE) + 1)]


def test_a_rank_that_had_got_on_is_started_again_on_the_spot(runs):
    folder = runs["killed rank"].result()
    log = log_of(folder, STAGE)
    assert ": Killed" in log
    # srun tells the highest of its ranks' codes: 143, if Slurm ended the other one before that heard of its peer.
    assert re.search(r"ended with (137|143) at [5-9]\n.*: starts at [5-9] on ", log), log
    assert "asks to be queued again" not in log


def test_a_job_that_never_gets_on_stops(runs):
    folder = runs["crashing"].result()
    assert "ended with 9 at 0" in log_of(folder, STAGE)
    assert "stops: no progress beyond 0 in 2 starts in a row" in log_of(folder, STAGE)
    assert JobFolder(folder, STAGE).num_restarts() == 1
