"""Submissions of a small stage over two nodes, fake or real, and what to look at afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from slow_stage import CRASH_AT, STEP_SECONDS
from slurm_cluster import SlurmCluster, wait_until
from tiny_stage import shrink

from launch.cluster.job_folders import JobFolder
from launch.commands import submit

HERE = Path(__file__).resolve().parent
SEARCH_PATH = [HERE, HERE.parent / "training"]
STEPS = 40


def fake_submission(run_folder: Path, *, step_seconds: float = 0.0, num_ranks: int = 2) -> submit.Config:
    """One rank a node; a checkpoint every five steps."""
    config = submit.Config(name="test", run_folder=str(run_folder))
    config.stage.name = "fake"
    config.stage.steps, config.stage.global_batch_size = STEPS, 4
    config.stage.optimizer.learning_rate = 0.01
    config.stage.objective = {"name": "slurm_objective.SlurmObjective", "step_seconds": step_seconds}
    config.checkpoint.every_steps = 5
    config.logging.wandb_mode = "disabled"
    config.parallel.data = num_ranks
    use_test_cluster(config.cluster)
    return config


def real_submission(run_folder: Path, packed: Path, *, step_seconds: float = 0.0, crash_at: int = 0) -> submit.Config:
    """The tiny stage of the real engine, data parallel over two nodes."""
    config = submit.Config(name="test", run_folder=str(run_folder))
    shrink(config, packed)
    config.engine = "slow_stage.SlowEngine"
    config.stage.steps, config.checkpoint.every_steps = STEPS, 5
    use_test_cluster(config.cluster)
    config.cluster.environment |= {STEP_SECONDS: str(step_seconds), CRASH_AT: str(crash_at)}
    return config


def use_test_cluster(cluster: Any) -> None:
    cluster.kind, cluster.gres, cluster.exclusive = "slurm", "", False
    cluster.tasks_per_node, cluster.cpus_per_task = 1, 1
    cluster.time_limit, cluster.signal_seconds = "10", 5
    cluster.network_interface = "lo"
    cluster.environment = {"PYTHONPATH": ":".join(map(str, SEARCH_PATH)), "PYTHONWARNINGS": "ignore"}


def last_step(run_folder: Path, stage: str = "fake") -> int:
    path = run_folder / stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0


def wait_for_step(run_folder: Path, step: int, stage: str = "fake") -> None:
    wait_until(lambda: last_step(run_folder, stage) >= step, f"step {step} of {run_folder}")


def log_of(run_folder: Path, name: str = "fake") -> str:
    return "\n".join(path.read_text() for path in JobFolder(run_folder, name).logs())


def wait_for_log(run_folder: Path, text: str, name: str = "fake") -> None:
    wait_until(lambda: text in log_of(run_folder, name), f"{text!r} in the log of {run_folder}")


def assert_completed(cluster: SlurmCluster, job_id: str, run_folder: Path, name: str = "fake") -> None:
    assert cluster.wait_for_end(job_id, 90) == "COMPLETED", log_of(run_folder, name)[-3000:]


def assert_same_weights(one: Path, other: Path, steps: int = STEPS) -> None:
    """Of two stage folders, after the last step."""
    folder = f"checkpoints/step_{steps:08d}"
    files = sorted(path.name for path in (one / folder).glob("*.safetensors"))
    assert files
    assert files == sorted(path.name for path in (other / folder).glob("*.safetensors"))
    for name in files:
        left, right = load_file(one / folder / name), load_file(other / folder / name)
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), (name, key)
