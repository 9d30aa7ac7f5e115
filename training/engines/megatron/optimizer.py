"""megatron-core's optimizer around AdamW, and its state as parts of logical parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from model.parallel import cpu_backend
from model.parallel.megatron import (
    DistributedOptimizer,
    MegatronOptimizer,
    MegatronOptimizerConfig,
    get_megatron_optimizer,
    gradients_for_norm,
)
from training.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(config: OptimizerConfig, wrapped_model: Any, *, distributed: bool) -> MegatronOptimizer:
    """AdamW over the parameters of a DDP-wrapped model, its moments allocated.

    Weight decay is decoupled and spares the norms (parameters of one dimension). `distributed` shards the state over
    the data-parallel ranks.
    """
    dtype = next(wrapped_model.parameters()).dtype
    core_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        decoupled_weight_decay=True,
        clip_grad=config.gradient_clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    chained = get_megatron_optimizer(core_config, [wrapped_model], use_gloo_process_groups=False)
    (optimizer,) = chained.chained_optimizers
    for group in optimizer.optimizer.param_groups:
        # megatron-core only marks the parameters that it spares; its scheduler, which is not used here, would apply it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    if type(optimizer.optimizer) is torch.optim.AdamW:
        for group in optimizer.optimizer.param_groups:
            group.update(fused=True, foreach=False)
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.optimizer.state[parameter]
            state.update({name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS})
    set_step(optimizer, 0)
    return optimizer


def _has_step_in_state(optimizer: MegatronOptimizer) -> bool:
    """torch's AdamW counts steps for each parameter, the fused ones of Apex and Transformer Engine for each group."""
    return isinstance(optimizer.optimizer, torch.optim.AdamW)


def get_step(optimizer: MegatronOptimizer) -> int:
    """Steps applied so far (for the bias correction)."""
    for group in optimizer.optimizer.param_groups:
        if not _has_step_in_state(optimizer):
            return int(group.get("step", 0))
        for parameter in group["params"]:
            return int(optimizer.optimizer.state[parameter]["step"])
    return 0


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    for group in optimizer.optimizer.param_groups:
        if not _has_step_in_state(optimizer):
            group["step"] = step
            continue
        for parameter in group["params"]:
            # The fused step wants its count where the parameter is.
            count = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
            optimizer.optimizer.state[parameter]["step"] = count


def squared_gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """float32 [1], of the global gradient, on the device; megatron-core's own `get_grad_norm` waits for the number."""
    norm = torch.nn.utils.get_total_norm(gradients_for_norm(optimizer))
    device = "cuda" if cpu_backend.has_accelerator() else "cpu"  # a rank may hold no gradient at all
    squared = norm.to(device, torch.float32).reshape(1) ** 2.0
    distributed.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    for group in optimizer.optimizer.param_groups:
        group["lr"] = learning_rate


@dataclass
class OptimizedPart:
    """What this rank's optimizer holds of one local parameter: elements [start, stop) of it, flattened."""

    start: int
    stop: int
    main: torch.Tensor  # float32 master weights
    moments: dict[str, torch.Tensor]  # float32, shaped like `main`


def optimized_parts(optimizer: MegatronOptimizer, model: torch.nn.Module) -> dict[str, OptimizedPart]:
    """By local parameter name; with the distributed optimizer each data-parallel rank holds its own range."""
    parts = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, DistributedOptimizer):
            if parameter not in optimizer.model_param_group_index_map:
                continue
            group, order = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            held = optimizer._get_model_param_range_map(parameter)["param"]
            start, stop = held.start, held.end
        else:
            main = getattr(parameter, "main_param", parameter)
            start, stop = 0, parameter.numel()
        state = optimizer.optimizer.state[main]
        parts[name] = OptimizedPart(start, stop, main.detach(), {moment: state[moment] for moment in MOMENTS})
    return parts
