"""The only door to megatron-core: the import hook for hosts without an accelerator, then every name that we use.

Versions 0.16 and 0.19 serve. Where a name differs, this module has it under one, chosen by what the installed version
offers.
"""

import dataclasses
import logging

import torch

from model.parallel import cpu_backend

cpu_backend.install()

from megatron.core import __version__ as megatron_version
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.utils import set_model_to_sequence_parallel

# The field of `TransformerConfig` that says what CUDA graphs capture: 0.19's name for 0.16's `cuda_graph_scope`.
_FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}
CUDA_GRAPH_FIELD = "cuda_graph_modules" if "cuda_graph_modules" in _FIELDS else "cuda_graph_scope"

# 0.19 says at every start that GPTModel will get no new features; its successor is not in 0.16.
logging.getLogger(GPTModel.__module__).addFilter(lambda record: "GPTModel IS DEPRECATED" not in record.getMessage())


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """This rank's gradients that count in the global norm: over all ranks of the optimizer each counts once."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        gradients: list[torch.Tensor] = optimizer.get_grads_for_grad_norm()
    else:
        gradients = optimizer.get_main_grads_for_grad_norm()
    return gradients


__all__ = [
    "CUDA_GRAPH_FIELD",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "GPTModel",
    "MegatronModule",
    "MegatronOptimizer",
    "MegatronOptimizerConfig",
    "ModuleSpec",
    "PackedSeqParams",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "clip_grad_by_total_norm_fp32",
    "copy_to_tensor_model_parallel_region",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_cuda_rng_tracker",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "gradients_for_norm",
    "megatron_version",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "set_model_to_sequence_parallel",
    "vocab_parallel_cross_entropy",
]
