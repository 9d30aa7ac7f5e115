"""Runs the fake stage in forked processes that are killed with -9, again and again, until one gets to the end.

    python kill_host.py RUN_FOLDER SEED own|outside

own: the process kills itself when it enters a phase, the phase counted at random, so parts of the checkpoint's
transaction are hit as often as steps. outside: this process kills it after a random time. Prints one JSON object:
{"num_kills", "phases"}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import torch
from fake_objective import fake_config

from training import stage
from training.reliability.watchdog import Heartbeat

MAX_KILLS = 12
PHASES_NAME = "phases.txt"


def kill_in_phase(number: int, prefix: str) -> None:
    """Let this process enter `number` phases whose name starts with `prefix`; the last one is its end."""
    original = Heartbeat.enter
    count = 0

    def enter(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
        nonlocal count
        original(heartbeat, phase, step)
        count += phase.startswith(prefix)
        if count == number and phase.startswith(prefix):
            with open(heartbeat.folder / PHASES_NAME, "a") as file:
                file.write(phase + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    Heartbeat.enter = enter  # type: ignore[method-assign]


def run_child(config: stage.TrainConfig, kill: tuple[int, str] | None) -> None:
    if kill is not None:
        kill_in_phase(*kill)
    stage.run_stage(config)
    os._exit(0)


def main(run_folder: str, seed: int, mode: str) -> None:
    torch.set_num_threads(1)
    config = fake_config(run_folder, bad_samples=[32, 36, 40, 44])
    config.checkpoint.every_steps = 2
    draw = random.Random(seed)
    num_kills = 0
    while True:
        is_last = num_kills == MAX_KILLS
        kill = draw.choice([(draw.randint(1, 60), ""), (draw.randint(1, 12), "checkpoint")])
        process = os.fork()
        if process == 0:
            try:
                run_child(config, kill if mode == "own" and not is_last else None)
            finally:
                os._exit(1)
        if mode == "outside" and not is_last:
            time.sleep(draw.uniform(0.01, 0.25))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            num_kills += 1
            continue
        assert os.WEXITSTATUS(status) == 0
        break
    path = config.stage_folder / "heartbeats" / PHASES_NAME
    phases = path.read_text().splitlines() if path.exists() else []
    print(json.dumps({"num_kills": num_kills, "phases": phases}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
