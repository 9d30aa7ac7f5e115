"""What ZeRO keeps on this rank of each parameter: ranges of flattened parameters, in every stage.

DeepSpeed has three optimizers with three ways to lay things out. This is the one module that knows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from training.engines.deepspeed.library import (
    BF16_Optimizer,
    DeepSpeedZeRoOffload,
    DeepSpeedZeroOptimizer_Stage3,
    ZeroEngine,
    combine_grad_norm_groups,
    get_global_norm_of_tensors,
)
from training.engines.megatron.optimizer import MOMENTS

FIRST_MICRO_STEP = -1  # as DeepSpeed counts them in stages 1 and 2

ZeroOptimizer: TypeAlias = Any  # BF16_Optimizer (stage 1 in bfloat16), DeepSpeedZeroOptimizer (1, 2) or ..._Stage3 (3)


@dataclass(frozen=True)
class ZeroPart:
    """Elements [start, start + n) of a flattened local parameter: float32 views of what the optimizer holds."""

    start: int
    main: torch.Tensor  # [n], master weights
    moments: dict[str, torch.Tensor]  # [n] each


def is_cut(parameter: Any) -> bool:
    """Stage 3: the parameter itself is empty between uses."""
    return hasattr(parameter, "ds_tensor")


def held_weights(parameter: Any) -> tuple[int, torch.Tensor]:
    """(first element, flat view) of the weights that this rank holds between uses: all of them, or its part."""
    if not is_cut(parameter):
        return 0, parameter.detach().view(-1)
    part = parameter.ds_tensor.detach()
    start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    return start, part.view(-1)[: max(0, min(part.numel(), parameter.ds_numel - start))]


def flat_masters(optimizer: ZeroOptimizer) -> list[torch.Tensor]:
    """The float32 tensors that torch's optimizer steps."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        masters: list[torch.Tensor] = optimizer.fp32_partitioned_groups_flat
    elif isinstance(optimizer, BF16_Optimizer):
        masters = optimizer.fp32_groups_flat_partition
    else:
        masters = optimizer.single_partition_of_fp32_groups
    return masters


def allocate_state(engine: ZeroEngine) -> None:
    """Moments and counts from the start, so that a checkpoint of any step has the same keys."""
    # torch's fused step counts in float32, DeepSpeed's compiled one takes nothing but a whole number.
    is_torchs = isinstance(engine.basic_optimizer, torch.optim.AdamW)
    count_dtype = torch.float32 if is_torchs else torch.int64
    for flat in flat_masters(engine.optimizer):
        engine.basic_optimizer.state[flat] = {
            "step": torch.zeros((), dtype=count_dtype, device=flat.device),
            **{name: torch.zeros_like(flat) for name in MOMENTS},
        }


def get_step(engine: ZeroEngine) -> int:
    """Steps applied so far, for the bias correction."""
    for flat in flat_masters(engine.optimizer):
        return int(engine.basic_optimizer.state[flat]["step"])
    return 0


def set_step(engine: ZeroEngine, step: int) -> None:
    for flat in flat_masters(engine.optimizer):
        engine.basic_optimizer.state[flat]["step"].fill_(step)


def zero_parts(engine: ZeroEngine, parameters: Iterable[tuple[str, Any]]) -> dict[str, ZeroPart]:
    """By name; a parameter of which this rank's optimizer holds nothing, or that is frozen, is left out."""
    optimizer, parts = engine.optimizer, {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if is_cut(parameter):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, weights = held_weights(parameter)
            length = weights.numel()
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        if length == 0:
            continue
        flat = flat_masters(optimizer)[group]
        state = engine.basic_optimizer.state[flat]
        parts[name] = ZeroPart(
            start, flat.detach()[offset : offset + length], {m: state[m][offset : offset + length] for m in MOMENTS}
        )
    return parts


def forget_gathered(optimizer: ZeroOptimizer) -> None:
    """Drop whole parameters that stage 3 kept, before the parts are written: it would go on with the old values."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._partition_all_parameters()
    elif isinstance(optimizer, DeepSpeedZeRoOffload):  # a frozen model's
        optimizer.partition_all_parameters()


def gradient_norm(optimizer: ZeroOptimizer) -> torch.Tensor:
    """float32 [1], of the global gradient, before clipping; infinite where a gradient is not finite.

    DeepSpeed computes it inside of its step, too late to refuse the step; these are the functions that it calls there.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    elif isinstance(optimizer, BF16_Optimizer):
        gradients, _ = optimizer.get_grads_for_norm()
        norm = get_global_norm_of_tensors(gradients, mpu=optimizer.mpu)
    else:
        optimizer._wait_for_offload_copies()
        norm = optimizer.scaled_global_norm()
    norm = torch.as_tensor(norm, dtype=torch.float32).reshape(1)
    # Where a gradient is not finite DeepSpeed's norm is -1, whose square looks healthy.
    return torch.where(norm < 0, torch.inf, norm)


def discard_gradients(optimizer: ZeroOptimizer) -> None:
    """What DeepSpeed does itself with gradients that overflowed."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
        return
    optimizer.zero_grad(set_to_none=True)
    if isinstance(optimizer, BF16_Optimizer):
        return
    optimizer.micro_step_id = FIRST_MICRO_STEP
    optimizer._release_preflattened_grad_buffers()
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
    for group in optimizer.all_grad_tensors:
        optimizer.all_grad_tensors[group] = None
