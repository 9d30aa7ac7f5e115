"""Plain AdamW whose state is there from the start."""

from __future__ import annotations

import torch
from torch import nn

from training.config import OptimizerConfig


def adam(model: nn.Module, options: OptimizerConfig) -> torch.optim.AdamW:
    """An optimizer whose state is there from the start, so that a checkpoint of any step has the same keys."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        foreach=True,  # the same to the last bit as one parameter after the other, in fewer calls
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by `kind/parameter`."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for kind, value in optimizer.state[parameter].items()
    }
