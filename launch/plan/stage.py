"""A stage's configuration in the plan's words."""

from __future__ import annotations

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Batch, Layout
from launch.plan.search import Problem
from launch.plan.shape import ModelShape
from model.parallel.devices import Device
from training.config import TrainConfig
from training.objectives.registry import options_of


def problem_of(
    config: TrainConfig,
    cluster: ClusterConfig,
    device: Device,
    *,
    document_tokens: float | None = None,
    attention_flops: str = "causal",
) -> Problem:
    """What is to be planned. `document_tokens`: mean length that a token's document has; None: a row is one document."""
    stage = config.stage
    row = stage.sequence_length
    is_full = getattr(options_of(config), "document_attention", "document") == "full"
    attended = (row if document_tokens is None or is_full else document_tokens) / 2
    return Problem(
        shape=ModelShape.of(config.model),
        batch=Batch(row, stage.global_batch_size, attended),
        num_steps=stage.steps,
        device=device,
        cluster=cluster,
        mfu_attended_tokens=attended if attention_flops == "causal" else 2 * attended,
    )


def layout_of(config: TrainConfig) -> Layout:
    """The stage's own layout."""
    parallel = config.parallel
    return Layout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.data,
        config.stage.micro_batch_size,
        parallel.recompute,
        distributed_optimizer=parallel.distributed_optimizer,
        sequence_parallel=parallel.sequence,
    )
