"""The engine on megatron-core: tensor, sequence, pipeline, context and data parallelism, distributed optimizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from model.backbone.transformer import build_model
from model.errors import UserError
from model.generation.decoder import CachedDecoder
from model.parallel import cpu_backend, groups
from model.parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    parallel_state,
)
from training.config import TrainConfig
from training.contracts.engine import StepSums
from training.contracts.inputs import InputMaker
from training.contracts.objective import TokenObjective
from training.contracts.shards import ShardReader
from training.engines.forward import Forward
from training.engines.megatron.offload import offloaded
from training.engines.megatron.optimizer import build_optimizer, set_learning_rate, squared_gradient_norm
from training.engines.megatron.state import MegatronShards
from training.reliability.watchdog import collective_timeout_seconds


class MegatronEngine:
    """Trains the transformer of a `TrainConfig`; see `training.contracts.engine.Engine` for what each method promises.

    Every rank of the layout makes one. A layout that is already initialised is used as it is. The model is that of
    the configuration, whatever the objective.
    """

    def __init__(self, config: TrainConfig, objective: TokenObjective | None = None):
        self.config = config
        self.ranks = join_layout(config)
        seed_everything(config.seed)
        self.device = torch.device("cuda" if cpu_backend.has_accelerator() else "cpu")
        self._build()

    def _build(self) -> None:
        layout = self.config.parallel
        self.model = build_model(
            self.config.model,
            seed=self.config.seed,
            sequence_parallel=layout.sequence,
            recompute=layout.recompute,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        if self.device.type == "cuda":
            self.model.cuda()
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer, overlap_grad_reduce=False
        )
        self.wrapped = DistributedDataParallel(self.model.config, ddp_config, self.model)
        # The loss is normalised before the forward pass, so gradients need no division by a number of tokens.
        self.model.config.finalize_model_grads_func = lambda models, _tokens=None, **options: finalize_model_grads(
            models, None, **options
        )
        self.optimizer = build_optimizer(
            self.config.stage.optimizer, self.wrapped, distributed=layout.distributed_optimizer
        )
        self.shards = MegatronShards(self.config, self.model, self.optimizer, self.ranks)
        self.forward = Forward(self.config.model, self.model, self.device, called=self.wrapped)
        self._other: tuple[ShardReader, dict[str, torch.Tensor]] | None = None  # a checkpoint and its weights here

    def forward_backward(self, batches: Sequence[Any], objective: TokenObjective) -> StepSums:
        """Reduced gradients and what the report needs; nothing is applied, and nothing read from the device, yet."""
        totals = torch.from_numpy(objective.totals(batches)).to(self.device)
        distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        self.discard_gradients()
        self.wrapped.train()
        sums = self.forward.losses(batches, objective, totals)
        self.optimizer.prepare_grads()
        distributed.all_reduce(sums)
        return StepSums(totals, sums, squared_gradient_norm(self.optimizer))

    def optimizer_step(self, learning_rate: float, gradient_norm: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)
        clip = self.config.stage.optimizer.gradient_clip
        if clip > 0:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), clip, gradient_norm)
        self.optimizer.step_with_ready_grads()

    def discard_gradients(self) -> None:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def log_probs(self, batches: Sequence[Any], objective: InputMaker) -> list[torch.Tensor]:
        """See `training.contracts.batches.Policy`. Dropout is off."""
        with self._evaluating():
            return self.forward.log_probs(batches, objective)

    @contextmanager
    def weights_of(self, reader: ShardReader) -> Iterator[None]:
        """See `training.contracts.batches.Policy`: what was read once stays on the host."""
        parameters = dict(self.model.named_parameters())
        if self._other is None or self._other[0] is not reader:
            # Adapters that the checkpoint lacks stay zero here, and add nothing.
            weights = {name: torch.zeros_like(one, device="cpu") for name, one in parameters.items()}
            self.shards.read_weights(reader, weights)
            self._other = (reader, weights)
        trained = {name: one.detach().to("cpu", copy=True) for name, one in parameters.items()}
        try:
            _copy_into(parameters, self._other[1])
            yield
        finally:
            _copy_into(parameters, trained)

    def offloaded(self) -> AbstractContextManager[None]:
        """See `training.contracts.batches.Policy`."""
        return offloaded(self.wrapped, self.optimizer)

    @contextmanager
    def decoder(self) -> Iterator[CachedDecoder]:
        """Over the training weights themselves: nothing is copied. Raises `UserError` with pipeline parallelism."""
        if self.config.parallel.pipeline > 1:
            raise UserError(
                "decoding needs the whole depth of the model on each rank",
                where="parallel.pipeline",
                got=str(self.config.parallel.pipeline),
                fix="parallel.pipeline=1, with more of parallel.tensor",
            )
        with self._evaluating():
            yield CachedDecoder(self.model)

    def close(self) -> None:
        groups.destroy()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.wrapped.training
        self.wrapped.eval()
        try:
            yield
        finally:
            self.wrapped.train(was_training)


@torch.no_grad()
def _copy_into(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def join_layout(config: TrainConfig) -> groups.MegatronRanks:
    """Lay the ranks out as the configuration says, unless they are. Raises `UserError` for another number of them."""
    layout = config.parallel
    if not groups.is_initialized():
        groups.initialize(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            context=layout.context,
            init_method=groups.launched_init_method(),
            timeout_seconds=collective_timeout_seconds(config.reliability.hang_timeout_seconds),
        )
    ranks = groups.MegatronRanks()
    groups.check_number_of(ranks, layout.world_size)
    return ranks


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # libraries that draw from numpy's global generator
    groups.seed_random_streams(seed)
