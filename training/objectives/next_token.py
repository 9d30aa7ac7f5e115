"""Next-token prediction on packed sequences: pretraining and supervised finetuning."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.storage.packed_files import read_dataset_manifest
from model.vocabulary import Vocabulary
from training.config import DatasetEntry, TrainConfig

if TYPE_CHECKING:
    from training.stage import Job

CHECKPOINT_KIND = "transformer"
RENDEZVOUS_VARIABLE = "NEXTSTATE_RENDEZVOUS_FILE"  # set by launch/local/ranks.py; torchrun has its own


def build(config: TrainConfig) -> Job:
    """The megatron engine and this data-parallel rank's packed data."""
    from training.engines.megatron.engine import MegatronEngine
    from training.stage import Job

    rendezvous = os.environ.get(RENDEZVOUS_VARIABLE)
    engine = MegatronEngine(
        config,
        init_method=f"file://{rendezvous}" if rendezvous else None,
        timeout_seconds=config.reliability.hang_timeout_seconds or 1800.0,
    )
    stage = config.stage
    datasets = datasets_in_use(config)
    vocabulary = Vocabulary.from_config(config.model.vocabulary)
    data = PackedDataSource(
        datasets={name: entry.path for name, entry in datasets.items()},
        weights={name: entry.weight for name, entry in datasets.items()},
        seed=config.seed,
        sequence_length=stage.sequence_length,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        data_parallel_rank=engine.data_parallel_rank,
        data_parallel_size=engine.data_parallel_size,
        loss_weights=asdict(stage.loss_weights),
        document_attention=stage.document_attention,
        vocabulary=vocabulary,
        prefetch_batches=stage.data.prefetch_batches,
    )
    engine.source_names = data.source_names
    return Job(engine, data, describe_model(config, vocabulary))


def datasets_in_use(config: TrainConfig) -> dict[str, DatasetEntry]:
    """Those of the mixture with a weight: 0 leaves a dataset out, which then need not exist."""
    return {name: entry for name, entry in config.stage.data.datasets.items() if entry.weight != 0}


def describe_model(config: TrainConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a checkpoint says of its model: enough to rebuild it and to find tokenizers that fit."""
    tokenizers: dict[str, str | None] = {"text_tokenizer": None, "vision_tokenizer": None}
    for entry in datasets_in_use(config).values():
        manifest = read_dataset_manifest(entry.path)
        for name, known in tokenizers.items():
            tokenizers[name] = known or manifest.get(name)
    return {"kind": CHECKPOINT_KIND, "model": asdict(config.model), "vocabulary": vocabulary.describe()} | tokenizers
