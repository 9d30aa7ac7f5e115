"""A dry run at the real world size: every distinct rank's part on the meta device, one step's collectives.

The process group is torch's fake one: it has as many ranks as the real run, and this process takes the place of one
after the other. The model is built by `model.backbone.transformer`, the step is the engine's own forward step under
megatron-core's schedule; only numbers and collectives are missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_pipeline.loading.batch import MicroBatch
from launch.plan.collectives import by_group, recorded
from launch.plan.layout import Batch, Layout
from launch.plan.memory import stage_parameters
from launch.plan.shape import ModelShape
from model.backbone.attention_plan import packed_documents
from model.backbone.transformer import build_model
from model.config import ModelConfig, count_parameters
from model.parallel import groups
from model.parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    parallel_state,
)
from model.parallel.sharding import logical_parameters
from training.contracts.inputs import LocalInput, LossSums, ModelInput, TokenScores
from training.engines.forward import Forward


def simulate(config: ModelConfig, layout: Layout, batch: Batch) -> dict[str, Any]:
    """Build every distinct part, add the parts up, and trace a step of the first, a middle and the last stage.

    Data- and context-parallel ranks hold the same part, so rank 0 of them stands for all. Raises `AssertionError`
    when the parts do not add up to the model or a rank's weights are not those of the plan.
    """
    started = time.perf_counter()
    logging.getLogger("megatron.core").setLevel(logging.WARNING)  # it lists every parameter
    shape = ModelShape.of(config)
    coverage: dict[str, Coverage] = {}
    weights_by_stage = []
    for stage in range(layout.pipeline):
        for tensor_rank in range(layout.tensor):
            with acting_as(layout, stage, tensor_rank):
                model = build_part(config, layout)
                held = sum(one.numel() * one.element_size() for one in model.parameters())
                planned = stage_parameters(shape, layout, stage) * shape.dtype_bytes
                assert held == planned, f"stage {stage}: {held} bytes of weights, planned {planned}"
                add_up(model, coverage, tensor_rank)
        weights_by_stage.append(held)
    total = sum(part.checked(name) for name, part in coverage.items())
    published = count_parameters(config)["total"]
    padding = count_parameters(config, padded=True)["total"] - published
    assert total - padding == published, f"{total} - {padding} parameters, expected {published}"
    traced = sorted({0, layout.pipeline // 2, layout.pipeline - 1})
    steps = {f"stage_{stage}": trace_step(config, layout, batch, stage) for stage in traced}
    return {
        "world_size": layout.world_size,
        "layout": layout.overrides(),
        "parts_built": layout.tensor * layout.pipeline,
        "ranks_of_each_part": layout.context * layout.data,
        "parameters": total - padding,
        "padding_parameters": padding,
        "published_parameters": published,
        "weights_bytes_by_stage": weights_by_stage,
        "weights_as_planned": True,
        "collectives_of_one_step": steps,
        "seconds": round(time.perf_counter() - started, 1),
    }


@contextmanager
def acting_as(layout: Layout, stage: int, tensor_rank: int = 0) -> Iterator[None]:
    """This process is the rank of that stage and tensor rank, in a world of the layout's size."""
    replicas = layout.tensor * layout.context * layout.data
    distributed.init_process_group(
        "fake", store=FakeStore(), rank=stage * replicas + tensor_rank, world_size=layout.world_size
    )
    try:
        groups.initialize(tensor=layout.tensor, pipeline=layout.pipeline, context=layout.context)
        groups.seed_random_streams(0)
        yield
    finally:
        groups.destroy()


