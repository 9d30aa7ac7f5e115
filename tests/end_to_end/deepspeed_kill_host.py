"""Runs tiny stages under engine=deepspeed in forked ranks, unbroken and killed with -9; all imports are paid once.

    python deepspeed_kill_host.py FOLDER PACKED

Each case runs in FOLDER/NAME/one without a break, and in FOLDER/NAME/two where rank 1 kills itself when it enters a
phase, the phase counted at random, and the other rank is killed after it. Prints one JSON object: the phases by case.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import torch
from tiny_stage import make_config

import training.engines.deepspeed.engine  # noqa: F401 (paid once, before the forks)
from model.parallel.groups import RENDEZVOUS_VARIABLE
from training import stage
from training.config import TrainConfig
from training.reliability.watchdog import Heartbeat

STEPS, NUM_KILLS = 6, 1
CASES = {"zero_1": (1, "none"), "zero_1_offload": (1, "cpu"), "zero_3": (3, "none"), "zero_3_offload": (3, "cpu")}


def config_of(case: str, folder: Path, packed: Path) -> TrainConfig:
    config = make_config(folder, packed)
    config.engine = "deepspeed"
    config.stage.steps, config.checkpoint.every_steps = STEPS, 2
    config.deepspeed.zero_stage, config.deepspeed.offload_optimizer = CASES[case]
    config.deepspeed.persistent_elements = config.deepspeed.live_elements = 0
    return config


def kill_in_phase(number: int) -> None:
    """Let this process die when it enters its `number`-th phase after the first step."""
    original, count = Heartbeat.enter, 0

    def enter(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
        nonlocal count
        original(heartbeat, phase, step)
        count += count > 0 or phase.startswith("optimizer")
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Heartbeat.enter = enter  # type: ignore[method-assign]


def run_ranks(config: TrainConfig, kill: int | None) -> bool:
    """True when both ranks got to the end; the second one dies in phase `kill`, and the first one then."""
    stage.validate(config)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ[RENDEZVOUS_VARIABLE] = f"{folder}/store"
                status = 1
                try:
                    if kill is not None and rank == 1:
                        kill_in_phase(kill)
                    stage.run_stage(config)
                    status = 0
                finally:
                    os._exit(status)
            ranks.append(process)
        _, status = os.waitpid(ranks[1], 0)
        if os.WIFSIGNALED(status):
            os.kill(ranks[0], signal.SIGKILL)
        _, other = os.waitpid(ranks[0], 0)
    assert os.WIFSIGNALED(status) or (status, other) == (0, 0), f"ranks ended with {status} and {other}"
    return not os.WIFSIGNALED(status)


def main(folder: str, packed: str) -> None:
    torch.set_num_threads(1)
    draw, phases = random.Random(7), {}
    for case in CASES:
        unbroken, broken = (config_of(case, Path(folder) / case / name, Path(packed)) for name in ("one", "two"))
        assert run_ranks(unbroken, None)
        phases[case] = []
        for _ in range(NUM_KILLS):
            kill = draw.randint(4, 20)
            assert not run_ranks(broken, kill), f"{case}: the end came before phase {kill}"
            phases[case].append(kill)
        assert run_ranks(broken, None)
    print(json.dumps(phases))


if __name__ == "__main__":
    main(*sys.argv[1:])
