"""Runs the tiny world's stage in forked processes that kill themselves with -9, each going on where the last one died.

python rl_kill_host.py FOLDER: a run without interruption in FOLDER/never, and one killed at each of `MOMENTS` in
FOLDER/killed. Prints {process: times that it asked the reward}; "end" is the process that was left alive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rl_world import Bright, rl_config, write_tokenizer

from training import stage
from training.engines.megatron.engine import MegatronEngine
from training.objectives.grpo.bank import Bank

NUM_STEPS, CHECKPOINT_EVERY = 4, 3  # two rollouts of two updates; the checkpoint is between the updates of the second
SECOND_ROLLOUT = 2, "round_0"  # a rollout has the number of its first step
# The last act of a process: (class, method, its first arguments or None, its call with them, does it die before it?)
MOMENTS: dict[str, tuple[Any, str, tuple[Any, ...], int, bool]] = {
    "before_the_bank": (Bank, "write", SECOND_ROLLOUT, 1, True),
    "behind_the_bank": (Bank, "write", SECOND_ROLLOUT, 1, False),
    "in_the_second_update": (MegatronEngine, "optimizer_step", (), 4, True),
}


def dying(
    function: Callable[..., Any], chosen: tuple[Any, ...], number: int, die: Callable[[], None], *, before: bool
) -> Callable[..., Any]:
    """`function`, whose call `number` with arguments that begin with `chosen` is this process's last act."""
    count = 0

    def call(owner: Any, *arguments: Any) -> Any:
        nonlocal count
        count += arguments[: len(chosen)] == chosen
        if before and count == number:
            die()
        found = function(owner, *arguments)
        if count == number:
            die()
        return found

    return call


def child(folder: Path, tokenizer: Path, moment: str) -> int:
    """Forks; the wait status. The child writes how often it asked the reward."""
    process = os.fork()
    if process == 0:

        def tell() -> None:
            (folder / f"{moment}.txt").write_text(str(Bright.num_calls))

        def die() -> None:
            tell()
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            if moment in MOMENTS:
                owner, name, chosen, number, before = MOMENTS[moment]
                setattr(owner, name, dying(getattr(owner, name), chosen, number, die, before=before))
            config = rl_config(tokenizer, folder, updates=2)
            config.stage.steps, config.checkpoint.every_steps = NUM_STEPS, CHECKPOINT_EVERY
            stage.run_stage(config)
            tell()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = write_tokenizer(root)
    never, killed = root / "never", root / "killed"
    for folder in (never, killed):
        folder.mkdir()
    assert child(never, tokenizer, "never") == 0
    for moment in MOMENTS:
        assert os.WIFSIGNALED(child(killed, tokenizer, moment)), moment
    assert child(killed, tokenizer, "end") == 0
    print(json.dumps({path.stem: int(path.read_text()) for path in root.glob("*/*.txt")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
