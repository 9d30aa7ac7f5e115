"""The megatron engine's weights, optimizer state and random streams as shards of logical tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model.config import count_parameters
from model.parallel.groups import MegatronRanks
from model.parallel.megatron import GPTModel, MegatronOptimizer, get_cuda_rng_tracker, parallel_state
from model.parallel.sharding import logical_parameters
from training.config import TrainConfig
from training.contracts.shards import Shard, ShardReader
from training.engines.flat_ranges import HeldPart, read_into, read_weights, shards_of
from training.engines.megatron.optimizer import get_step, optimized_parts, set_step


class MegatronShards:
    """See `training.contracts.shards.ShardStore`."""

    def __init__(self, config: TrainConfig, model: GPTModel, optimizer: MegatronOptimizer, ranks: MegatronRanks):
        self.config, self.model, self.optimizer, self.ranks = config, model, optimizer, ranks
        self.logical = logical_parameters(model)

    def _owns(self, name: str) -> bool:
        """Of values that tensor-parallel ranks hold alike, the first is the owner."""
        return self.logical[name].is_split or parallel_state.get_tensor_model_parallel_rank() == 0

    def model_shards(self) -> list[Shard]:
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
            return []
        shards = []
        for name, parameter in self.model.named_parameters():
            if self._owns(name):
                logical = self.logical[name]
                shards += shards_of(f"model/{logical.name}", logical, parameter.detach().view(-1), 0)
        return shards

    def optimizer_shards(self) -> list[Shard]:
        """Moments, and master weights where the model's own are not float32, and the count of steps."""
        shards = []
        if self.ranks.rank == 0:
            shards.append(Shard("optimizer/step", torch.tensor([self._get_step()]), (1,), (0,)))
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        if not self.config.parallel.distributed_optimizer and replica != 0:
            return shards
        for kind, name, flat, start in self._optimizer_tensors():
            if self._owns(name):
                logical = self.logical[name]
                shards += shards_of(f"optimizer/{kind}/{logical.name}", logical, flat, start)
        return shards

    def _optimizer_tensors(self) -> list[tuple[str, str, torch.Tensor, int]]:
        """(kind, local parameter name, flat tensor, first element) of all that this rank's optimizer holds."""
        found = []
        for name, part in optimized_parts(self.optimizer, self.model).items():
            found += [(kind, name, moment.view(-1), part.start) for kind, moment in part.moments.items()]
            if self.config.model.dtype != "float32":
                found.append(("master", name, part.main.view(-1), part.start))
        return found

    def load_model(self, reader: ShardReader) -> None:
        """Weights from a checkpoint of any layout; the optimizer's master weights follow them."""
        self.read_weights(reader, dict(self.model.named_parameters()))
        self.optimizer.reload_model_params()

    def read_weights(self, reader: ShardReader, into: Mapping[str, torch.Tensor]) -> None:
        """A checkpoint's weights into tensors of the shapes that this rank has, by local parameter name.

        On a checkpoint without adapters those of the model stay as they are.
        """
        read_weights(
            reader, [HeldPart(self.logical[name], parameter.detach().view(-1), 0) for name, parameter in into.items()]
        )

    def load_optimizer(self, reader: ShardReader) -> None:
        """Optimizer state from a checkpoint of any layout. Master weights that it lacks stay those of the model."""
        known = set(reader.keys())
        for kind, name, flat, start in self._optimizer_tensors():
            logical = self.logical[name]
            key = f"optimizer/{kind}/{logical.name}"
            if kind != "master" or key in known:
                read_into(reader, key, logical, flat, start)
        self._set_step(int(reader.read("optimizer/step", (0,), (1,)).item()))

    def _get_step(self) -> int:
        return get_step(self.optimizer)

    def _set_step(self, step: int) -> None:
        set_step(self.optimizer, step)

    def random_state(self) -> dict[str, torch.Tensor]:
        state = {"default": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
        if torch.cuda.is_available():
            state["accelerator"] = torch.cuda.get_rng_state()
        return state

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        streams = dict(state)
        torch.set_rng_state(streams.pop("default"))
        if "accelerator" in streams:
            torch.cuda.set_rng_state(streams.pop("accelerator"))
        get_cuda_rng_tracker().set_states(streams)

    def describe(self) -> dict[str, Any]:
        layout = self.config.parallel
        return {
            "engine": "megatron",
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            "data": self.ranks.data_parallel_size,
            "sequence": bool(self.model.config.sequence_parallel),
            "distributed_optimizer": layout.distributed_optimizer,
            "recompute": layout.recompute,
            "num_parameters": count_parameters(self.config.model)["total"],
        }
