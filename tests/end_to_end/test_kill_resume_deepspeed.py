"""kill -9 of training ranks under engine=deepspeed: the final state is bitwise that of an unbroken run.

Compilers are replaced by a script that notes the call and fails: DeepSpeed would build its extensions at the start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_stage import write_packed

HERE = Path(__file__).resolve().parent


def test_killed_runs_end_bitwise_equal(tmp_path: Path) -> None:
    packed = write_packed(tmp_path / "data")
    calls, tools = tmp_path / "calls", tmp_path / "tools"
    tools.mkdir()
    for name in ("ninja", "g++", "c++", "gcc", "cc"):
        (tools / name).write_text(f'#!/bin/sh\necho "$0 $*" >>{calls}\nexit 1\n')
        (tools / name).chmod(0o755)
    paths = [str(path) for path in (HERE.parent.parent, HERE.parent)]
    answer = subprocess.run(
        [sys.executable, HERE / "deepspeed_kill_host.py", tmp_path, packed],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"),
        }
        | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert not calls.exists(), calls.read_text()
    cases = json.loads(answer.stdout.splitlines()[-1])
    assert len(cases) == 4
    for case in cases:
        for rank in range(2):
            path = f"tiny/checkpoints/step_00000006/rank_{rank:05d}.safetensors"
            left, right = load_file(tmp_path / case / "one" / path), load_file(tmp_path / case / "two" / path)
            assert left.keys() == right.keys()
            assert any(key.startswith("optimizer/exp_avg_sq/") for key in left)
            for key, value in left.items():
                assert torch.equal(value, right[key]), (case, key)
