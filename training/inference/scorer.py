"""Runs a checkpoint over documents in any layout and gives the log-probability of every token after the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from model.backbone.attention_plan import packed_documents
from model.backbone.transformer import build_model
from model.checkpoint.reader import CheckpointReader
from model.config import ModelConfig
from model.parallel import cpu_backend, groups
from model.parallel.megatron import parallel_state
from model.parallel.sharding import load_weights
from model.vocabulary import Vocabulary
from training.config import ParallelConfig
from training.contracts.inputs import LocalInput, ModelInput, TokenScores
from training.engines.forward import Forward
from training.inference.scoring import Documents, Inputs, ScoreConfig, open_inputs, writing

Packed = list[int]  # numbers of the documents of one forward pass


def score(config: ScoreConfig, inputs: Inputs | None = None) -> dict[str, Any] | None:
    """Score all documents of `config`; every rank of the layout calls it. The figures on rank 0, else None.

    inputs: what `open_inputs` gave, where it was asked already.
    """
    folder, model, documents = inputs or open_inputs(config)
    with CheckpointReader(folder) as reader:
        scorer = Scorer(reader, replace(model, dtype=config.dtype), config.parallel)
    try:
        vocabulary = scorer.vocabulary
        out = Path(config.out) if config.out else None
        with writing(out, documents, vocabulary, enabled=distributed.get_rank() == 0) as file:
            for index, values in scorer.run(documents, config.tokens_per_batch):
                if file is not None:
                    file.put(index, values)
            return file.finish() if file is not None else None
    finally:
        scorer.close()


class Scorer:
    """This rank's part of the model. A layout that is already initialised is used as it is."""

    def __init__(self, reader: CheckpointReader, config: ModelConfig, layout: ParallelConfig):
        self._opened_layout = not groups.is_initialized()
        if self._opened_layout:
            alone = {} if layout.world_size > 1 else {"rank": 0, "world_size": 1}
            groups.initialize(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                context=layout.context,
                init_method=groups.launched_init_method(),
                **alone,
            )
        self.config = config
        self.vocabulary = Vocabulary.from_config(config.vocabulary)
        self.device = torch.device("cuda" if cpu_backend.has_accelerator() else "cpu")
        model = build_model(
            config,
            sequence_parallel=False,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        load_weights(model, reader)
        self.forward = Forward(config, model.eval().to(self.device), self.device)

    def close(self) -> None:
        if self._opened_layout:
            groups.destroy()

    def run(self, documents: Documents, tokens_per_batch: int) -> Iterator[tuple[int, np.ndarray]]:
        """(document, float32 [length - 1]) in order, the same on every rank."""
        context = parallel_state.get_context_parallel_world_size()
        capacity = max(int(documents.lengths.max()), min(tokens_per_batch, int(documents.lengths.sum())))
        capacity = -(-capacity // (2 * context)) * 2 * context
        batches = list(pack(documents.lengths, capacity))
        maker = DocumentInputs(documents, capacity, self.vocabulary.pad)
        data_size = parallel_state.get_data_parallel_world_size()
        data_rank = parallel_state.get_data_parallel_rank()
        # As many batches on their way as there are stages: none of them waits.
        num_micro = parallel_state.get_pipeline_model_parallel_world_size()
        for start in range(0, len(batches), data_size * num_micro):
            chosen = batches[start : start + data_size * num_micro]
            chosen += [[]] * (data_size * num_micro - len(chosen))
            mine = chosen[data_rank * num_micro : (data_rank + 1) * num_micro]
            values = torch.zeros(data_size, num_micro, capacity, device=self.device)
            values[data_rank] = torch.stack(self.forward.log_probs(mine, maker))
            distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
            rows = values.view(-1, capacity).cpu().numpy()
            for batch, row in zip(chosen, rows, strict=True):
                position = 0
                for index in batch:
                    length = int(documents.lengths[index])
                    yield index, row[position : position + length - 1]
                    position += length


class DocumentInputs:
    """Documents of one forward pass, one behind the other and filled up; see `training.contracts.inputs.InputMaker`."""

    def __init__(self, documents: Documents, capacity: int, pad: int):
        self.documents, self.capacity, self.pad = documents, capacity, pad

    def inputs(self, batch: Packed) -> ModelInput:
        ids = [self.documents.get(index) for index in batch]
        padding = self.capacity - sum(map(len, ids))
        ids += [np.full(padding, self.pad)] if padding else []
        tokens = np.concatenate(ids)
        return ModelInput(
            tokens=tokens,
            position_ids=np.concatenate([np.arange(len(one)) for one in ids]),
            plan=packed_documents(np.cumsum([0, *map(len, ids)])),
            labels=np.roll(tokens, -1),
            weights=np.ones(len(tokens), np.float32),
        )

    def label_log_probs(self, scores: TokenScores, inputs: LocalInput) -> torch.Tensor:
        return scores.log_probs(inputs.labels)


def pack(lengths: np.ndarray, capacity: int) -> Iterator[Packed]:
    """Documents in their order, as many at a time as `capacity` holds."""
    batch: Packed = []
    used = 0
    for index, length in enumerate(lengths.tolist()):
        if batch and used + length > capacity:
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += length
    if batch:
        yield batch
