"""The fake objective of `tests/training`, as the ranks of a Slurm job run it: they meet over gloo, steps take time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from fake_objective import SHAPE, FakeEngine, FakeObjective

from training.config import TrainConfig
from training.contracts.engine import StepSums
from training.contracts.shards import Shard


class MeetingEngine(FakeEngine):
    """Every rank has the whole model and owns its rows of it; the ranks agree over gloo."""

    def __init__(self, seed: int, step_seconds: float, crash_at: int):
        distributed.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=60))
        super().__init__(seed)
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        # Slow enough to be interrupted; once queued again there is nothing to wait for.
        is_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        self.step_seconds, self.steps_to_crash = step_seconds if is_first else 0.0, crash_at

    def forward_backward(self, batches: Sequence[Any], objective: FakeObjective) -> StepSums:
        time.sleep(self.step_seconds)
        self.steps_to_crash -= 1
        if self.steps_to_crash == 0:
            os._exit(9)
        return super().forward_backward(batches, objective)

    def _shards(self, key: str, tensor: torch.Tensor) -> list[Shard]:
        rows = SHAPE[0] // self.world_size
        piece = tensor[self.rank * rows : (self.rank + 1) * rows]
        return [Shard(key, piece, SHAPE, (self.rank * rows, 0))]

    def any_rank(self, flag: bool) -> bool:
        flags = torch.tensor([int(flag)])
        distributed.all_reduce(flags)
        return bool(flags.item())

    def gather(self, payload: bytes) -> list[bytes]:
        found: list[Any] = [None] * self.world_size
        distributed.all_gather_object(found, payload)
        return found

    def barrier(self) -> None:
        distributed.barrier()

    def close(self) -> None:
        distributed.destroy_process_group()


class SlurmObjective(FakeObjective):
    """`stage.objective=slurm_objective.SlurmObjective`."""

    @dataclass
    class Options(FakeObjective.Options):
        step_seconds: float = 0.0
        crash_at: int = 0

    engine = "slurm_objective.EngineOfAJob"


class EngineOfAJob:
    """What `engine` names: calling it makes a `MeetingEngine`."""

    def __new__(cls, config: TrainConfig, objective: SlurmObjective) -> MeetingEngine:  # type: ignore[misc]
        engine = MeetingEngine(config.seed, objective.options.step_seconds, objective.options.crash_at)
        assert os.environ["RANK"] == str(engine.rank)
        return engine
