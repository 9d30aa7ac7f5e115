"""The engine on megatron-core: tensor, sequence, pipeline, context and data parallelism, distributed optimizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from data_pipeline.loading.batch import MicroBatch
from model.backbone.transformer import build_model
from model.config import count_parameters
from model.errors import Problems, UserError
from model.parallel import cpu_backend, groups
from model.parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_cuda_rng_tracker,
    get_forward_backward_func,
    parallel_state,
)
from model.parallel.sharding import logical_parameters
from model.vocabulary import Vocabulary
from training.config import TrainConfig
from training.engines.base import Shard, ShardReader, StepResult
from training.engines.forward import MicroStep, StepTotals
from training.engines.megatron.optimizer import build_optimizer, get_step, optimized_parts, set_learning_rate, set_step
from training.engines.shards import read_into, shards_of


class MegatronEngine:
    """Trains the transformer of a `TrainConfig`; see `Engine` for what each method promises.

    Every rank of the layout makes one. `source_names` names the indices in `MicroBatch.sources`. `init_method` is
    torch's rendezvous (see `model.parallel.groups.initialize`). A layout that is already initialised is used as it is.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        source_names: Sequence[str] = (),
        init_method: str | None = None,
        timeout_seconds: float = 1800.0,
    ):
        _check_layout(config)
        layout = config.parallel
        if not groups.is_initialized():
            groups.initialize(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                context=layout.context,
                init_method=init_method,
                timeout_seconds=timeout_seconds,
            )
        self.config = config
        self.source_names = list(source_names)
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.device = torch.device("cuda" if cpu_backend.has_accelerator() else "cpu")
        _check_world(config, self.world_size)
        _seed_everything(config.seed)
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
        self.logical = logical_parameters(self.model)
        self._gradient_norm = 0.0

    # --- one step in two halves -------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Losses, reduced gradients and their norm; nothing is applied yet."""
        totals = StepTotals.of(micro_batches, len(self.source_names)).reduced(self.device)
        step = MicroStep(self.config.model, totals, self.device)
        self.discard_gradients()
        self.wrapped.train()
        get_forward_backward_func()(
            forward_step_func=step.forward,
            data_iterator=iter(step.prepare(batch) for batch in micro_batches),
            model=[self.wrapped],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.size,
            micro_batch_size=1,  # rows are flattened into one packed sequence
        )
        self.optimizer.prepare_grads()
        self._gradient_norm = float(self.optimizer.get_grad_norm())
        return step.result(self._gradient_norm, self.source_names)

    def optimizer_step(self, learning_rate: float) -> None:
        """Clip by the norm of the last `forward_backward` and apply."""
        set_learning_rate(self.optimizer, learning_rate)
        clip = self.config.stage.optimizer.gradient_clip
        if clip > 0:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), clip, self._gradient_norm)
        self.optimizer.step_with_ready_grads()

    def discard_gradients(self) -> None:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    # --- checkpoints ------------------------------------------------------------------------------------------------

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
        if self.rank == 0:
            shards.append(Shard("optimizer/step", torch.tensor([get_step(self.optimizer)]), (1,), (0,)))
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
        known = set(reader.keys())
        for name, parameter in self.model.named_parameters():
            logical = self.logical[name]
            key = f"model/{logical.name}"
            if key not in known or tuple(reader.global_shape(key)) != logical.global_shape:
                found = str(tuple(reader.global_shape(key))) if key in known else "no such key"
                raise UserError(
                    "the checkpoint does not fit this model",
                    where=key,
                    expected=str(logical.global_shape),
                    got=found,
                    fix="train with the model configuration that the checkpoint was written with",
                )
            read_into(reader, key, logical, parameter.detach().view(-1), 0)
        self.optimizer.reload_model_params()

    def load_optimizer(self, reader: ShardReader) -> None:
        """Optimizer state from a checkpoint of any layout. Master weights that it lacks stay those of the model."""
        known = set(reader.keys())
        for kind, name, flat, start in self._optimizer_tensors():
            logical = self.logical[name]
            key = f"optimizer/{kind}/{logical.name}"
            if kind != "master" or key in known:
                read_into(reader, key, logical, flat, start)
        set_step(self.optimizer, int(reader.read("optimizer/step", (0,), (1,)).item()))

    def random_state(self) -> dict[str, torch.Tensor]:
        state = {"default": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
        if self.device.type == "cuda":
            state["accelerator"] = torch.cuda.get_rng_state()
        return state

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        streams = dict(state)
        torch.set_rng_state(streams.pop("default"))
        if "accelerator" in streams:
            torch.cuda.set_rng_state(streams.pop("accelerator"))
        get_cuda_rng_tracker().set_states(streams)

    # --- ranks ------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        layout = self.config.parallel
        return {
            "engine": "megatron",
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            "data": self.data_parallel_size,
            "sequence": bool(self.model.config.sequence_parallel),
            "distributed_optimizer": layout.distributed_optimizer,
            "recompute": layout.recompute,
            "num_parameters": count_parameters(self.config.model)["total"],
        }

    def final_metrics(self) -> dict[str, float]:
        return {}

    def any_rank(self, flag: bool) -> bool:
        value = torch.tensor([int(flag)], device=self.device)
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        distributed.barrier()

    def close(self) -> None:
        groups.destroy()


def _check_layout(config: TrainConfig) -> None:
    """What only the engine knows about layouts; `TrainConfig.validate` checks the rest."""
    problems = Problems()
    layout, stage = config.parallel, config.stage
    padded = Vocabulary.from_config(config.model.vocabulary).padded_size
    problems.check(
        padded % layout.tensor == 0,
        "parallel.tensor",
        f"{layout.tensor} does not divide the padded vocabulary ({padded})",
        f"model.vocabulary.pad_multiple={128 * layout.tensor}",
    )
    tokens, parts = stage.micro_batch_size * stage.sequence_length, layout.context * layout.tensor
    parts *= 2 if layout.context > 1 else 1  # each context rank takes two chunks
    problems.check(
        tokens % parts == 0,
        "stage.micro_batch_size",
        f"its {tokens} tokens are not a multiple of {parts} (tensor * context, twice with context > 1)",
    )
    problems.raise_if_any()


def _check_world(config: TrainConfig, world_size: int) -> None:
    expected = config.parallel.world_size
    if world_size != expected:
        raise UserError(
            "the number of processes is not that of the layout",
            expected=str(expected),
            got=str(world_size),
            fix="start tensor * pipeline * context * data processes",
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # libraries that draw from numpy's global generator
    groups.seed_random_streams(seed)
