"""The engine of one process: plain torch, AdamW over a module that brings its own loss (the vision tokenizer's)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.errors import UserError
from training.config import TrainConfig
from training.contracts.engine import StepSums
from training.contracts.inputs import InputMaker
from training.contracts.objective import ModuleObjective
from training.contracts.shards import Shard, ShardReader
from training.engines.adam import adam, moments

MODEL_PREFIX, OPTIMIZER_PREFIX = "model/", "optimizer/"


class Alone:
    """See `training.contracts.batches.Ranks`."""

    rank, world_size, data_parallel_rank, data_parallel_size = 0, 1, 0, 1

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""

    is_first_of_replica = True

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload]


class SingleEngine:
    """See `training.contracts.engine.Engine`; `shards` are the engine's own."""

    def __init__(self, config: TrainConfig, objective: ModuleObjective):
        if config.parallel.world_size != 1:
            raise UserError(
                "this objective trains on one process",
                where="parallel",
                got=f"{config.parallel.world_size} ranks",
                fix="parallel.data=1",
            )
        self.ranks = Alone()
        self.objective = objective
        self.gradient_clip = config.stage.optimizer.gradient_clip
        self.trained = nn.ModuleDict({"model": objective.model, "terms": objective.terms})
        self.optimizer = adam(self.trained, config.stage.optimizer)
        self.num_updates = 0

    @property
    def shards(self) -> SingleEngine:
        return self

    def forward_backward(self, batches: Sequence[Any], objective: ModuleObjective) -> StepSums:
        self.discard_gradients()
        totals = torch.from_numpy(objective.totals(batches))
        sums = objective.backward(batches, self.num_updates)
        gradients = [parameter.grad for parameter in self.trained.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return StepSums(totals, sums, norm.double().cpu() ** 2)

    def optimizer_step(self, learning_rate: float, gradient_norm: float) -> None:
        if self.gradient_clip > 0 and gradient_norm > self.gradient_clip:
            for parameter in self.trained.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.gradient_clip / gradient_norm)
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
        return whole_tensors(MODEL_PREFIX, self.objective.published())

    def optimizer_shards(self) -> list[Shard]:
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
        for shard in self.optimizer_shards():
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
        return {"tensor": 1, "pipeline": 1, "context": 1, "data": 1, "num_parameters": num_parameters}

    def close(self) -> None:
        """Nothing is held open."""


def whole_tensors(prefix: str, tensors: dict[str, torch.Tensor]) -> list[Shard]:
    """Whole tensors as shards of one rank."""
    return [
        Shard(prefix + name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())
        for name, tensor in tensors.items()
    ]
