"""The predicted memory of a rank against what the engine's tensors take in real runs on the CPU."""

from dataclasses import replace

import pytest
from plan_runs import measure

from launch.plan.layout import Batch, Layout
from launch.plan.memory import layer_activation_bytes, stage_memory
from launch.plan.shape import ModelShape
from model.config import ModelConfig
from model.vocabulary import VocabularyConfig
from training.config import ParallelConfig, StageConfig, TrainConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=160,
    ffn_hidden_size=448,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=16,
    vocabulary=VocabularyConfig(text_size=900, reserved_size=16, visual_size=100, pad_multiple=64),
)
LAYOUTS = {
    "one rank": Layout(micro_batch=2),
    "tensor 2": Layout(tensor=2, micro_batch=2),
    "pipeline 2": Layout(pipeline=2, micro_batch=1),
    "context 2": Layout(context=2, micro_batch=1),
    "data 2": Layout(data=2, micro_batch=2),
    "attention again": Layout(micro_batch=2, recompute="selective"),
    "layers again": Layout(pipeline=2, micro_batch=1, recompute="full"),
    "tensor 2, pipeline 2": Layout(tensor=2, pipeline=2, micro_batch=1),
}
ROWS, LENGTH = 4, 256


def configuration(layout: Layout) -> TrainConfig:
    stage = StageConfig(sequence_length=LENGTH, global_batch_size=ROWS, micro_batch_size=layout.micro_batch)
    parallel = ParallelConfig(layout.tensor, layout.pipeline, layout.context, layout.data, recompute=layout.recompute)
    return TrainConfig(model=MODEL, stage=stage, parallel=parallel)


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_every_rank_is_predicted(name, pool):
    layout = LAYOUTS[name]
    batch = Batch(LENGTH, ROWS, LENGTH / 2)
    measured = pool.run(measure, configuration(layout), ranks=layout.world_size)
    per_stage = layout.world_size // layout.pipeline
    for rank, found in enumerate(measured):
        stage = rank // per_stage
        plan = stage_memory(ModelShape.of(MODEL), layout, batch, stage, moves_rows=layout.context > 1)
        assert found["parameters"] * 4 == plan.weights
        assert found["weights"] == pytest.approx(plan.weights, rel=0.01)  # padded for sharding
        assert found["gradients"] == pytest.approx(plan.gradients, rel=0.02)
        assert found["optimizer"] == pytest.approx(plan.optimizer, rel=0.05)
        # The head's chunk of logits is no saved tensor; tests/model/test_head.py holds its size.
        kept = plan.activations + layer_again(layout, batch, stage)
        assert found["activations"] == pytest.approx(kept, rel=0.05)
        whole = plan.weights + plan.gradients + plan.optimizer + kept
        assert sum(found.values()) - found["parameters"] == pytest.approx(whole, rel=0.05)


def layer_again(layout: Layout, batch: Batch, stage: int) -> float:
    """What the backward pass of the last layer brings back, less what is gone by then."""
    if layout.recompute != "full":
        return 0.0
    plain = replace(layout, recompute="none")
    hidden = layout.local_tokens(batch) * MODEL.hidden_size * 4
    gone = hidden  # its input is kept already
    if stage == layout.pipeline - 1:
        gone += 3 * hidden + 16 * layout.local_tokens(batch)  # around the final norm; labels and losses
    return layer_activation_bytes(ModelShape.of(MODEL), plain, batch, moves_rows=False) - gone
