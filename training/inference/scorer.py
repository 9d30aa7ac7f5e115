"""Runs a checkpoint over documents in any layout and gives the log-probability of every token after the first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from model.backbone.attention_plan import packed_documents
from model.backbone.context_parallel import held_tokens
from model.backbone.packed_attention import prepare_attention
from model.backbone.token_losses import token_losses
from model.backbone.transformer import DTYPES, build_model
from model.checkpoint.reader import CheckpointReader
from model.config import ModelConfig
from model.parallel import cpu_backend, groups
from model.parallel.groups import RENDEZVOUS_VARIABLE
from model.parallel.megatron import get_forward_backward_func, parallel_state
from model.parallel.sharding import load_weights
from model.vocabulary import Vocabulary
from training.config import ParallelConfig
from training.inference.scoring import Documents, ScoreConfig, open_inputs, writing

# Tokens whose logits exist at once: all ids of a large vocabulary take a megabyte each.
LOGIT_ROWS = 512

Packed = list[int]  # numbers of the documents of one forward pass


def score(config: ScoreConfig) -> dict[str, Any] | None:
    """Score all documents of `config`; every rank of the layout calls it. The figures on rank 0, else None."""
    folder, model, documents = open_inputs(config)
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
            rendezvous = os.environ.get(RENDEZVOUS_VARIABLE)
            alone = {} if layout.world_size > 1 else {"rank": 0, "world_size": 1}
            groups.initialize(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                context=layout.context,
                init_method=f"file://{rendezvous}" if rendezvous else None,
                **alone,
            )
        self.config = config
        self.vocabulary = Vocabulary.from_config(config.vocabulary)
        self.device = torch.device("cuda" if cpu_backend.has_accelerator() else "cpu")
        self.is_last = parallel_state.is_pipeline_last_stage()
        self.model = build_model(
            config,
            sequence_parallel=False,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=self.is_last,
        )
        load_weights(self.model, reader)
        self.model.eval().to(self.device)
        # The last stage stops at the hidden states: logits of all tokens at once would not fit.
        self.model.post_process = False

    def close(self) -> None:
        if self._opened_layout:
            groups.destroy()

    @torch.inference_mode()
    def run(self, documents: Documents, tokens_per_batch: int) -> Iterator[tuple[int, np.ndarray]]:
        """(document, float32 [length - 1]) in order, the same on every rank."""
        context = parallel_state.get_context_parallel_world_size()
        capacity = max(int(documents.lengths.max()), min(tokens_per_batch, int(documents.lengths.sum())))
        capacity = -(-capacity // (2 * context)) * 2 * context
        batches = list(pack(documents.lengths, capacity))
        data_size = parallel_state.get_data_parallel_world_size()
        data_rank = parallel_state.get_data_parallel_rank()
        # As many batches on their way as there are stages: none of them waits.
        num_micro = parallel_state.get_pipeline_model_parallel_world_size()
        for start in range(0, len(batches), data_size * num_micro):
            chosen = batches[start : start + data_size * num_micro]
            chosen += [[]] * (data_size * num_micro - len(chosen))
            mine = chosen[data_rank * num_micro : (data_rank + 1) * num_micro]
            values = torch.zeros(data_size, num_micro, capacity, device=self.device)
            self._forward(documents, mine, capacity, values[data_rank])
            distributed.all_reduce(values)
            rows = values.view(-1, capacity).cpu().numpy()
            for batch, row in zip(chosen, rows, strict=True):
                position = 0
                for index in batch:
                    length = int(documents.lengths[index])
                    yield index, row[position : position + length - 1]
                    position += length

    def _forward(self, documents: Documents, batches: Sequence[Packed], capacity: int, values: torch.Tensor) -> None:
        """Fill `values` [batches, capacity] where this rank is the one to tell; zeros elsewhere."""
        inputs = iter(
            (self._prepare(documents, batch, capacity), values[number]) for number, batch in enumerate(batches)
        )
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=inputs,
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=capacity,
            micro_batch_size=1,
            forward_only=True,
        )

    def _prepare(self, documents: Documents, batch: Packed, capacity: int) -> dict[str, Any]:
        ids = [documents.get(index) for index in batch]
        padding = capacity - sum(map(len, ids))
        ids += [np.full(padding, self.vocabulary.pad)] if padding else []
        tokens = np.concatenate(ids)
        positions = np.concatenate([np.arange(len(one)) for one in ids])
        size = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        held = held_tokens(capacity, rank, size)

        def local(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[held].astype(np.int64)).to(self.device)

        packed = prepare_attention(
            packed_documents(np.cumsum([0, *map(len, ids)])),
            local(positions),
            head_dim=self.config.head_dim,
            rope_theta=self.config.rope_theta,
            dtype=DTYPES[self.config.dtype],
            context_rank=rank,
            context_size=size,
        )
        return {
            "tokens": local(tokens),
            "labels": local(np.roll(tokens, -1)),
            "packed": packed,
            "held": torch.from_numpy(held).to(self.device),
        }

    def _forward_step(self, inputs: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        """megatron-core's forward step."""
        batch, values = next(inputs)
        output = model(batch["tokens"][None], None, None, packed_seq_params=batch["packed"])
        return output, partial(self._keep, batch, values)

    def _keep(
        self, batch: dict[str, Any], values: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """On the last stage: hidden states [T, 1, h] to log-probabilities of the labels."""
        parts = []
        for block, labels in zip(hidden.split(LOGIT_ROWS), batch["labels"].split(LOGIT_ROWS), strict=True):
            logits, _ = self.model.output_layer(block)
            parts.append(-token_losses(logits[:, 0].float(), labels, self.vocabulary))
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            values[batch["held"]] = torch.cat(parts)
        return (torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int, device=self.device), {})


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
