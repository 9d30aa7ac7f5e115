"""kill -9 of real processes at many moments; the final weights are bitwise those of an unbroken run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.metrics import MACHINE_KEYS

HERE = Path(__file__).resolve().parent


def play(folder: Path, seed: int, mode: str) -> dict:
    answer = subprocess.run(
        [sys.executable, HERE / "kill_host.py", folder, str(seed), mode],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert play(folder, 0, "never")["num_kills"] == 0
    return folder / "fake"


def assert_same_end(one: Path, other: Path) -> None:
    name = "checkpoints/step_00000020/rank_00000.safetensors"
    left, right = load_file(one / name), load_file(other / name)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key
    strip = lambda path: [  # noqa: E731
        json.loads(line) | dict.fromkeys(MACHINE_KEYS) for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    assert strip(one) == strip(other)
    leftovers = [path.name for path in (other / "checkpoints").iterdir() if path.name[0] == "."]
    assert leftovers == []


@pytest.mark.parametrize("seed", range(2))
def test_killed_in_every_phase(tmp_path, unbroken, seed):
    outcome = play(tmp_path, seed, "own")
    assert outcome["num_kills"] >= 3
    assert_same_end(unbroken, tmp_path / "fake")


def test_killed_from_outside(tmp_path, unbroken):
    outcome = play(tmp_path, 9, "outside")
    assert outcome["num_kills"] >= 1
    assert_same_end(unbroken, tmp_path / "fake")
