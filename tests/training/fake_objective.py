"""A fake objective and engine: a small linear model, deterministic and fast, for the logic around them.

They are classes of a user's own as far as the product can tell. The objective's options steer faults: `bad_samples`
(batches starting there give NaN), `spiking_samples` (huge gradients), `empty_samples` (nothing to learn from),
`poisoning_samples` (the update leaves a NaN in the weights), `changed_data` (another data fingerprint).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.engine import StepSums
from training.contracts.results import StepResult
from training.contracts.shards import Shard, ShardReader
from training.objectives.offline_rows import OfflineRows

SHAPE = (8, 4)


class FakeCluster:
    """Ranks as threads: `any_rank`, `gather` and `barrier` meet here."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.brought: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)

    def any_rank(self, rank: int, flag: bool) -> bool:
        return any(self.gather(rank, flag))

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.brought[rank] = value
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class FakeEngine:
    """Every rank has the whole model; rank r owns rows [r * 8 / n, (r + 1) * 8 / n) of each tensor.

    It is its own `ranks` and `shards`.
    """

    def __init__(self, seed: int = 0, cluster: FakeCluster | None = None, rank: int = 0):
        self.cluster = cluster or FakeCluster(1)
        self.rank, self.world_size = rank, self.cluster.world_size
        self.data_parallel_rank, self.data_parallel_size = 0, 1
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(SHAPE, generator=generator)
        self.momentum = torch.zeros(SHAPE)
        self.num_updates = torch.zeros((), dtype=torch.int64)
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.gradient: torch.Tensor | None = None
        self.num_discarded = 0
        self.closed = False
        self.ranks = self.shards = self
        self.objective: FakeObjective | None = None

    @classmethod
    def of(cls, config: TrainConfig, objective: FakeObjective) -> FakeEngine:
        """As a run makes it; `made` lists the engines of this process."""
        engine = cls(config.seed)
        engine.objective = objective
        made.append(engine)
        return engine

    def forward_backward(self, batches: Sequence[Any], objective: FakeObjective) -> StepSums:
        inputs, scale = batches[0]
        noisy = inputs + 0.01 * torch.randn(inputs.shape, generator=self.noise)
        error = noisy @ self.weight - inputs.sum(dim=1, keepdim=True)
        self.gradient = scale * noisy.T @ error / len(inputs)
        loss = error.square().mean() * (scale if scale != scale else 1.0)
        totals = torch.from_numpy(objective.totals(batches))
        return StepSums(totals, loss[None].double(), self.gradient.norm().double() ** 2)

    def optimizer_step(self, learning_rate: float, gradient_norm: float) -> None:
        assert self.gradient is not None
        self.momentum = 0.9 * self.momentum + self.gradient
        self.weight = self.weight - learning_rate * self.momentum
        if self.objective and self.objective.data.requested[-1] in self.objective.options.poisoning_samples:
            self.weight[0, 0] = float("nan")
        self.num_updates += 1
        self.gradient = None

    def discard_gradients(self) -> None:
        self.gradient = None
        self.num_discarded += 1

    def _shards(self, key: str, tensor: torch.Tensor) -> list[Shard]:
        rows = SHAPE[0] // self.world_size
        piece = tensor[self.rank * rows : (self.rank + 1) * rows]
        return [Shard(key, piece, SHAPE, (self.rank * rows, 0))]

    def model_shards(self) -> list[Shard]:
        return self._shards("model/weight", self.weight)

    def optimizer_shards(self) -> list[Shard]:
        shards = self._shards("optimizer/momentum", self.momentum)
        return shards + ([Shard("optimizer/step", self.num_updates, (), ())] if self.rank == 0 else [])

    def load_model(self, reader: ShardReader) -> None:
        self.weight = reader.read("model/weight", (0, 0), SHAPE)

    def load_optimizer(self, reader: ShardReader) -> None:
        self.momentum = reader.read("optimizer/momentum", (0, 0), SHAPE)
        self.num_updates = reader.read("optimizer/step", (), ())

    def random_state(self) -> dict[str, torch.Tensor]:
        return {"noise": self.noise.get_state()}

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        self.noise.set_state(state["noise"])

    def describe(self) -> dict[str, Any]:
        return {"data": self.world_size, "num_parameters": 32}

    def any_rank(self, flag: bool) -> bool:
        return self.cluster.any_rank(self.rank, flag)

    def gather(self, payload: bytes) -> list[bytes]:
        return self.cluster.gather(self.rank, payload)

    def barrier(self) -> None:
        self.cluster.barrier.wait()

    def close(self) -> None:
        self.closed = True


class FakeData:
    def __init__(self, options: FakeObjective.Options, batch_size: int):
        self.fingerprint = "changed" if options.changed_data else "fake"
        self.bad, self.spiking = set(options.bad_samples), set(options.spiking_samples)
        self.empty = set(options.empty_samples)
        self.batch_size = batch_size
        self.requested: list[int] = []

    def batch(self, first_sample: int) -> Sequence[Any]:
        self.requested.append(first_sample)
        inputs = torch.randn((self.batch_size, SHAPE[0]), generator=torch.Generator().manual_seed(first_sample))
        scale = float("nan") if first_sample in self.bad else 0.0 if first_sample in self.empty else 1.0
        return [(inputs, 1e6 if first_sample in self.spiking else scale)]

    def close(self) -> None:
        pass


made: list[FakeEngine] = []


class FakeObjective:
    """`stage.objective=fake_objective.FakeObjective`."""

    @dataclass
    class Options:
        bad_samples: list[int] = field(default_factory=list)
        spiking_samples: list[int] = field(default_factory=list)
        empty_samples: list[int] = field(default_factory=list)
        poisoning_samples: list[int] = field(default_factory=list)
        changed_data: bool = False

    engine = "fake_objective.EngineOfARun"

    def __init__(self, config: TrainConfig, options: Options):
        self.config, self.options = config, options

    def batches(self, ranks: Ranks) -> OfflineRows:
        self.data = FakeData(self.options, self.config.stage.global_batch_size)
        return OfflineRows(self.data)

    def totals(self, batches: Sequence[Any]) -> np.ndarray:
        (inputs, scale) = batches[0]
        return np.array([inputs.numel() if scale else 0.0, inputs.numel()])

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        num_tokens = int(totals[1])
        metrics = {"loss_text": 1.0, "tokens_by_source": {"fake": num_tokens}}
        return StepResult(float(sums[0]), gradient_norm, num_tokens, bool(totals[0]), metrics)

    def metadata(self) -> dict[str, Any]:
        return {"kind": "fake"}

    def final_metrics(self) -> dict[str, float]:
        return {}


class EngineOfARun:
    """What `engine` names: calling it makes a `FakeEngine`."""

    def __new__(cls, config: TrainConfig, objective: FakeObjective) -> FakeEngine:  # type: ignore[misc]
        return FakeEngine.of(config, objective)


def fake_config(run_folder: Any, **options: Any) -> TrainConfig:
    """20 steps of 4 samples, a checkpoint every 5, no W&B."""
    config = TrainConfig(run_folder=str(run_folder))
    config.stage.name = "fake"
    config.stage.objective = {"name": "fake_objective.FakeObjective"} | options
    config.stage.steps, config.stage.global_batch_size = 20, 4
    config.stage.optimizer.learning_rate = 0.01
    config.checkpoint.every_steps = 5
    config.logging.wandb_mode = "disabled"
    return config
