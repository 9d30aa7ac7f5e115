"""From micro-batches to losses: what one rank feeds its stage and what it adds up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from data_pipeline.loading.batch import MicroBatch
from model.backbone.attention_plan import packed_documents
from model.backbone.context_parallel import held_tokens
from model.backbone.packed_attention import PlannedAttention, prepare_attention
from model.backbone.token_losses import sum_losses, token_losses
from model.backbone.transformer import DTYPES
from model.config import ModelConfig
from model.parallel.megatron import parallel_state
from model.vocabulary import TokenClass, Vocabulary
from training.engines.base import StepResult


@dataclass
class StepTotals:
    """Of a global batch, known before the forward pass because rows are packed offline."""

    weight: float
    tokens_by_class: np.ndarray  # float64 [classes], labels with loss
    tokens_by_source: np.ndarray  # float64 [sources]
    num_tokens: int

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch], num_sources: int) -> StepTotals:
        """Of this data-parallel rank's part."""
        totals = cls(0.0, np.zeros(len(TokenClass)), np.zeros(num_sources), 0)
        for batch in micro_batches:
            counted = batch.loss_weights > 0
            totals.weight += float(batch.loss_weights.sum(dtype=np.float64))
            totals.tokens_by_class += np.bincount(batch.loss_classes[counted], minlength=len(TokenClass))
            sources = np.bincount(batch.sources[counted], minlength=num_sources)
            assert len(sources) == num_sources, "a micro-batch names a source that the engine was not told of"
            totals.tokens_by_source += sources
            totals.num_tokens += batch.tokens.size
        return totals

    def reduced(self, device: torch.device) -> StepTotals:
        """Summed over data-parallel ranks: one small collective."""
        flat = np.concatenate(([self.weight, self.num_tokens], self.tokens_by_class, self.tokens_by_source))
        values = torch.from_numpy(flat).to(device)
        distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
        summed = values.cpu().numpy()
        classes = len(self.tokens_by_class)
        return StepTotals(float(summed[0]), summed[2 : 2 + classes], summed[2 + classes :], int(summed[1]))


@dataclass
class StageInput:
    """One micro-batch as tensors; tokens are flattened, those of this context rank."""

    tokens: torch.Tensor  # int64 [1, T_local]
    labels: torch.Tensor  # int64 [1, T_local]
    weights: torch.Tensor  # float32 [T_local]
    classes: torch.Tensor  # int64 [T_local]
    sources: torch.Tensor  # int64 [T_local]
    documents: PlannedAttention


class MicroStep:
    """Forward of every micro-batch of one global batch, with the sums that its report needs."""

    def __init__(self, config: ModelConfig, totals: StepTotals, device: torch.device):
        self.config = config
        self.totals = totals
        self.device = device
        self.vocabulary = Vocabulary.from_config(config.vocabulary)
        self.loss_scale = 1.0 / totals.weight if totals.weight > 0 else 0.0
        self.num_sources = len(totals.tokens_by_source)
        self.sums = torch.zeros(1 + len(TokenClass) + self.num_sources, dtype=torch.float64, device=device)

    def prepare(self, batch: MicroBatch) -> StageInput:
        context_rank = parallel_state.get_context_parallel_rank()
        context_size = parallel_state.get_context_parallel_world_size()
        held = held_tokens(batch.tokens.size, context_rank, context_size)

        def flat(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            values = array.reshape(-1)
            if context_size > 1:
                values = values[held]
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)

        documents = prepare_attention(
            packed_documents(batch.cu_seqlens),
            flat(batch.position_ids, torch.int64),
            head_dim=self.config.head_dim,
            rope_theta=self.config.rope_theta,
            dtype=DTYPES[self.config.dtype],
            context_rank=context_rank,
            context_size=context_size,
        )
        return StageInput(
            tokens=flat(batch.tokens, torch.int64)[None],
            labels=flat(batch.labels, torch.int64)[None],
            weights=flat(batch.loss_weights, torch.float32),
            classes=flat(batch.loss_classes, torch.int64),
            sources=flat(batch.sources.astype(np.int64), torch.int64),
            documents=documents,
        )

    def forward(self, inputs: Iterator[StageInput], model: Any) -> tuple[torch.Tensor, Any]:
        """megatron-core's forward step: the stage's output and the function that turns it into a loss."""
        stage_input = next(inputs)
        output = model(stage_input.tokens, None, None, packed_seq_params=stage_input.documents)
        return output, partial(self._loss, stage_input)

    def _loss(self, stage_input: StageInput, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        losses = token_losses(logits, stage_input.labels, self.vocabulary).view(-1)
        sums = sum_losses(losses, stage_input.weights, stage_input.classes, stage_input.sources, self.num_sources)
        self.sums += sums.flat()
        loss = torch.dot(losses, stage_input.weights) * self.loss_scale
        no_tokens = torch.zeros([], dtype=torch.int, device=self.device)  # normalisation is in loss_scale
        return loss, no_tokens, None

    def result(self, gradient_norm: float, source_names: Sequence[str]) -> StepResult:
        """The report, the same on every rank: only last stages have sums, and one tensor rank of each counts."""
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            self.sums.zero_()
        distributed.all_reduce(self.sums)
        weighted, by_class, by_source = self.sums.cpu().split([1, len(TokenClass), self.num_sources])
        class_names = [kind.name.lower() for kind in TokenClass]
        totals = self.totals
        return StepResult(
            loss=float(weighted) * self.loss_scale,
            gradient_norm=gradient_norm,
            loss_by_class=_means(class_names, by_class, totals.tokens_by_class),
            loss_by_source=_means(source_names, by_source, totals.tokens_by_source),
            tokens_by_class=_counts(class_names, totals.tokens_by_class),
            tokens_by_source=_counts(source_names, totals.tokens_by_source),
            num_tokens=totals.num_tokens,
        )


def _means(names: Sequence[str], sums: torch.Tensor, counts: np.ndarray) -> dict[str, float]:
    rows = zip(names, sums.tolist(), counts.tolist(), strict=True)
    return {name: total / count for name, total, count in rows if count > 0}


def _counts(names: Sequence[str], counts: np.ndarray) -> dict[str, int]:
    return {name: int(count) for name, count in zip(names, counts.tolist(), strict=True)}
