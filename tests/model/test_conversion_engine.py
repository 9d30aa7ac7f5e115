"""A checkpoint that the engine itself wrote: resharded, exported and loaded again."""

import dataclasses

import torch

from model.checkpoint.reader import CheckpointReader
from model.config import ModelConfig
from model.conversion import actions
from model.conversion.actions import Options
from model.parallel import groups
from model.vocabulary import VocabularyConfig
from training.config import StageConfig, TrainConfig
from training.engines.megatron.engine import MegatronEngine
from training.reliability.checkpoint import CheckpointStore

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocabulary=VocabularyConfig(text_size=60, visual_size=9, pad_multiple=16),
)


def test_the_engines_own_checkpoint_survives_every_step(tmp_path):
    config = TrainConfig(model=MODEL, stage=StageConfig(sequence_length=64))
    groups.initialize(rank=0, world_size=1)
    engine = MegatronEngine(config)
    try:
        for number, shard in enumerate(engine.shards.optimizer_shards()):
            if shard.key != "optimizer/step":
                shard.tensor.fill_(0.5 + number)
        store = CheckpointStore(tmp_path, engine.ranks, engine.shards, 1, lambda phase: None)
        metadata = {"kind": "transformer", "step": 7, "model": dataclasses.asdict(MODEL)}
        written = store.save(7, metadata, "config: none\n")
        actions.reshard(written, tmp_path / "split", Options(tensor=2, pipeline=2))
        before = {
            (one.key, one.global_offset): one.tensor.clone()
            for one in engine.shards.model_shards() + engine.shards.optimizer_shards()
        }
        for shard in engine.shards.model_shards() + engine.shards.optimizer_shards():
            shard.tensor.zero_()
        store.load(tmp_path / "split")  # random streams stay: they are the old ranks'
        for shard in engine.shards.model_shards() + engine.shards.optimizer_shards():
            assert torch.equal(shard.tensor, before[shard.key, shard.global_offset]), shard.key
    finally:
        engine.close()
    actions.to_published(tmp_path / "split", tmp_path / "hf", "qwen3", Options())
    actions.from_published(tmp_path / "hf", tmp_path / "back", None, None, Options(pipeline=2))
    with CheckpointReader(written) as first, CheckpointReader(tmp_path / "back") as second:
        assert second.manifest["step"] == 7
        for name in second.keys():  # noqa: SIM118
            assert torch.equal(first.read_full(name), second.read_full(name)), name
