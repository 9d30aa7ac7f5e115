"""Jobs that cannot work, each as its own command: exit code 2, nothing started, nothing left behind, how long it took.

    python -m benchmarks.impossible

Every command runs in an interpreter of its own that notes each process it starts (an audit hook); looking at the accelerators with
nvidia-smi is allowed. Run it on a machine without accelerators: what `train` refuses there is that machine's. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 3.0
ROOT = Path(__file__).resolve().parents[1]
EMU = ("model=emu35_34b", "stage=pretrain_1")
SLURM = ("submit", "cluster=slurm", *EMU)
ONE_NODE = ("parallel.pipeline=1", "parallel.data=1")
TOY = ("train", "stage=toy_pretrain_1")
FOREIGN_RANKS = {"RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.1", "SLURM_JOB_ID": "77"}
KINDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "34B on a laptop, 16 ranks": (("train", *EMU, *ONE_NODE), {}),
    "34B on a laptop, as shipped": (("train", *EMU), {}),
    "34B in one process": (("train", *EMU, *ONE_NODE, "parallel.tensor=1", "parallel.context=1"), {}),
    "years of a laptop": (("train", "model=300m", "stage=toy_pretrain_1", "stage.steps=90000000"), {}),
    "rows too long for a laptop": ((*TOY, "model.max_sequence_length=1048576", "stage.sequence_length=1048576"), {}),
    "no packed rows": (TOY, {}),
    "nothing to start from": (("train", "stage=toy_sft", "parallel.data=1"), {}),
    "ranks that another launcher left": (TOY, FOREIGN_RANKS),
    "copies that srun started": (TOY, {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16"}),
    "a key that nothing reads": ((*TOY, "stage.learning_rate=0.1"), {}),
    "a preset that does not exist": (("train", "stage=toy_pretrain_9"), {}),
    "two nodes for thousands of days": ((*SLURM, *ONE_NODE), {}),
    "no recomputation": ((*SLURM, "parallel.recompute=none"), {}),
    "more ranks than accelerators": ((*SLURM, "cluster.num_accelerators=64"), {}),
    "small accelerators": ((*SLURM, "cluster.device=a100_40gb"), {}),
    "many rows at once": ((*SLURM, "stage.micro_batch_size=7"), {}),
    "an optimizer that is not sharded": ((*SLURM, "parallel.distributed_optimizer=false"), {}),
    "no tensor parallelism": ((*SLURM, "parallel.tensor=1", "parallel.data=224"), {}),
    "sixteen times the steps": ((*SLURM, "stage.steps=11200000"), {}),
    "an unknown device": ((*SLURM, "cluster.device=h1000"), {}),
    "an illegal layout": ((*SLURM, "parallel.tensor=3"), {}),
    "rows longer than the model reads": ((*SLURM, "stage.sequence_length=65536"), {}),
    "a curriculum on a laptop": (("curriculum", "curriculum=emu35"), {}),
    "a curriculum on a small cluster": (
        ("curriculum", "curriculum=emu35", "cluster=slurm", "cluster.num_accelerators=256"),
        {},
    ),
}
# Notes in the file NOTES every process that the command starts, then is the command.
HOST = """
import os, sys
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec"}
def note(event, arguments):
    if event in STARTS and "nvidia-smi" not in str(arguments[:2]):
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{event} {arguments[:2]}\\n")
sys.addaudithook(note)
from launch.command_line.cli import main
sys.exit(main())
"""


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tried(overrides: tuple[str, ...], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The outcome of one command whose run folder would be below `folder`."""
    notes = folder / "notes"
    command = [sys.executable, "-c", HOST, *overrides, f"run_folder={folder / 'run'}"]
    variables = os.environ | environment | {"NOTES": str(notes)}
    started, cpu_before = time.monotonic(), cpu_seconds_of_children()
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    return {
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(cpu_seconds_of_children() - cpu_before, 2),
        "started": notes.read_text().splitlines() if notes.exists() else [],
        "left_behind": [path.name for path in folder.iterdir() if path != notes],
        "message": next((line for line in done.stderr.splitlines() if line.strip()), ""),
    }


def main() -> None:
    outcomes = {}
    for name, (overrides, environment) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = tried(overrides, environment, Path(folder))
    refused = [one["exit_code"] == 2 and not one["started"] and not one["left_behind"] for one in outcomes.values()]
    answer = {
        "kinds": len(outcomes),
        "refused": sum(refused),
        "within_limit": sum(one["seconds"] < LIMIT_SECONDS for one in outcomes.values()),
        "slowest_seconds": max(one["seconds"] for one in outcomes.values()),
        "slowest_cpu_seconds": max(one["cpu_seconds"] for one in outcomes.values()),
        "outcomes": outcomes,
    }
    print(json.dumps(answer, indent=1))
    sys.exit(0 if all(refused) else 1)


if __name__ == "__main__":
    main()
