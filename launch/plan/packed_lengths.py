"""How long the documents of a stage really are: from the packed rows that it would read first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline.loading.loader import PackedDataSource
from model.vocabulary import Vocabulary
from training.config import TrainConfig
from training.objectives.registry import options_of

NUM_ROWS = 128


def mean_document_tokens(config: TrainConfig, num_rows: int = NUM_ROWS) -> float | None:
    """The mean length of the document that a token is in, over the first rows of the mixture; None before it is packed.

    Sum of squared lengths over sum of lengths, so that half of it is what a token attends to. Raises `UserError` for rows
    that the stage could not read either.
    """
    datasets = {name: entry for name, entry in config.stage.data.datasets.items() if entry.weight != 0}
    options = options_of(config)
    if not datasets or not all((Path(entry.path) / "dataset.json").is_file() for entry in datasets.values()):
        return None
    rows = PackedDataSource(
        datasets={name: entry.path for name, entry in datasets.items()},
        weights={name: entry.weight for name, entry in datasets.items()},
        seed=config.seed,
        sequence_length=config.stage.sequence_length,
        global_batch_size=num_rows,
        micro_batch_size=num_rows,
        data_parallel_rank=0,
        data_parallel_size=1,
        loss_weights=asdict(options.loss_weights),
        document_attention=options.document_attention,
        vocabulary=Vocabulary.from_config(config.model.vocabulary),
        prefetch_batches=0,
        stage=config.stage.name,
    )
    (batch,) = rows.batch(0)
    rows.close()
    lengths = np.diff(batch.cu_seqlens).astype(np.float64)
    return float(np.square(lengths).sum() / lengths.sum())
