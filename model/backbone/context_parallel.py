"""Context parallelism: which tokens a rank holds, the gather of keys and values, and a rank's slice of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model.backbone.attention_plan import AttentionPlan, join_plans
from model.parallel.megatron import gather_from_sequence_parallel_region


def held_ranges(num_tokens: int, context_rank: int, context_size: int) -> list[tuple[int, int]]:
    """The ranges (first, first behind) of a flattened row that a context-parallel rank holds, in their order.

    The tokens are cut into 2 * context_size equal chunks and rank r takes chunk r and, counted from the end, chunk r,
    so that causal attention over long documents costs every rank the same.
    """
    if context_size == 1:
        return [(0, num_tokens)]
    assert num_tokens % (2 * context_size) == 0, "tokens of a micro-batch must divide by 2 * context"
    length = num_tokens // (2 * context_size)
    chunks = (context_rank, 2 * context_size - 1 - context_rank)
    return [(chunk * length, (chunk + 1) * length) for chunk in chunks]


def held_tokens(num_tokens: int, context_rank: int, context_size: int) -> np.ndarray:
    """The tokens that a context-parallel rank holds: int64 [num_tokens / context_size], ascending."""
    return np.concatenate([np.arange(*bounds) for bounds in held_ranges(num_tokens, context_rank, context_size)])


def slice_plan(plan: AttentionPlan, context_rank: int, context_size: int) -> AttentionPlan:
    """The plan of the queries that a context-parallel rank holds; tokens keep their numbers in the whole row."""
    if context_size == 1:
        return plan
    return join_plans([plan.of_queries(*bounds) for bounds in held_ranges(plan.num_tokens, context_rank, context_size)])


def gathered_order(num_tokens: int, context_size: int) -> np.ndarray:
    """int64 [num_tokens], the row of each token when the ranks' tokens stand one rank behind the other."""
    ranks = [held_tokens(num_tokens, rank, context_size) for rank in range(context_size)]
    return np.argsort(np.concatenate(ranks))


def gather_tokens(heads: torch.Tensor, order: torch.Tensor, context_group: Any) -> torch.Tensor:
    """Heads of all context ranks' tokens, in the order of the row: [T_local, groups, d] -> [T, groups, d].

    `order` is `gathered_order`. The gradient is summed back to the rank that holds a token.
    """
    gathered = gather_from_sequence_parallel_region(heads.contiguous(), group=context_group)
    result: torch.Tensor = gathered.index_select(0, order)
    return result
