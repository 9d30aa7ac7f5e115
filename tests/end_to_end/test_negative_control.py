"""The toy figures come from joining words with pictures: with captions shuffled there is nothing to learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("cell_world.py")


def start(folder: Path, captions: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "NEXTSTATE_RENDEZVOUS_FILE": str(folder / "rendezvous"),
    }
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder / "run"), captions],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_training_on_shuffled_captions_fails_the_judge(tmp_path):
    runs = {captions: start(tmp_path / captions, captions) for captions in ("true", "shuffled")}
    accuracy = {}
    for captions, process in runs.items():
        answer, _ = process.communicate()
        assert process.returncode == 0, captions
        accuracy[captions] = json.loads(answer)["t2i"]
    assert accuracy["true"] >= 0.85
    assert accuracy["shuffled"] <= 0.15
