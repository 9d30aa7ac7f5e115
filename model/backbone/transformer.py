"""Builds megatron-core's GPTModel from a ModelConfig."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as functional

from model.backbone.adapters import add_adapters
from model.backbone.packed_attention import PackedAttention
from model.config import ModelConfig
from model.parallel import cpu_backend
from model.parallel.initialization import initialize
from model.parallel.megatron import (
    CUDA_GRAPH_FIELD,
    GPTModel,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    parallel_state,
)
from model.parallel.sharding import mark_split_parameters
from model.vocabulary import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor and its mark for sequence-parallel gradients."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


# What is computed again in the backward pass instead of being kept, in megatron-core's terms.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def megatron_config(
    config: ModelConfig, *, sequence_parallel: bool = True, recompute: str = "none"
) -> TransformerConfig:
    """megatron-core's configuration of this model in the layout that is initialised (see `model.parallel.groups`)."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    dtype = DTYPES[config.dtype]
    on_cpu = not cpu_backend.has_accelerator()
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        gated_linear_unit=True,
        activation_func=functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        # One number in three places: hidden_dropout acts after the embedding and on both residual branches.
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel and tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # see model.parallel.initialization
        # The loss is normalised by the total weight of the global batch: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        batch_p2p_comm=not on_cpu,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=not on_cpu,
        gradient_accumulation_fusion=False,
        barrier_with_L1_time=False,
        **{CUDA_GRAPH_FIELD: []},
        **RECOMPUTE[recompute],
    )


def _layer_spec(*, has_adapters: bool) -> ModuleSpec:
    """A layer of Transformer Engine's modules where it is installed on a GPU, of megatron-core's own otherwise.

    Adapters need the latter: Transformer Engine's linear layers take their input before the norm.
    """
    if not has_adapters and cpu_backend.has_accelerator() and importlib.util.find_spec("transformer_engine"):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        layer.self_attention.submodules.q_layernorm = RMSNorm
        layer.self_attention.submodules.k_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def build_model(
    config: ModelConfig,
    *,
    seed: int | None = None,
    sequence_parallel: bool = True,
    recompute: str = "none",
    pre_process: bool = True,
    post_process: bool = True,
    device: torch.device | str | None = None,
) -> GPTModel:
    """This rank's part of the model in the layout that `model.parallel.groups.initialize` has set.

    `pre_process` / `post_process`: with embedding / with final norm and output layer (first and last pipeline stage).
    `recompute` names one of `RECOMPUTE`. `seed` fills the weights (see `model.parallel.initialization`); without it they are undefined, to be loaded. `device="meta"`
    gives shapes only. Forward takes tokens [1, T] and `PlannedAttention`, and returns logits [1, T, V / tensor]
    (hidden states on stages without `post_process`).
    """
    with torch.device(device) if device is not None else nullcontext():
        model = new_model(
            config,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            pre_process=pre_process,
            post_process=post_process,
        )
    mark_split_parameters(model)
    if seed is not None:
        initialize(model, config, seed)
    return model


def new_model(
    config: ModelConfig, *, sequence_parallel: bool, recompute: str, pre_process: bool = True, post_process: bool = True
) -> GPTModel:
    """The modules of `build_model`: weights undefined, none marked as split, made in whatever context it is called."""
    core_config = megatron_config(config, sequence_parallel=sequence_parallel, recompute=recompute)
    num_layers = get_num_layers_to_build(core_config, pp_rank=parallel_state.get_pipeline_model_parallel_rank())
    has_adapters = config.adapter.rank > 0
    block = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(has_adapters=has_adapters)] * num_layers, layer_norm=RMSNorm
    )
    model = GPTModel(
        core_config,
        block,
        vocab_size=Vocabulary.from_config(config.vocabulary).padded_size,
        max_sequence_length=config.max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="none",  # RoPE is applied by PackedAttention
    )
    if has_adapters:
        add_adapters(model, config.adapter)
    model.model_config = config
    return model
