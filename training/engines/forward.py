"""Micro-batches of an objective through this rank's part of the model, under megatron-core's schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from model.backbone.context_parallel import held_tokens
from model.backbone.head import TokenScores
from model.backbone.packed_attention import PlannedAttention, prepare_attention
from model.backbone.transformer import DTYPES
from model.config import ModelConfig
from model.parallel.megatron import GPTModel, get_forward_backward_func, parallel_state
from model.vocabulary import Vocabulary
from training.contracts.inputs import InputMaker, LocalInput, LossMaker, ModelInput


@dataclass
class StageInput:
    """One micro-batch on this rank's device; those tokens of it that this context rank holds."""

    tokens: torch.Tensor  # int64 [1, T_local]
    attention: PlannedAttention
    scored: LocalInput
    held: np.ndarray  # int64 [T_local], places of these tokens in the whole micro-batch


class Forward:
    """What every use of the transformer on whole micro-batches shares: inputs by rank, the schedule, the sums.

    `model` is this rank's part, `called` what the schedule calls: the same wrapped for data parallelism in training.
    The last stage is left with its hidden states; `TokenScores` takes them to log-probabilities a chunk at a time.
    """

    def __init__(self, config: ModelConfig, model: GPTModel, device: torch.device, called: Any = None):
        self.config, self.model, self.device = config, model, device
        self.called = model if called is None else called
        model.post_process = False
        self.vocabulary = Vocabulary.from_config(config.vocabulary)
        self.context_rank = parallel_state.get_context_parallel_rank()
        self.context_size = parallel_state.get_context_parallel_world_size()

    def prepare(self, inputs: ModelInput) -> StageInput:
        """This rank's part of a micro-batch; the same for every pipeline stage."""
        held = held_tokens(inputs.tokens.size, self.context_rank, self.context_size)
        noisy = inputs.fields.get("noisy")
        attention = prepare_attention(
            inputs.plan,
            self._local(inputs.position_ids, held, torch.int64),
            head_dim=self.config.head_dim,
            rope_theta=self.config.rope_theta,
            dtype=DTYPES[self.config.dtype],
            context_rank=self.context_rank,
            context_size=self.context_size,
            copies=None if noisy is None else self._local(noisy, held, torch.bool),
        )
        scored = LocalInput(
            labels=self._local(inputs.labels, held, torch.int64),
            weights=self._local(inputs.weights, held, torch.float32),
            fields={name: self._local(values, held) for name, values in inputs.fields.items()},
        )
        return StageInput(self._local(inputs.tokens, held, torch.int64)[None], attention, scored, held)

    def losses(self, batches: Sequence[Any], objective: LossMaker, totals: torch.Tensor) -> torch.Tensor:
        """Forward and backward of all micro-batches; float64 [num_sums], what this rank adds to the report.

        Only last stages have sums, and one tensor-parallel rank of each counts.
        """
        sums = torch.zeros(objective.num_sums, dtype=torch.float64, device=self.device)

        def loss(stage_input: StageInput, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            found = objective.loss(self._scores(output), stage_input.scored, totals)
            sums.add_(found.sums)
            return found.loss, _no_tokens(), None

        self._run(batches, objective, loss, forward_only=False)
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            sums.zero_()
        return sums

    @torch.no_grad()
    def log_probs(self, batches: Sequence[Any], objective: InputMaker) -> list[torch.Tensor]:
        """float32 [T] of each batch: the log-probability of every label, on every rank of this replica."""
        found: list[torch.Tensor] = []

        def keep(stage_input: StageInput, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            values = torch.zeros(len(stage_input.held) * self.context_size, device=self.device)
            held = torch.from_numpy(stage_input.held).to(self.device)
            values[held] = objective.label_log_probs(self._scores(output), stage_input.scored)
            found.append(values)
            return values.sum(), _no_tokens(), None

        self._run(batches, objective, keep, forward_only=True)
        if not found:  # not a last stage
            found = [torch.zeros(objective.inputs(batch).tokens.size, device=self.device) for batch in batches]
        for values in found:
            distributed.all_reduce(values, group=parallel_state.get_context_parallel_group())
            distributed.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
        return found

    def _run(self, batches: Sequence[Any], objective: InputMaker, on_output: Any, *, forward_only: bool) -> None:
        inputs = [objective.inputs(batch) for batch in batches]

        def forward_step(stage_inputs: Iterator[StageInput], model: Any) -> tuple[torch.Tensor, Any]:
            stage_input = next(stage_inputs)
            output = model(stage_input.tokens, None, None, packed_seq_params=stage_input.attention)
            return output, partial(on_output, stage_input)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(self.prepare(one) for one in inputs),
            model=[self.called],
            num_microbatches=len(inputs),
            seq_length=inputs[0].tokens.size,
            micro_batch_size=1,  # rows are flattened into one packed sequence
            forward_only=forward_only,
        )

    def _scores(self, hidden: torch.Tensor) -> TokenScores:
        return TokenScores(
            hidden,
            self.model.output_layer.weight,
            self.vocabulary,
            sequence_parallel=self.model.config.sequence_parallel,
        )

    def _local(self, values: np.ndarray, held: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.context_size > 1:
            values = values[held]
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)


def _no_tokens() -> torch.Tensor:
    """megatron-core would divide by a number of tokens; our losses are normalised already."""
    return torch.zeros([], dtype=torch.int, device="cpu")  # adds to a scalar on any device