def build_part(config: ModelConfig, layout: Layout) -> Any:
    return build_model(
        config,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        device="meta",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


class UnreportedObjective:
    """Next-token prediction without the sums of its report, which the meta device cannot count."""

    num_sums = 0

    def inputs(self, batch: MicroBatch) -> ModelInput:
        return ModelInput(
            tokens=batch.tokens.reshape(-1),
            position_ids=batch.position_ids.reshape(-1),
            plan=packed_documents(batch.cu_seqlens),
            labels=batch.labels.reshape(-1),
            weights=batch.loss_weights.reshape(-1),
        )

    def label_log_probs(self, scores: TokenScores, inputs: LocalInput) -> torch.Tensor:
        return scores.log_probs(inputs.labels)

    def loss(self, scores: TokenScores, inputs: LocalInput, totals: torch.Tensor) -> LossSums:
        losses = -self.label_log_probs(scores, inputs)
        return LossSums(torch.dot(losses, inputs.weights), torch.zeros(0, dtype=torch.float64))


class Coverage:
    """Which rectangles of one logical parameter the tensor-parallel ranks hold."""

    def __init__(self, shape: tuple[int, ...], is_split: bool):
        self.shape, self.is_split = shape, is_split
        self.rectangles: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def checked(self, name: str) -> int:
        """Elements of the parameter; asserts that the rectangles cover it once."""
        size = int(np.prod(self.shape))
        area = sum(int(np.prod(shape)) for _, shape in self.rectangles)
        assert area == size, f"{name}: {area} of {size} elements are held"
        starts = {offset for offset, _ in self.rectangles}
        assert len(starts) == len(self.rectangles), f"{name}: two ranks hold one part"
        return size


def add_up(model: Any, coverage: dict[str, Coverage], tensor_rank: int) -> None:
    for logical in logical_parameters(model).values():
        part = coverage.setdefault(logical.name, Coverage(logical.global_shape, logical.is_split))
        assert part.shape == logical.global_shape
        if part.is_split or tensor_rank == 0:  # the others hold copies
            part.rectangles += [(block.global_offset, block.shape) for block in logical.blocks]


def trace_step(config: ModelConfig, layout: Layout, batch: Batch, stage: int) -> dict[str, dict[str, dict[str, int]]]:
    """Collectives of one optimizer step on one rank of a stage: count and bytes of the whole messages, by group.

    Left out are the handful of scalars of the report and of the gradient norm. Every micro-batch behind those that
    fill the pipeline adds the same calls, so that a step of many is traced with few.
    """
    count = layout.micro_batches(batch)
    few = layout.pipeline + 1
    if count <= few + 1:
        return by_group(trace_micro_batches(config, layout, batch, stage, count))
    fewer = trace_micro_batches(config, layout, batch, stage, few)
    more = trace_micro_batches(config, layout, batch, stage, few + 1)
    calls = {}
    for key, values in more.items():
        before = fewer.get(key, [0, 0])
        calls[key] = [last + (last - first) * (count - few - 1) for first, last in zip(before, values, strict=True)]
    return by_group(calls)


def trace_micro_batches(
    config: ModelConfig, layout: Layout, batch: Batch, stage: int, count: int
) -> dict[tuple[str, str], list[int]]:
    """Calls of a step of `count` micro-batches: (group, operation) -> [calls, bytes]."""
    with acting_as(layout, stage), torch.device("meta"), recorded(group_names()) as recorder:
        model = build_part(config, layout)
        wrapped = DistributedDataParallel(model.config, ddp_config(layout), model)
        model.config.finalize_model_grads_func = lambda models, _tokens=None, **options: finalize_model_grads(
            models, None, **options
        )
        recorder.calls.clear()  # what building takes is no part of a step
        rows = rows_of(layout, batch)
        forward = Forward(config, model, torch.device("meta"), called=wrapped)
        forward.losses([rows] * count, UnreportedObjective(), torch.zeros(0))
        if layout.distributed_optimizer:
            wrapped.start_param_sync(force_sync=True)
        return recorder.calls


def ddp_config(layout: Layout) -> DistributedDataParallelConfig:
    """As the engine wraps the model."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer, overlap_grad_reduce=False
    )


def group_names() -> dict[int, str]:
    """Names of this rank's process groups, by identity."""
    groups = {
        "world": distributed.group.WORLD,
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "data and context": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {id(group): name for name, group in groups.items()}


def rows_of(layout: Layout, batch: Batch) -> MicroBatch:
    """A micro-batch of documents of the planned length."""
    shape = (layout.micro_batch, batch.sequence_length)
    span = min(batch.sequence_length, max(1, round(2 * batch.attended_tokens)))
    starts = [
        row * batch.sequence_length + start
        for row in range(layout.micro_batch)
        for start in range(0, batch.sequence_length, span)
    ]
    return MicroBatch(
        tokens=np.zeros(shape, np.int64),
        labels=np.zeros(shape, np.int64),
        loss_weights=np.ones(shape, np.float32),
        loss_classes=np.zeros(shape, np.uint8),
        sources=np.zeros(shape, np.uint16),
        position_ids=np.tile(np.arange(batch.sequence_length) % span, (layout.micro_batch, 1)),
        cu_seqlens=np.array([*starts, shape[0] * shape[1]], np.int32),
    )
