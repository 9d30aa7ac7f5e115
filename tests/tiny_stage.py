"""A next-token stage of the real engine that takes milliseconds a step, and the packed rows it trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileWriter
from model.vocabulary import Vocabulary
from training.config import DatasetEntry, TrainConfig

STEPS = 12


def shrink(config: TrainConfig, packed: Path) -> None:
    """Data parallel 2 with the distributed optimizer; dropout, so that random streams matter."""
    config.stage.name, config.stage.steps, config.stage.sequence_length = "tiny", STEPS, 64
    config.stage.global_batch_size, config.stage.micro_batch_size = 4, 1
    config.stage.data.datasets = {"text": DatasetEntry(path=str(packed))}
    config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size = 2, 32, 64
    config.model.num_attention_heads = config.model.num_query_groups = 2
    config.model.head_dim, config.model.dropout = 16, 0.1
    config.model.vocabulary.text_size, config.model.vocabulary.visual_size = 64, 64
    config.parallel.data = 2
    config.checkpoint.every_steps = 3
    config.logging.wandb_mode = "disabled"


def make_config(folder: Path, packed: Path) -> TrainConfig:
    config = TrainConfig(run_folder=str(folder))
    shrink(config, packed)
    return config


def write_packed(folder: Path) -> Path:
    """Sixty short documents; the folder of their packed rows."""
    vocabulary = Vocabulary.from_config(make_config(folder, folder).model.vocabulary)
    generator = np.random.default_rng(5)
    manifest = {
        "kind": "tokens",
        "num_documents": 60,
        "vocabulary": vocabulary.describe(),
        "sources": ["text"],
        "text_tokenizer": "text-1",
        "vision_tokenizer": None,
        "inputs": [],
        "quarantined": {},
    }
    with TokenFileWriter(folder / "tokens" / "000000") as writer:
        for _ in range(60):
            segments = np.zeros(1, SEGMENT_DTYPE)
            segments["kind"], segments["length"] = Kind.TEXT, 40
            segments["flags"] = Flag.DOCUMENT_START | Flag.SPLITTABLE
            writer.add(generator.integers(0, 64, 40).astype(np.int32), segments)
        writer.finish(manifest)
    pack({"text": folder / "tokens"}, folder / "packed", PackConfig(sequence_length=64))
    return folder / "packed"
