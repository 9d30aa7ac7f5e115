"""A plan computed by torch's scaled_dot_product_attention: pieces of similar length batched, in rows padded for it.

It runs on every device, in every dtype and with dropout. Masks are needed only by causal pieces with more keys than
queries (context parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from model.backbone.attention_plan import AttentionPlan, starts_of

# Lengths are rounded up to steps of this ratio, so that a few batched calls serve all causal pieces.
_LENGTH_RATIO = 1.25


@dataclass
class PieceBatch:
    """Pieces that one call attends to: `num_pieces` of `query_length` x `key_length`."""

    num_pieces: int
    query_length: int
    key_length: int
    causal: bool  # the square kind, by the kernel's own flag
    mask: torch.Tensor | None  # bool [query_length, key_length], true where attended; None: all, or causal


@dataclass
class RowMoves:
    """How tokens get into the padded rows of the batches, and back.

    Square causal pieces are padded to the length of their batch by repeating their last token. Causal attention never
    looks at what lies behind, and nothing reads the outputs of the repeats, so they change neither values nor gradients.
    """

    query_rows: torch.Tensor  # int64, the query token (of this rank) of each padded row
    key_rows: torch.Tensor  # int64, the key token (of all context ranks) of each padded row
    home_rows: torch.Tensor  # int64 [T_local], the padded row of each query token
    keys_are_queries: bool  # each token is a key exactly where it is a query: `home_rows` holds for keys as well


@dataclass
class SdpaPieces:
    batches: list[PieceBatch]
    moves: RowMoves | None  # None: the rows are the tokens


def prepare(plan: AttentionPlan, held: np.ndarray, device: torch.device) -> SdpaPieces:
    """Batches for a rank's plan, whose queries are the tokens `held` int64 [T_local] (ascending)."""
    query_starts = np.searchsorted(held, plan.queries[:, 0])
    key_tokens, key_starts = plan.key_tokens(), starts_of(plan.key_lengths)
    batches, query_rows, key_rows = [], [], []
    home = np.empty(held.size, dtype=np.int64)
    num_rows = 0
    for members in _groups(plan):
        query_lengths, key_lengths = plan.query_lengths[members], plan.key_lengths[members]
        queries, valid = _padded(query_starts[members], query_lengths)
        keys, _ = _padded(key_starts[members], key_lengths)
        batches.append(_batch(queries.shape, keys.shape[1], bool(plan.causal[members[0]]), device))
        home[queries[valid]] = num_rows + np.flatnonzero(valid)
        num_rows += queries.size
        query_rows.append(queries.ravel())
        key_rows.append(key_tokens[keys].ravel())
    rows = [np.concatenate(query_rows), np.concatenate(key_rows), home]
    if all(np.array_equal(row, np.arange(plan.num_tokens)) for row in rows):
        return SdpaPieces(batches, None)
    same = held.size == plan.num_tokens and np.array_equal(rows[0], rows[1])
    tensors = [torch.from_numpy(row).to(device) for row in rows]
    return SdpaPieces(batches, RowMoves(tensors[0], tensors[1], tensors[2], keys_are_queries=same))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: SdpaPieces, scale: float | None, dropout: float
) -> torch.Tensor:
    """query [T_local, heads, d], key and value [T, groups, d] -> [T_local, heads * d]."""
    moves = pieces.moves
    if moves is None:
        return _attend_batches(query, key, value, pieces.batches, scale, dropout)
    query = _MoveRows.apply(query, moves.query_rows, moves.home_rows)  # type: ignore[no-untyped-call]
    if moves.keys_are_queries:
        key = _MoveRows.apply(key, moves.key_rows, moves.home_rows)  # type: ignore[no-untyped-call]
        value = _MoveRows.apply(value, moves.key_rows, moves.home_rows)  # type: ignore[no-untyped-call]
    else:  # one key may serve several pieces: its gradients add up
        key, value = key.index_select(0, moves.key_rows), value.index_select(0, moves.key_rows)
    return _attend_batches(query, key, value, pieces.batches, scale, dropout).index_select(0, moves.home_rows)


def _groups(plan: AttentionPlan) -> list[np.ndarray]:
    """Which pieces share a call: square causal ones of similar length, full ones of one shape, others alone."""
    lengths = plan.query_lengths
    square = plan.causal & (lengths == plan.key_lengths)
    steps = np.ceil(np.log(lengths) / np.log(_LENGTH_RATIO)).astype(np.int64)
    groups = [np.flatnonzero(square & (steps == step)) for step in np.unique(steps[square])]
    groups += [np.array([index]) for index in np.flatnonzero(plan.causal & ~square)]
    shapes = np.stack((lengths, plan.key_lengths), axis=1)
    for shape in np.unique(shapes[~plan.causal], axis=0):
        groups.append(np.flatnonzero(~plan.causal & (shapes == shape).all(axis=1)))
    return groups


def _batch(queries_shape: tuple[int, ...], key_length: int, causal: bool, device: torch.device) -> PieceBatch:
    num_pieces, query_length = queries_shape
    mask = None
    if causal and key_length != query_length:
        mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
        mask = mask.tril(key_length - query_length)
    return PieceBatch(num_pieces, query_length, key_length, causal and mask is None, mask)


def _padded(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [n, longest] of ranges, the last one of each repeated; and which of them are not repeats."""
    offsets = np.arange(lengths.max())[None]
    return starts[:, None] + np.minimum(offsets, lengths[:, None] - 1), offsets < lengths[:, None]


class _MoveRows(torch.autograd.Function):
    """`values[rows]` for padded rows whose repeats get no gradient: the way back is a plain selection as well."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: torch.Tensor, home_rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(home_rows)
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (home_rows,) = ctx.saved_tensors
        return gradients[0].index_select(0, home_rows), None, None


def _attend_batches(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batches: list[PieceBatch],
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Padded rows in, padded rows out: [rows, heads, d] -> [rows, heads * d]."""
    query_sizes = [batch.num_pieces * batch.query_length for batch in batches]
    key_sizes = [batch.num_pieces * batch.key_length for batch in batches]
    parts = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), batches, strict=True)
    outputs = []
    for batch_query, batch_key, batch_value, batch in parts:
        attended = functional.scaled_dot_product_attention(
            _pieces_first(batch_query, batch.num_pieces),
            _pieces_first(batch_key, batch.num_pieces),
            _pieces_first(batch_value, batch.num_pieces),
            attn_mask=batch.mask,
            is_causal=batch.causal,
            scale=scale,
            enable_gqa=True,
            dropout_p=dropout,
        )
        outputs.append(attended.transpose(1, 2).reshape(batch_query.shape[0], -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _pieces_first(rows: torch.Tensor, num_pieces: int) -> torch.Tensor:
    """[num_pieces * length, heads, d] -> [num_pieces, heads, length, d], a view."""
    return rows.view(num_pieces, -1, *rows.shape[1:]).transpose(1, 2)
