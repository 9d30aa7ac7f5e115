"""`nextstate train` with the real engine on two processes: interrupted runs end bitwise as an unbroken one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_stage import STEPS, make_config, write_packed

from training.config import TrainConfig, save_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys
from launch.commands.train import run
from training.config import load_yaml
print(json.dumps(run(load_yaml(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


def start(config: TrainConfig) -> subprocess.Popen:
    folder = Path(config.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_yaml(config, folder / "train.yaml")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "train.yaml")],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=open(folder / "stderr.txt", "ab"),
        text=True,
    )


def finish(process: subprocess.Popen, config: TrainConfig) -> dict:
    answer, _ = process.communicate(timeout=200)
    messages = (Path(config.run_folder) / "stderr.txt").read_text()
    assert process.returncode == 0, messages[-3000:]
    return json.loads(answer)


def wait_for_step(process: subprocess.Popen, config: TrainConfig, step: int) -> None:
    """Until the metrics say that `step` is done."""
    path = config.stage_folder / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None, (Path(config.run_folder) / "stderr.txt").read_text()[-3000:]
        time.sleep(0.005)


def test_killed_and_stopped_run_ends_bitwise_equal(tmp_path, packed):
    unbroken = make_config(tmp_path / "one", packed)
    summary = finish(start(unbroken), unbroken)
    assert (summary["steps"], summary["data"]) == (STEPS, 2)

    broken, draw = make_config(tmp_path / "two", packed), random.Random(3)
    process = start(broken)
    wait_for_step(process, broken, draw.randint(3, 6))
    worker = draw.choice(psutil.Process(process.pid).children())
    worker.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in (tmp_path / "two/stderr.txt").read_text()

    process = start(broken)
    wait_for_step(process, broken, draw.randint(7, 9))
    process.send_signal(signal.SIGTERM)
    answer, _ = process.communicate(timeout=60)
    assert (process.returncode, answer) == (3, "")

    assert finish(start(broken), broken)["loss_last"] == summary["loss_last"]
    for name in ("rank_00000.safetensors", "rank_00001.safetensors"):
        path = f"tiny/checkpoints/step_{STEPS:08d}/{name}"
        left, right = load_file(tmp_path / "one" / path), load_file(tmp_path / "two" / path)
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), key
