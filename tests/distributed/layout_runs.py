"""What the workers run: a tiny model on synthetic packed batches, in any layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.batch import MicroBatch
from model.config import AdapterConfig, ModelConfig
from model.vocabulary import VocabularyConfig
from training.config import OptimizerConfig, ParallelConfig, StageConfig, TrainConfig
from training.contracts.results import StepResult

ROW_TOKENS = 64
ROWS = 8
SOURCES = ("first", "second")
VOCABULARY = VocabularyConfig(text_size=90, reserved_size=16, visual_size=60, pad_multiple=64)


def train_config(dtype: str = "float32", dropout: float = 0.0, adapter_rank: int = 0, **layout: Any) -> TrainConfig:
    model = ModelConfig(
        name="tiny",
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=32,
        dtype=dtype,
        vocabulary=VOCABULARY,
        dropout=dropout,
        adapter=AdapterConfig(rank=adapter_rank, alpha=16.0),
    )
    optimizer = OptimizerConfig(learning_rate=3e-3, gradient_clip=0.5, weight_decay=0.1)
    stage = StageConfig(
        sequence_length=ROW_TOKENS, global_batch_size=ROWS, micro_batch_size=2, optimizer=optimizer, steps=20
    )
    return TrainConfig(model=model, stage=stage, parallel=ParallelConfig(**layout))


def random_row(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One packed row: several documents, padding at the end, labels of three classes and weights."""
    num_documents = int(rng.integers(1, 6))
    num_padding = int(rng.integers(0, 16))
    cuts = np.sort(rng.choice(np.arange(2, ROW_TOKENS - num_padding - 1), num_documents - 1, replace=False))
    bounds = np.unique(np.concatenate(([0], cuts, [ROW_TOKENS - num_padding, ROW_TOKENS])))
    # A repeated pattern gives the model something to learn.
    tokens = (np.arange(ROW_TOKENS) * 7 + int(rng.integers(0, 5))) % 160
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    labels = np.roll(tokens, -1)
    classes = np.where(labels < 90, 0, np.where(labels < 106, 2, 1))
    weights = np.array([1.0, 0.5, 0.25])[classes]
    weights[bounds[1:] - 1] = 0.0
    weights[ROW_TOKENS - num_padding :] = 0.0
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_weights": weights,
        "loss_classes": classes,
        "sources": rng.integers(0, 2, ROW_TOKENS),
        "position_ids": np.arange(ROW_TOKENS) - starts,
        "bounds": bounds,
    }


def micro_batch(rows: Sequence[dict[str, np.ndarray]]) -> MicroBatch:
    cu_seqlens = np.concatenate([[0]] + [row["bounds"][1:] + i * ROW_TOKENS for i, row in enumerate(rows)])
    dtypes = {"loss_weights": np.float32, "loss_classes": np.uint8, "sources": np.uint16}
    names = ("tokens", "labels", "loss_weights", "loss_classes", "sources", "position_ids")
    arrays = {name: np.stack([row[name] for row in rows]).astype(dtypes.get(name, np.int64)) for name in names}
    return MicroBatch(**arrays, cu_seqlens=cu_seqlens.astype(np.int32))


