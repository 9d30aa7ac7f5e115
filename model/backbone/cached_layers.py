"""The transformer's layers as decoding runs them: the arithmetic of megatron-core's layers, without their bookkeeping.

A step of decoding has few tokens and many layers, so that what a layer does beside its products decides the rate: on a
CPU megatron-core's modules take three times as long as the operations in them. The weights are the modules' own; they
are never copied. `tests/model/test_transformer.py` holds these numbers against the modules'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional

from model.backbone.packed_attention import CachedSequences
from model.parallel.megatron import GPTModel, reduce_from_tensor_model_parallel_region


def has_known_layers(model: GPTModel) -> bool:
    """The layers are those that `run_layers` and `TokenStep` know, not Transformer Engine's."""
    return isinstance(model.decoder.layers[0].input_layernorm, torch.nn.RMSNorm)


def is_plain(model: GPTModel) -> bool:
    """`run_layers` does what the layers do: it knows them, and none has an adapter."""
    return has_known_layers(model) and model.model_config.adapter.rank == 0


def run_layers(model: GPTModel, hidden: torch.Tensor, step: CachedSequences) -> torch.Tensor:
    """All layers and the final norm on new tokens [t, B, h]; keys and values go to the cache of `step`.

    Tensor parallel as the modules are, without sequence parallelism; every rank returns the same. No gradient.
    """
    core = model.config
    epsilon, is_split = core.layernorm_epsilon, core.tensor_model_parallel_size > 1

    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], module.weight, epsilon)

    def summed(x: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = reduce_from_tensor_model_parallel_region(x) if is_split else x
        return whole

    num_groups, width = step.cache.num_groups, core.kv_channels
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        fused = functional.linear(norm(hidden, layer.input_layernorm), attention.linear_qkv.weight)
        # For each group its queries, its key, its value.
        fused = fused.unflatten(-1, (num_groups, -1))
        query, key, value = fused.split([fused.shape[-1] - 2 * width, width, width], dim=-1)
        query = query.reshape(*query.shape[:2], -1, width)
        attended = attention.core_attention(
            norm(query, attention.q_layernorm), norm(key, attention.k_layernorm), value, packed_seq_params=step
        )
        hidden = hidden + summed(functional.linear(attended, attention.linear_proj.weight))
        gated = functional.linear(norm(hidden, layer.pre_mlp_layernorm), mlp.linear_fc1.weight)
        gate, up = gated.chunk(2, dim=-1)
        hidden = hidden + summed(functional.linear(functional.silu(gate) * up, mlp.linear_fc2.weight))
    return norm(hidden, model.decoder.final_layernorm)
