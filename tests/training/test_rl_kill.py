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


def test_a_killed_step_is_done_again_bit_for_bit(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, HERE / "rl_kill_host.py", tmp_path],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    calls = json.loads(answer.stdout.splitlines()[-1])
    unbroken = load_file(tmp_path / "never/rl/checkpoints/step_00000006/rank_00000.safetensors")
    for moment in calls:
        found = load_file(tmp_path / moment / "rl/checkpoints/step_00000006/rank_00000.safetensors")
        assert found.keys() == unbroken.keys()
        for key, value in unbroken.items():
            assert torch.equal(value, found[key]), (moment, key)
        lines = (tmp_path / moment / "rl/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    # Three rollouts of one round or two; what is banked is not asked for again.
    assert calls["behind_the_bank"] < calls["before_the_bank"] < calls["never"]
