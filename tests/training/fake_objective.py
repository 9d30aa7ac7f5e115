"""A fake engine and fake data: a small linear model, deterministic and fast, for the logic around it.

`stage.options` steers faults: `bad_samples` (batches starting there give NaN), `spiking_samples` (huge gradients),
`changed_data` (another data fingerprint).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from training.config import TrainConfig
from training.engines.base import Shard, ShardReader, StepResult
from training.stage import Job

SHAPE = (8, 4)


class FakeCluster:
    """Ranks as threads: `any_rank` and `barrier` meet here."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.flags = [False] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)

    def final_metrics(self) -> dict[str, float]:
        return {}

    def any_rank(self, rank: int, flag: bool) -> bool:
        self.flags[rank] = flag
        self.barrier.wait()
        answer = any(self.flags)
        self.barrier.wait()
        return answer


class FakeEngine:
    """Every rank has the whole model; rank r owns rows [r * 8 / n, (r + 1) * 8 / n) of each tensor."""

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

    def forward_backward(self, micro_batches: Sequence[Any]) -> StepResult:
        inputs, scale = micro_batches[0]
        noisy = inputs + 0.01 * torch.randn(inputs.shape, generator=self.noise)
        error = noisy @ self.weight - inputs.sum(dim=1, keepdim=True)
        self.gradient = scale * noisy.T @ error / len(inputs)
        norm = float(self.gradient.norm())
        return StepResult(
            loss=float(error.square().mean()) * (scale if scale != scale else 1.0),
            gradient_norm=norm,
            loss_by_class={"text": 1.0},
            tokens_by_source={"fake": inputs.numel()},
            num_tokens=inputs.numel(),
        )

    def optimizer_step(self, learning_rate: float) -> None:
        assert self.gradient is not None
        self.momentum = 0.9 * self.momentum + self.gradient
        self.weight = self.weight - learning_rate * self.momentum
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

    def final_metrics(self) -> dict[str, float]:
        return {}

    def any_rank(self, flag: bool) -> bool:
        return self.cluster.any_rank(self.rank, flag)

    def barrier(self) -> None:
        self.cluster.barrier.wait()

    def close(self) -> None:
        self.closed = True


class FakeData:
    def __init__(self, options: dict[str, Any], batch_size: int):
        self.fingerprint = "changed" if options.get("changed_data") else "fake"
        self.bad = set(options.get("bad_samples", ()))
        self.spiking = set(options.get("spiking_samples", ()))
        self.batch_size = batch_size
        self.requested: list[int] = []

    def batch(self, first_sample: int) -> Sequence[Any]:
        self.requested.append(first_sample)
        inputs = torch.randn((self.batch_size, SHAPE[0]), generator=torch.Generator().manual_seed(first_sample))
        scale = float("nan") if first_sample in self.bad else 1.0
        return [(inputs, 1e6 if first_sample in self.spiking else scale)]

    def close(self) -> None:
        pass


def build(config: TrainConfig) -> Job:
    engine = FakeEngine(config.seed)
    data = FakeData(config.stage.options, config.stage.global_batch_size)
    return Job(engine, data, {"kind": "fake"})


def fake_config(run_folder: Any, **options: Any) -> TrainConfig:
    """20 steps of 4 samples, a checkpoint every 5, no W&B."""
    config = TrainConfig(run_folder=str(run_folder))
    config.stage.objective, config.stage.name = "vision_tokenizer", "fake"
    config.stage.steps, config.stage.global_batch_size = 20, 4
    config.stage.optimizer.learning_rate = 0.01
    config.stage.options = options
    config.checkpoint.every_steps = 5
    config.logging.wandb_mode = "disabled"
    return config
