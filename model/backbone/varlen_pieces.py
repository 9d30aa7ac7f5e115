"""A plan computed by `torch.nn.attention.varlen.varlen_attn` (flash kernels on CUDA): no padding and no masks.

A call takes pieces of any lengths side by side, bounded by cu_seqlens, queries apart from keys, all of them causal or
all of them full. A causal piece with more keys than queries is aligned to its last key there, as it is in a plan.
Hence one call for the causal pieces of a plan and one for the full pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.backbone.attention_plan import AttentionPlan, range_tokens, starts_of

DTYPES = (torch.bfloat16, torch.float16)  # what the flash kernels take


@dataclass
class VarlenCall:
    """One call: N pieces of one kind."""

    causal: bool
    query_rows: torch.Tensor | None  # int64, the query tokens (of this rank) of the pieces; None: all, in order
    key_rows: torch.Tensor | None  # int64, the key tokens (of all context ranks); None: all, in order
    cu_seqlens_q: torch.Tensor  # int32 [N + 1]
    cu_seqlens_k: torch.Tensor  # int32 [N + 1]
    max_q: int
    max_k: int


@dataclass
class VarlenPieces:
    calls: list[VarlenCall]
    home_rows: torch.Tensor | None  # int64 [T_local], each query token's row in the outputs; None: in order


def prepare(plan: AttentionPlan, held: np.ndarray, device: torch.device) -> VarlenPieces:
    """Calls for a rank's plan, whose queries are the tokens `held` int64 [T_local] (ascending)."""
    query_starts = np.searchsorted(held, plan.queries[:, 0])
    key_tokens, key_starts = plan.key_tokens(), starts_of(plan.key_lengths)
    calls, outputs = [], []
    for causal in (True, False):
        members = np.flatnonzero(plan.causal == causal)
        if not members.size:
            continue
        query_lengths, key_lengths = plan.query_lengths[members], plan.key_lengths[members]
        queries = range_tokens(query_starts[members], query_lengths)
        keys = key_tokens[range_tokens(key_starts[members], key_lengths)]
        calls.append(
            VarlenCall(
                causal=causal,
                query_rows=_rows(queries, held.size, device),
                key_rows=_rows(keys, plan.num_tokens, device),
                cu_seqlens_q=_bounds(query_lengths, device),
                cu_seqlens_k=_bounds(key_lengths, device),
                max_q=int(query_lengths.max()),
                max_k=int(key_lengths.max()),
            )
        )
        outputs.append(queries)
    return VarlenPieces(calls, _rows(np.argsort(np.concatenate(outputs)), held.size, device))


def _rows(tokens: np.ndarray, num_tokens: int, device: torch.device) -> torch.Tensor | None:
    """Rows to select; None where that would be every row in its order."""
    if np.array_equal(tokens, np.arange(num_tokens)):
        return None
    return torch.from_numpy(tokens).to(device)


def _bounds(lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))).to(device, torch.int32)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: VarlenPieces,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """query [T_local, heads, d], key and value [T, groups, d], 16 bits on CUDA -> [T_local, heads * d]."""
    outputs = []
    for call in pieces.calls:
        queries = _select(query, call.query_rows)
        keys, values = _select(key, call.key_rows), _select(value, call.key_rows)
        outputs.append(_flash(queries, keys, values, call, scale, dropout))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _select(joined, pieces.home_rows).flatten(1)


def _select(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values if rows is None else values.index_select(0, rows)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall, scale: float | None, dropout: float
) -> torch.Tensor:
    """One call of the flash kernel: query [Q, heads, d], key and value [K, groups, d] -> [Q, heads, d]."""
    bounds = (call.cu_seqlens_q, call.cu_seqlens_k, call.max_q, call.max_k)
    # num_splits: a document's values do not depend on what else is in its batch.
    if dropout > 0.0:
        # The operator below varlen_attn, which fixes dropout at 0; torch's nested tensors call it with dropout, too.
        result: torch.Tensor = torch.ops.aten._flash_attention_forward(
            query, key, value, *bounds, dropout, call.causal, False, scale=scale, num_splits=1
        )[0]
        return result
    # Importing it loads torch's compiler, which a host without CUDA never needs.
    from torch.nn.attention import varlen

    window = (-1, 0) if call.causal else (-1, -1)
    output = varlen.varlen_attn(
        query, key, value, *bounds, scale=scale, window_size=window, enable_gqa=True, num_splits=1
    )
    assert isinstance(output, torch.Tensor), "no auxiliary outputs were asked for"
    return output
