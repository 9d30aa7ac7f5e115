"""The predicted memory of a rank against what the engine's tensors take in real runs on the CPU."""

import pytest
from plan_runs import measure

from launch.plan.layout import Batch, Layout
from launch.plan.memory import stage_memory
from launch.plan.shape import ModelShape
from model.config import ModelConfig
from model.vocabulary import VocabularyConfig
from training.config import ParallelConfig, StageConfig, TrainConfig

MODEL = ModelConfig(
    num_layers=4, hidden_size=160, ffn_hidden_size=448, num_attention_heads=8, num_query_groups=2, head_dim=16,
    vocabulary=VocabularyConfig(text_size=900, reserved_size=16, visual_size=100, pad_multiple=64),
)  # fmt: skip
LAYOUTS = {
    "one rank": Layout(micro_batch=2),
    "tensor 2": Layout(tensor=2, micro_batch=2),
    "pipeline 2": Layout(pipeline=2, micro_batch=1),
    "context 2": Layout(context=2, micro_batch=1),
    "data 2": Layout(data=2, micro_batch=2),
    "tensor 2, pipeline 2": Layout(tensor=2, pipeline=2, micro_batch=1),
}
ROWS, LENGTH = 4, 256


def configuration(layout: Layout) -> TrainConfig:
    stage = StageConfig(
        sequence_length=LENGTH, global_batch_size=ROWS, micro_batch_size=layout.micro_batch
    )
    parallel = ParallelConfig(layout.tensor, layout.pipeline, layout.context, layout.data)
    return TrainConfig(model=MODEL, stage=stage, parallel=parallel)


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_every_rank_is_predicted(name, pool):
    layout = LAYOUTS[name]
    batch = Batch(LENGTH, ROWS, LENGTH / 2)
    measured = pool.run(measure, configuration(layout), ranks=layout.world_size)
    per_stage = layout.world_size // layout.pipeline
    for rank, found in enumerate(measured):
        stage = rank // per_stage
        plan = stage_memory(
            ModelShape.of(MODEL), layout, batch, stage, moves_rows=layout.context > 1
        )
        assert found["parameters"] * 4 == plan.weights
        assert found["weights"] == pytest.approx(plan.weights, rel=0.01)  # padded for sharding
        assert found["gradients"] == pytest.approx(plan.gradients, rel=0.02)
        assert found["optimizer"] == pytest.approx(plan.optimizer, rel=0.05)
        kept = plan.activations + plan.logits
        assert found["activations"] == pytest.approx(kept, rel=0.05)
        assert sum(found.values()) - found["parameters"] == pytest.approx(plan.kept, rel=0.05)
