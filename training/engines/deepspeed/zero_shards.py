"""The deepspeed engine's weights and optimizer state as shards of logical tensors: the project's own checkpoints.

The keys are those of the megatron engine, so a run may go on with the other engine, its optimizer state included.
"""

from __future__ import annotations

from typing import Any

import torch

from model.config import count_parameters
from model.parallel.groups import MegatronRanks
from model.parallel.megatron import GPTModel, parallel_state
from model.parallel.sharding import LogicalParameter
from training.config import TrainConfig
from training.contracts.shards import Shard, ShardReader
from training.engines.deepspeed.library import ZeroEngine
from training.engines.deepspeed.zero_parts import forget_gathered, get_step, held_weights, is_cut, set_step, zero_parts
from training.engines.flat_ranges import HeldPart, read_weights, shards_of
from training.engines.megatron.state import MegatronShards


def held_parts(model: GPTModel, logical: dict[str, LogicalParameter]) -> list[HeldPart]:
    """What this rank holds of the weights between uses."""
    parts = []
    for name, parameter in model.named_parameters():
        start, flat = held_weights(parameter)
        parts.append(HeldPart(logical[name], flat, start))
    return parts


class ZeroShards(MegatronShards):
    """See `training.contracts.shards.ShardStore`. Random streams are those of the layout, as in the megatron engine."""

    def __init__(
        self,
        config: TrainConfig,
        model: GPTModel,
        logical: dict[str, LogicalParameter],
        engine: ZeroEngine,
        ranks: MegatronRanks,
    ):
        self.config, self.model, self.logical, self.engine, self.ranks = config, model, logical, engine, ranks

    def model_shards(self) -> list[Shard]:
        """Of weights that are not cut, the first replica is the owner."""
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        shards = []
        for name, parameter in self.model.named_parameters():
            if self._owns(name) and (is_cut(parameter) or replica == 0):
                start, flat = held_weights(parameter)
                shards += shards_of(f"model/{self.logical[name].name}", self.logical[name], flat, start)
        return shards

    def _optimizer_tensors(self) -> list[tuple[str, str, torch.Tensor, int]]:
        found = []
        for name, part in zero_parts(self.engine, self.model.named_parameters()).items():
            found += [(kind, name, moment, part.start) for kind, moment in part.moments.items()]
            if self.config.model.dtype != "float32":
                found.append(("master", name, part.main, part.start))
        return found

    @torch.no_grad()
    def load_model(self, reader: ShardReader) -> None:
        """Weights from a checkpoint of any layout and engine; the optimizer's master weights follow them.

        On a checkpoint without adapters those of the model stay as they are.
        """
        forget_gathered(self.engine.optimizer)
        read_weights(reader, held_parts(self.model, self.logical))
        parameters = dict(self.model.named_parameters())
        for name, part in zero_parts(self.engine, parameters.items()).items():
            start, weights = held_weights(parameters[name])
            first = part.start - start
            part.main.copy_(weights[first : first + part.main.numel()])

    def _get_step(self) -> int:
        return get_step(self.engine)

    def _set_step(self, step: int) -> None:
        set_step(self.engine, step)

    def describe(self) -> dict[str, Any]:
        layout = self.config.parallel
        return {
            "engine": "deepspeed",
            "zero_stage": self.config.deepspeed.zero_stage,
            "tensor": layout.tensor,
            "pipeline": 1,
            "context": layout.context,
            "data": self.ranks.data_parallel_size,
            "sequence": bool(self.model.config.sequence_parallel),
            "recompute": layout.recompute,
            "num_parameters": count_parameters(self.config.model)["total"],
        }
