"""Memory that only an update needs, given away while answers are drawn: gradients, moments and master weights.

The tensors stay what they are and so does all that shares their storage; only the storage goes and comes back. What a
caching allocator gets back so is free for the KV cache of the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.parallel.megatron import MegatronOptimizer
from training.engines.megatron.optimizer import MOMENTS


@contextmanager
def offloaded(wrapped_model: Any, optimizer: MegatronOptimizer) -> Iterator[None]:
    """For the time of the context the optimizer's state is on the host and the gradients are gone; then they are zero.

    Per rank this frees 4 bytes a parameter (gradients), and 8 (float32) or 12 (bfloat16, with master weights) for each
    parameter whose state this rank holds. Reading any of it inside the context is a crash or garbage.
    """
    gradients = [buffer.grad_data for buffer in [*wrapped_model.buffers, *wrapped_model.expert_parallel_buffers]]
    state = optimizer_tensors(wrapped_model, optimizer)
    kept = [tensor.detach().to("cpu", copy=True) for tensor in state]
    num_bytes = [tensor.untyped_storage().nbytes() for tensor in [*gradients, *state]]
    for tensor in [*gradients, *state]:
        tensor.untyped_storage().resize_(0)
    try:
        yield
    finally:
        for tensor, size in zip([*gradients, *state], num_bytes, strict=True):
            tensor.untyped_storage().resize_(size)
        with torch.no_grad():
            for tensor in gradients:
                tensor.zero_()
            for tensor, values in zip(state, kept, strict=True):
                tensor.copy_(values)


def optimizer_tensors(wrapped_model: Any, optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """Moments and master weights that this rank holds, each alone in its storage.

    Of a float32 model the master weights are the weights themselves, which drawing needs.
    """
    weights = {one.untyped_storage().data_ptr() for one in wrapped_model.parameters()}
    found: list[torch.Tensor] = []
    for group in optimizer.optimizer.param_groups:
        for main in group["params"]:
            moments = [optimizer.optimizer.state[main][name] for name in MOMENTS]
            masters = [main] if main.untyped_storage().data_ptr() not in weights else []
            found += [one for one in [*moments, *masters] if one.numel()]
    places = {one.untyped_storage().data_ptr() for one in found}
    assert len(places) == len(found), "two tensors of the optimizer share their storage"
    return found
