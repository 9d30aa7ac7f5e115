"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a GPTModel, in every layout.

    y = W x + alpha / rank * B A x       A [rank, in], B [out, rank]; B starts at zero, so training starts from W.

An adapter is a child `lora` of its linear layer and is added by a hook, so the layer and its name stay megatron-core's. A of
a column-parallel layer and B of a row-parallel one are held alike by all tensor-parallel ranks; the others are split
as the layer's weight is. The fused layers (queries, keys and values; gate and up) have one A for all their parts.

Adapters may act on copies of images alone (`AdapterConfig.tokens`): all other tokens then give bit for bit what
they give without adapters, since nothing sees a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from model.config import AdapterConfig
from model.parallel.megatron import (
    GPTModel,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    parallel_state,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")  # split by the rows of W; the others by its columns


@dataclass
class ActiveTokens:
    """Which tokens the adapters of one transformer layer act on in the forward pass that is under way."""

    chosen: torch.Tensor | bool = True  # bool [t], of this context rank; True: all, False: none

    def watch(self, _: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        """Forward hook ahead of the layer, which runs again where the layer is recomputed."""
        self.chosen = arguments["packed_seq_params"].copies


class Adapter(nn.Module):
    """alpha / rank * B A x of one linear layer: inputs as the layer has them, outputs as it returns them."""

    def __init__(
        self,
        weight: torch.Tensor,
        shape: tuple[int, int],
        config: AdapterConfig,
        active: ActiveTokens,
        *,
        is_column_parallel: bool,
        sequence_parallel: bool,
    ):
        """`weight` is this rank's part of the layer's, of `shape` [out, in]; an engine may have cut it further."""
        super().__init__()
        self.scale, self.active = config.scale, active
        self.is_column_parallel, self.sequence_parallel = is_column_parallel, sequence_parallel
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.a = nn.Parameter(torch.empty(config.rank, shape[1], **options))
        self.b = nn.Parameter(torch.zeros(shape[0], config.rank, **options))
        # Held by all tensor-parallel ranks, while each sees its own part of the sequence: megatron-core adds up the
        # gradients of parameters with this mark.
        whole = self.a if is_column_parallel else self.b
        whole.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.linear(x, self.a)
        if self.is_column_parallel:
            inner = (
                gather_from_sequence_parallel_region(inner)
                if self.sequence_parallel
                else copy_to_tensor_model_parallel_region(inner)
            )
        elif self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner)
        return functional.linear(inner, self.b) * self.scale

    def changed(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The layer's output `values` with this adapter's added where it acts."""
        chosen = self.active.chosen
        if chosen is False:
            return values
        if chosen is True:
            everywhere: torch.Tensor = values + self(x)
            return everywhere
        if self.sequence_parallel:
            return self._changed_parts(x, values, chosen)
        places = torch.nonzero(chosen).squeeze(-1)
        return values.index_add(0, places, self(x[places]))

    def _changed_parts(self, x: torch.Tensor, values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Where tensor-parallel ranks hold a part of the tokens each: computed for all, since parts must be alike in size."""
        if not self.is_column_parallel:  # outputs are this rank's tokens
            size = parallel_state.get_tensor_model_parallel_world_size()
            chosen = chosen.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return torch.where(chosen[:, None, None], values + self(x), values)


def _add_adapter(layer: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
    """Forward hook of megatron-core's linear layers, which return (output, bias)."""
    values, bias = output
    return layer.lora.changed(inputs[0], values), bias


def _with_gradient(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    """What frozen embeddings return: recomputation passes gradients only through inputs that ask for one."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def add_adapters(model: GPTModel, config: AdapterConfig) -> None:
    """Freeze the model's own parameters and put an adapter on every layer named in `config.modules`."""
    model.requires_grad_(False)
    sequence_parallel = model.config.sequence_parallel
    for block in model.decoder.layers:
        active = ActiveTokens()
        if config.tokens == "copies":
            block.register_forward_pre_hook(active.watch, with_kwargs=True)
        for name, layer in list(block.named_modules()):
            kind = name.rpartition(".")[2]
            if kind in config.modules:
                is_column_parallel = kind in COLUMN_PARALLEL
                layer.lora = Adapter(
                    layer.weight,
                    (layer.output_size_per_partition, layer.input_size)
                    if is_column_parallel
                    else (layer.output_size, layer.input_size_per_partition),
                    config,
                    active,
                    is_column_parallel=is_column_parallel,
                    sequence_parallel=sequence_parallel,
                )
                layer.register_forward_hook(_add_adapter)
    if model.pre_process:
        model.embedding.register_forward_hook(_with_gradient)