def batch_of_step(step: int, data_rank: int, data_size: int, rows_at_once: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches; the global batch depends on the step only."""
    rng = np.random.default_rng(1000 + step)
    rows = [random_row(rng) for _ in range(ROWS)]
    mine = rows[data_rank::data_size]
    return [micro_batch(mine[i : i + rows_at_once]) for i in range(0, len(mine), rows_at_once)]


class Trainer:
    """The real engine and objective on batches made here."""

    def __init__(self, config: TrainConfig):
        from training.engines.registry import make_engine
        from training.objectives.next_token import NextToken

        self.config = config
        self.objective = NextToken(config, NextToken.Options())
        self.objective.source_names = list(SOURCES)
        self.engine: Any = make_engine(config, self.objective)
        self.ranks, self.shards = self.engine.ranks, self.engine.shards

    def batches(self, step: int) -> list[MicroBatch]:
        ranks, rows_at_once = self.ranks, self.config.stage.micro_batch_size
        return batch_of_step(step, ranks.data_parallel_rank, ranks.data_parallel_size, rows_at_once)

    def forward_backward(self, step: int) -> StepResult:
        return self.step_of(self.batches(step))

    def step_of(self, batches: list[MicroBatch]) -> StepResult:
        return self.objective.result(*self.engine.forward_backward(batches, self.objective).read())

    def steps(self, first: int, last: int) -> list[StepResult]:
        results = []
        for step in range(first, last):
            results.append(self.forward_backward(step))
            self.engine.optimizer_step(self.config.stage.optimizer.learning_rate, results[-1].gradient_norm)
        return results


def train(config: TrainConfig, num_steps: int) -> list[Any]:
    return Trainer(config).steps(0, num_steps)


class HeldOut:
    """Eleven rows that no step trains on, as `training.objectives.held_out.HeldOutRows`: they divide by no number of ranks."""

    num_rows, micro_batch_size, source_names = 11, 2, list(SOURCES)

    def batch(self, first_row: int) -> MicroBatch:
        return micro_batch([random_row(np.random.default_rng(5000 + first_row + i)) for i in range(2)])


def train_and_validate(config: TrainConfig, num_steps: int) -> tuple[list[Any], Any]:
    """The results of the steps, then the held-out loss by class and by source."""
    from training.objectives.held_out import loss_of

    trainer = Trainer(config)
    results = trainer.steps(0, num_steps)
    return results, loss_of(trainer.engine, trainer.objective, trainer.ranks, HeldOut())


class MemoryReader:
    """A checkpoint in memory: whole tensors put together from the shards of all ranks."""

    def __init__(self, shards: Iterable[Any]):
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.covered: dict[str, torch.Tensor] = {}
        for shard in shards:
            if shard.key not in self.tensors:
                self.tensors[shard.key] = torch.empty(shard.global_shape, dtype=shard.tensor.dtype)
                self.covered[shard.key] = torch.zeros(shard.global_shape, dtype=torch.int)
            self._place(self.tensors[shard.key], shard.global_offset, shard.tensor.shape).copy_(shard.tensor)
            self._place(self.covered[shard.key], shard.global_offset, shard.tensor.shape).add_(1)

    @staticmethod
    def _place(tensor: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def global_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        return self._place(self.tensors[key], offset, shape)


def gather_shards(trainer: Trainer) -> list[Any]:
    """All ranks' shards, on every rank."""
    import torch.distributed as distributed

    mine = [*trainer.shards.model_shards(), *trainer.shards.optimizer_shards()]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return [shard for shards in everyone for shard in shards]


def initial_tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    reader = MemoryReader(gather_shards(Trainer(config)))
    assert all(bool((count == 1).all()) for count in reader.covered.values()), "each element has one owner"
    return {key: tensor for key, tensor in reader.tensors.items() if key.startswith("model/")}


def save_after(config: TrainConfig, num_steps: int) -> tuple[MemoryReader, list[Any], dict[str, torch.Tensor]]:
    """Train, save in memory, go on: the checkpoint, the losses after it and the weights after them."""
    trainer = Trainer(config)
    trainer.steps(0, num_steps)
    reader = MemoryReader([_copied(shard) for shard in gather_shards(trainer)])
    later = trainer.steps(num_steps, num_steps + 3)
    return reader, later, MemoryReader(gather_shards(trainer)).tensors


def train_whole(
    config: TrainConfig, num_steps: int
) -> tuple[list[Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The results of some steps, and every logical tensor before and after them."""
    trainer = Trainer(config)
    before = MemoryReader([_copied(shard) for shard in gather_shards(trainer)])
    results = trainer.steps(0, num_steps)
    after = MemoryReader(gather_shards(trainer))
    assert all(bool((count == 1).all()) for count in after.covered.values()), "each element has one owner"
    return results, before.tensors, after.tensors


def continue_from(config: TrainConfig, reader: MemoryReader, num_steps: int) -> tuple[list[Any], dict[str, Any]]:
    trainer = Trainer(config)
    trainer.shards.load_model(reader)
    trainer.shards.load_optimizer(reader)
    later = trainer.steps(num_steps, num_steps + 3)
    return later, MemoryReader(gather_shards(trainer)).tensors


def device_of_the_count(device: str) -> str:
    """Where the count of steps of a parameter on `device` lies."""
    from training.engines.megatron.optimizer import set_step

    parameter = torch.nn.Parameter(torch.empty(2, device=device))
    optimizer = torch.optim.AdamW([parameter])
    set_step(SimpleNamespace(optimizer=optimizer), 3)  # type: ignore[arg-type]
    found: str = optimizer.state[parameter]["step"].device.type
    return found


def steps_without_gradient(config: TrainConfig, num_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors before and after steps whose gradients are zero, by an engine that was resumed from its own state."""
    reader = MemoryReader([_copied(shard) for shard in gather_shards(Trainer(config))])
    trainer = Trainer(config)
    trainer.shards.load_model(reader)
    trainer.shards.load_optimizer(reader)
    for _ in range(num_steps):
        trainer.engine.discard_gradients()
        trainer.engine.optimizer.prepare_grads()
        trainer.engine.optimizer_step(config.stage.optimizer.learning_rate, 0.0)
    return reader.tensors, MemoryReader(gather_shards(trainer)).tensors


def train_from(
    config: TrainConfig, weights: dict[str, torch.Tensor], rows_of_steps: list[list[dict[str, np.ndarray]]]
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """A step for each list of rows, from given logical weights: the results and the weights after them."""
    trainer = Trainer(config)
    reader = MemoryReader([])
    reader.tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    trainer.shards.load_model(reader)
    results = []
    for rows in rows_of_steps:
        mine = rows[trainer.ranks.data_parallel_rank :: trainer.ranks.data_parallel_size]
        results.append(trainer.step_of([micro_batch([row]) for row in mine]))
        trainer.engine.optimizer_step(config.stage.optimizer.learning_rate, results[-1].gradient_norm)
    tensors = MemoryReader(gather_shards(trainer)).tensors
    return results, {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}


def _copied(shard: Any) -> Any:
    from dataclasses import replace

    return replace(shard, tensor=shard.tensor.clone())


def discarded_step(config: TrainConfig) -> tuple[list[Any], list[Any]]:
    """Three steps with a refused one between them, and without."""
    trainer = Trainer(config)
    refused = trainer.steps(0, 1)
    trainer.forward_backward(99)
    trainer.engine.discard_gradients()
    refused += trainer.steps(1, 3)
    return refused, Trainer(config).steps(0, 3)


def dropout_replay(config: TrainConfig) -> tuple[Any, Any, Any]:
    """The same batch twice from one random state, then once more from where that left it."""
    trainer = Trainer(config)
    trainer.steps(0, 1)
    state = {name: tensor.clone() for name, tensor in trainer.shards.random_state().items()}
    first = trainer.forward_backward(1)
    trainer.shards.load_random_state(state)
    return first, trainer.forward_backward(1), trainer.forward_backward(1)


def vote(config: TrainConfig) -> tuple[bool, bool]:
    trainer = Trainer(config)
    return trainer.ranks.any_rank(trainer.ranks.rank == 1), trainer.ranks.any_rank(False)


def load_foreign_checkpoint(config: TrainConfig) -> str:
    from model.errors import UserError

    trainer = Trainer(config)
    reader = MemoryReader(gather_shards(trainer))
    reader.tensors["model/embedding.word_embeddings.weight"] = torch.zeros(3, 3)
    try:
        trainer.shards.load_model(reader)
    except UserError as error:
        return str(error)
    return "accepted"
