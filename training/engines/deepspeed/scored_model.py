"""The transformer and its head as the one module that DeepSpeed wraps, and micro-batches through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.parallel.megatron import GPTModel, PackedSeqParams
from training.contracts.inputs import InputMaker
from training.engines.deepspeed.library import ZeroEngine, deepspeed
from training.engines.forward import Forward

OnOutput = Callable[[torch.Tensor], tuple[torch.Tensor, Any, Any]]


class Head(nn.Module):
    """Where the output layer's weight is used: DeepSpeed gathers it around this module, forward and backward."""

    def forward(self, hidden: torch.Tensor, on_output: OnOutput) -> torch.Tensor:
        return on_output(hidden)[0]


class ScoredModel(nn.Module):
    """Tokens to whatever `on_output` makes of the hidden states, a scalar. Gradients come `replicas` times as large.

    DeepSpeed divides sums of gradients by the number of data-parallel ranks, and our losses are normalised over the
    global batch. The factor cannot stand in front of the loss, whose gradient the head has made by then: it stands on the two
    ways that gradients take from the head, into the hidden states and into the output layer's weight.
    """

    def __init__(self, model: GPTModel, replicas: int) -> None:
        super().__init__()
        self.model, self.head, self.replicas = model, Head(), replicas
        if model.output_layer.weight.requires_grad:
            model.output_layer.weight.register_hook(self._for_mean)

    def share_output_weight(self) -> None:
        """Of a model whose parameters are cut: the head reads a weight that belongs to another module."""
        deepspeed.zero.register_external_parameter(self.head, self.model.output_layer.weight)

    def forward(self, tokens: torch.Tensor, attention: PackedSeqParams, on_output: OnOutput) -> torch.Tensor:
        hidden = self.model(tokens, None, None, packed_seq_params=attention)
        if hidden.requires_grad:
            hidden.register_hook(self._for_mean)
        loss: torch.Tensor = self.head(hidden, on_output)
        return loss

    def _for_mean(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.replicas


class ZeroForward(Forward):
    """`Forward` with DeepSpeed's schedule: one micro-batch after the other, the last one ends the step."""

    def __init__(self, config: ModelConfig, model: GPTModel, device: torch.device, engine: ZeroEngine):
        super().__init__(config, model, device, called=engine)
        self.engine = engine

    def _run(self, batches: Sequence[Any], objective: InputMaker, on_output: Any, *, forward_only: bool) -> None:
        inputs: Iterator[Any] = (objective.inputs(batch) for batch in batches)
        for number, one in enumerate(inputs, 1):
            stage_input = self.prepare(one)
            if not forward_only:
                self.engine.set_gradient_accumulation_boundary(number == len(batches))
            loss = self.engine(stage_input.tokens, stage_input.attention, partial(on_output, stage_input))
            if not forward_only:
                self.engine.backward(loss, scale_wrt_gas=False)
