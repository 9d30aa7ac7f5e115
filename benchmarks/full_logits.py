"""Cross entropy over the logits of all tokens by megatron-core: what the chunked head is measured and tested against."""

from __future__ import annotations

from typing import Any

import torch

from model.parallel.megatron import parallel_state, vocab_parallel_cross_entropy
from model.vocabulary import Vocabulary


class _MaskColumns(torch.autograd.Function):
    """Sets the columns from `first` on to -inf, in place.

    Their probability is exactly zero, so the gradient that the cross entropy sends back is zero there already and
    passes through untouched: no copy of the logits in either direction.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, first: int) -> torch.Tensor:
        logits[..., first:] = float("-inf")
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def token_losses(logits: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Cross entropy of each token: logits [..., padded vocabulary / tensor], labels int64 [...] -> float32 [...].

    Ids that only pad the vocabulary take no part. The logits are overwritten.
    """
    start = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    num_valid = max(0, vocabulary.size - start)
    if num_valid < logits.shape[-1]:
        logits = _MaskColumns.apply(logits, num_valid)
    return vocab_parallel_cross_entropy(logits, labels)
