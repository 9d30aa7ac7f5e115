"""The engine of whole replicas: plain torch, AdamW over a module that brings its own loss (the vision tokenizer's).

Every rank holds the module, its optimizer and its moving average, and works on its own part of each global batch. What
the parts add up to is the same on all ranks, so that the replicas stay equal without being told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import nn

from model.errors import UserError
from model.parallel import groups
from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.engine import StepSums
from training.contracts.inputs import InputMaker
from training.contracts.layout import ParallelLayout, holds_the_whole_module
from training.contracts.objective import ModuleObjective
from training.contracts.shards import Shard, ShardReader
from training.engines.adam import adam, moments
from training.reliability.watchdog import collective_timeout_seconds

MODEL_PREFIX, OPTIMIZER_PREFIX = "model/", "optimizer/"
STREAMS_APART = 10_000  # between the seeds of two replicas: they draw different masks of dropout


class Alone:
    """See `training.contracts.batches.Ranks`: one process needs no process group."""

    rank, world_size, data_parallel_rank, data_parallel_size = 0, 1, 0, 1
    is_first_of_replica = True

    def any_rank(self, flag: bool) -> bool:
        return flag

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.array(values, np.float64)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload]


class ReplicatedEngine:
    """See `training.contracts.engine.Engine`; `shards` are the engine's own. Rank 0 writes them, every rank reads them."""

    def __init__(self, config: TrainConfig, objective: ModuleObjective):
        self.ranks = join_replicas(config)
        torch.manual_seed(config.seed + STREAMS_APART * self.ranks.rank)
        self.objective = objective
        self.gradient_clip = config.stage.optimizer.gradient_clip
        self.trained = nn.ModuleDict({"model": objective.model, "terms": objective.terms})
        self.optimizer = adam(self.trained, config.stage.optimizer)
        self.num_updates = 0

    @property
    def shards(self) -> ReplicatedEngine:
        return self

    def forward_backward(self, batches: Sequence[Any], objective: ModuleObjective) -> StepSums:
        self.discard_gradients()
        totals = self.ranks.sum(objective.totals(batches))
        sums = objective.backward(batches, totals, self.num_updates)
        gradients = gradients_of(self.trained.parameters())
        if self.ranks.world_size > 1:
            distributed.all_reduce(sums)
            add_up(gradients + gradients_of(objective.other_parameters()))
        norm = torch.nn.utils.get_total_norm(gradients)
        return StepSums(torch.from_numpy(totals).to(sums.device), sums, norm.double() ** 2)

    def optimizer_step(self, learning_rate: float, gradient_norm: float) -> None:
        if self.gradient_clip > 0 and gradient_norm > self.gradient_clip:
            for gradient in gradients_of(self.trained.parameters()):
                gradient.mul_(self.gradient_clip / gradient_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.num_updates += 1
        self.objective.update(learning_rate, self.num_updates)
        self.discard_gradients()

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.discard_gradients()

    def log_probs(self, batches: Sequence[Any], objective: InputMaker) -> list[torch.Tensor]:
        raise AssertionError("this engine trains no model of tokens")

    def weights_of(self, reader: ShardReader) -> Any:
        raise AssertionError("this engine trains no model of tokens")

    def offloaded(self) -> Any:
        raise AssertionError("this engine draws no answers")

    def decoder(self) -> Any:
        raise AssertionError("this engine trains no model of tokens")

    def model_shards(self) -> list[Shard]:
        return whole_tensors(MODEL_PREFIX, self.objective.published()) if self.ranks.rank == 0 else []

    def optimizer_shards(self) -> list[Shard]:
        return self._optimizer_tensors() if self.ranks.rank == 0 else []

    def _optimizer_tensors(self) -> list[Shard]:
        """Moments, the count of updates, and what the objective trains or keeps beside the published weights."""
        tensors: dict[str, torch.Tensor] = {"num_updates": torch.tensor(self.num_updates)}
        for module, prefix in ((self.objective.model, ""), (self.objective.terms, "terms.")):
            for moment, value in moments(module, self.optimizer).items():
                kind, _, name = moment.partition("/")
                tensors[f"{kind}/{prefix}{name}"] = value
        return whole_tensors(OPTIMIZER_PREFIX, tensors | self.objective.tensors())

    def load_model(self, reader: ShardReader) -> None:
        self.objective.load_published(reader)

    @torch.no_grad()
    def load_optimizer(self, reader: ShardReader) -> None:
        for shard in self._optimizer_tensors():
            value = reader.read(shard.key, shard.global_offset, shard.global_shape)
            shard.tensor.copy_(value)
            if shard.key == f"{OPTIMIZER_PREFIX}num_updates":
                self.num_updates = int(value)

    def random_state(self) -> dict[str, torch.Tensor]:
        state = {"torch": torch.get_rng_state()}
        return state | ({"accelerator": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        if "accelerator" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["accelerator"])

    def describe(self) -> dict[str, Any]:
        num_parameters = sum(parameter.numel() for parameter in self.objective.model.parameters())
        data = self.ranks.world_size
        return {"tensor": 1, "pipeline": 1, "context": 1, "data": data, "num_parameters": num_parameters}

    def close(self) -> None:
        if self.ranks.world_size > 1:
            groups.leave()


def join_replicas(config: TrainConfig) -> Ranks:
    """The ranks of a data-parallel layout; a process group that is already there is used as it is.

    Raises `UserError` for a layout that cuts the module, and for another number of processes.
    """
    problem = holds_the_whole_module(ParallelLayout.of(config.parallel))
    if problem is not None:
        raise UserError(problem.message, where=problem.key, fix=problem.fix)
    return Alone() if config.parallel.world_size == 1 else join_group(config)


def join_group(config: TrainConfig) -> groups.ReplicaRanks:
    """All ranks of the configuration; a process group that is already there is used as it is."""
    if not distributed.is_initialized():
        timeout_seconds = collective_timeout_seconds(config.reliability.hang_timeout_seconds)
        groups.join(init_method=groups.launched_init_method(), timeout_seconds=timeout_seconds)
    ranks = groups.ReplicaRanks()
    groups.check_number_of(ranks, config.parallel.world_size)
    return ranks


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def add_up(gradients: Sequence[torch.Tensor]) -> None:
    """Sum them over all ranks, in place, in one message. All ranks have gradients of the same parameters."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def whole_tensors(prefix: str, tensors: dict[str, torch.Tensor]) -> list[Shard]:
    """Whole tensors as shards of one rank."""
    return [
        Shard(prefix + name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())
        for name, tensor in tensors.items()
    ]
