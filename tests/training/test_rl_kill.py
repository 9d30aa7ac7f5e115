"""kill -9 anywhere in a step of reinforcement learning: the same weights in the end, and no answer judged twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def test_killed_steps_are_done_again_bit_for_bit(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, HERE / "rl_kill_host.py", tmp_path],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    unbroken, found = (
        load_file(tmp_path / name / "rl/checkpoints/step_00000004/rank_00000.safetensors")
        for name in ("never", "killed")
    )
    assert found.keys() == unbroken.keys()
    for key, value in unbroken.items():
        assert torch.equal(value, found[key]), key
    lines = (tmp_path / "killed/rl/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    calls = json.loads(answer.stdout.splitlines()[-1])
    # What died before it was banked is asked again by the next process, and nothing else is.
    assert calls["behind_the_bank"] == 1
    assert calls.pop("never") + 1 == sum(calls.values())
    assert calls["end"] == 0
