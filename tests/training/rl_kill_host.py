"""Runs the tiny world's stage in forked processes that kill themselves with -9 at given moments, then once more each.

python rl_kill_host.py FOLDER: below FOLDER a run folder for each of `MOMENTS`. Prints {moment: times that the second
process asked the reward}.
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

# moment -> (class, method, its call that is the last act of the process, dies before it)
MOMENTS: dict[str, tuple[Any, str, int, bool] | None] = {
    "never": None,
    "before_the_bank": (Bank, "write", 5, True),
    "behind_the_bank": (Bank, "write", 5, False),
    "in_the_second_update": (MegatronEngine, "optimizer_step", 4, True),
}


def dying(function: Callable[..., Any], number: int, *, before: bool) -> Callable[..., Any]:
    """`function`, whose call `number` is this process's last act."""
    count = 0

    def call(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if before and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*arguments)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call


def child(folder: Path, tokenizer: Path, moment: str, *, dies: bool) -> int:
    """Forks; the wait status. The child writes how often it asked the reward."""
    process = os.fork()
    if process == 0:
        try:
            plan = MOMENTS[moment]
            if dies and plan is not None:
                owner, name, number, before = plan
                setattr(owner, name, dying(getattr(owner, name), number, before=before))
            config = rl_config(tokenizer, folder, updates=2)
            config.stage.steps, config.checkpoint.every_steps = 6, 3  # a checkpoint between two updates of a rollout
            stage.run_stage(config)
            (folder / "calls.txt").write_text(str(Bright.num_calls))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = write_tokenizer(root)
    calls = {}
    for moment in MOMENTS:
        folder = root / moment
        folder.mkdir()
        if MOMENTS[moment] is not None:
            assert os.WIFSIGNALED(child(folder, tokenizer, moment, dies=True)), moment
        assert child(folder, tokenizer, moment, dies=False) == 0, moment
        calls[moment] = int((folder / "calls.txt").read_text())
    print(json.dumps(calls))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
