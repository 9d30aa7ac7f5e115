"""Core attention: packed documents, context parallelism, decoding with a cache.

megatron-core's layers call `PackedAttention` with the projected heads. What is particular to a batch (where documents
lie, positions, the cache) travels in `packed_seq_params`, which megatron hands down unread: `PackedDocuments` in
training, `CachedSequences` in decoding. RoPE is applied here from the positions given, so that documents may start
anywhere and any layout sees the same angles.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from model.backbone.key_value_cache import KeyValueCache
from model.parallel.megatron import (
    MegatronModule,
    PackedSeqParams,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)

# Lengths are rounded up to steps of this ratio, so that a few batched calls serve all spans.
_LENGTH_RATIO = 1.25


@dataclass
class SpanBatch:
    """Spans of similar length that one call attends to: `num_spans` of `query_length` x `key_length`."""

    num_spans: int
    query_length: int
    key_length: int
    mask: torch.Tensor | None  # bool [query_length, key_length], true where attended; None: causal


@dataclass
class RowMoves:
    """How tokens get into the padded rows of the batches, and back.

    Spans are padded to the length of their batch by repeating their last token. Causal attention never looks at
    what lies behind, and nothing reads the outputs of the repeats, so they change neither values nor gradients.
    """

    query_rows: torch.Tensor  # int64, the query token (of this rank) of each padded row
    key_rows: torch.Tensor  # int64, the key token (of all context ranks) of each padded row
    home_rows: torch.Tensor  # int64 [T_local], the padded row of each query token


@dataclass(kw_only=True)
class PackedDocuments(PackedSeqParams):
    """One micro-batch of packed documents, flattened to T tokens; T_local = T / context of them on this rank."""

    rotary_cos: torch.Tensor  # [T_local, 1, head_dim]
    rotary_sin: torch.Tensor
    batches: list[SpanBatch]
    moves: RowMoves | None  # None: spans of one length side by side, the rows are the tokens
    gathered_order: torch.Tensor | None  # int64 [T], token -> its row after the gather; None: one context rank


@dataclass(kw_only=True)
class CachedSequences(PackedSeqParams):
    """B sequences that decode in step: t new tokens each behind what `cache` holds of them."""

    cache: KeyValueCache
    slots: torch.Tensor  # int64 [B, t], where the new keys go
    reach: int  # slots that any row may attend to
    mask: torch.Tensor | None  # bool [B, 1, t, reach], true where attended; None: one token, equal lengths
    rotary_cos: torch.Tensor  # [t, B, 1, head_dim]
    rotary_sin: torch.Tensor


def rotary_tables(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoPE's angles at the given positions, each [*positions, head_dim] (two equal halves)."""
    frequency = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    )
    angles = position_ids.to(torch.float32)[..., None] * frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `heads` [..., num_heads, head_dim] by tables that broadcast to it."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def context_token_ids(num_tokens: int, context_rank: int, context_size: int) -> np.ndarray:
    """Which of a micro-batch's flattened tokens a context-parallel rank holds: int64 [num_tokens / context_size].

    The tokens are cut into 2 * context_size equal chunks and rank r takes chunk r and, counted from the end, chunk r,
    so that causal attention over long documents costs every rank the same.
    """
    if context_size == 1:
        return np.arange(num_tokens)
    assert num_tokens % (2 * context_size) == 0, "tokens of a micro-batch must divide by 2 * context"
    chunks = np.arange(num_tokens).reshape(2 * context_size, -1)
    return np.concatenate((chunks[context_rank], chunks[2 * context_size - 1 - context_rank]))


def pack_documents(
    cu_seqlens: np.ndarray,
    position_ids: torch.Tensor,
    *,
    head_dim: int,
    rope_theta: float,
    dtype: torch.dtype = torch.float32,
    context_rank: int = 0,
    context_size: int = 1,
) -> PackedDocuments:
    """Describe one micro-batch for `PackedAttention`.

    `cu_seqlens` int [spans + 1] bounds the attention spans over all T flattened tokens; `position_ids` int64
    [T_local] are those of this context rank's tokens (see `context_token_ids`).
    """
    device = position_ids.device
    total = int(cu_seqlens[-1])
    held = context_token_ids(total, context_rank, context_size)
    assert position_ids.shape == held.shape, "position_ids must be those of this context rank's tokens"
    queries, keys = _pieces(np.asarray(cu_seqlens, dtype=np.int64), held, context_size)
    batches, moves = _group_spans(queries, keys, device)
    order = None
    if context_size > 1:
        gathered = [context_token_ids(total, rank, context_size) for rank in range(context_size)]
        order = torch.from_numpy(np.argsort(np.concatenate(gathered))).to(device)
    cos, sin = rotary_tables(position_ids, head_dim, rope_theta, dtype)
    return PackedDocuments(
        qkv_format="thd",
        rotary_cos=cos[:, None],
        rotary_sin=sin[:, None],
        batches=batches,
        moves=moves,
        gathered_order=order,
    )


def _pieces(cu_seqlens: np.ndarray, held: np.ndarray, context_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention spans as this rank sees them: (start, length) of queries and of keys, two int64 [pieces, 2].

    Query starts count this rank's tokens, key starts all tokens. A span that began in an earlier chunk has more keys
    than queries.
    """
    chunk_length = held.size if context_size == 1 else held.size // 2
    queries, keys = [], []
    for local_start in range(0, held.size, chunk_length):
        first = int(held[local_start])
        starts = np.maximum(cu_seqlens[:-1], first)
        ends = np.minimum(cu_seqlens[1:], first + chunk_length)
        inside = ends > starts
        starts, ends, span_starts = starts[inside], ends[inside], cu_seqlens[:-1][inside]
        queries.append(np.stack((starts - first + local_start, ends - starts), axis=1))
        keys.append(np.stack((span_starts, ends - span_starts), axis=1))
    return np.concatenate(queries), np.concatenate(keys)


def _group_spans(
    queries: np.ndarray, keys: np.ndarray, device: torch.device
) -> tuple[list[SpanBatch], RowMoves | None]:
    """Few batches of spans of similar length, and the rows that lead into and out of them."""
    lengths = queries[:, 1]
    complete = lengths == keys[:, 1]
    steps = np.ceil(np.log(lengths) / np.log(_LENGTH_RATIO)).astype(np.int64)
    groups = [np.flatnonzero(complete & (steps == step)) for step in np.unique(steps[complete])]
    groups += [np.array([index]) for index in np.flatnonzero(~complete)]
    batches, query_rows, key_rows = [], [], []
    home = np.empty(int(lengths.sum()), dtype=np.int64)
    num_rows = 0
    for members in groups:
        query_length, key_length = int(lengths[members].max()), int(keys[members, 1].max())
        query_tokens, valid = _padded_tokens(queries[members], query_length)
        key_tokens, _ = _padded_tokens(keys[members], key_length)
        mask = None
        if key_length != query_length:
            mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
            mask = mask.tril(key_length - query_length)
        home[query_tokens[valid]] = num_rows + np.flatnonzero(valid)
        num_rows += query_tokens.size
        query_rows.append(query_tokens.ravel())
        key_rows.append(key_tokens.ravel())
        batches.append(SpanBatch(len(members), query_length, key_length, mask))
    rows = [np.concatenate(query_rows), np.concatenate(key_rows), home]
    if all(np.array_equal(row, np.arange(home.size)) for row in rows):
        return batches, None
    return batches, RowMoves(*(torch.from_numpy(row).to(device) for row in rows))


def _padded_tokens(spans: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, length] of spans (start, length), the last one repeated; and which of them are not repeats."""
    offsets = np.arange(length)[None]
    return spans[:, :1] + np.minimum(offsets, spans[:, 1:] - 1), offsets < spans[:, 1:]


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


class PackedAttention(MegatronModule):
    """Drop-in `core_attention` of megatron-core's layers: causal within each document, grouped queries, RoPE."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        self.layer_index = layer_number - 1
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key/value [T, groups, d] -> [T, heads * d]; with a cache [t, B, ...] likewise."""
        assert attention_mask is None, "masks come from packed_seq_params"
        if isinstance(packed_seq_params, CachedSequences):
            return self._attend_cached(query, key, value, packed_seq_params)
        assert isinstance(packed_seq_params, PackedDocuments), "packed_seq_params must be PackedDocuments"
        return self._attend_documents(query, key, value, packed_seq_params)

    def _attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments
    ) -> torch.Tensor:
        query = apply_rotary(query, packed.rotary_cos, packed.rotary_sin)
        key = apply_rotary(key, packed.rotary_cos, packed.rotary_sin)
        if packed.gathered_order is not None:
            key = self._gather_context(key, packed.gathered_order)
            value = self._gather_context(value, packed.gathered_order)
        moves = packed.moves
        if moves is None:
            return self._attend_batches(query, key, value, packed.batches)
        query = _MoveRows.apply(query, moves.query_rows, moves.home_rows)
        if packed.gathered_order is None:
            key = _MoveRows.apply(key, moves.key_rows, moves.home_rows)
            value = _MoveRows.apply(value, moves.key_rows, moves.home_rows)
        else:  # one key may serve two of this rank's chunks: its gradients add up
            key, value = key.index_select(0, moves.key_rows), value.index_select(0, moves.key_rows)
        return self._attend_batches(query, key, value, packed.batches).index_select(0, moves.home_rows)

    def _gather_context(self, heads: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """All context ranks' tokens, in their order; the gradient is summed back to the rank that owns a token."""
        gathered = gather_from_sequence_parallel_region(heads.contiguous(), group=self.context_group)
        return gathered.index_select(0, order)

    def _attend_batches(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batches: list[SpanBatch]
    ) -> torch.Tensor:
        """Padded rows in, padded rows out: [rows, heads, d] -> [rows, heads * d]."""
        query_sizes = [batch.num_spans * batch.query_length for batch in batches]
        key_sizes = [batch.num_spans * batch.key_length for batch in batches]
        pieces = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), batches, strict=True)
        outputs = []
        for batch_query, batch_key, batch_value, batch in pieces:
            with self._dropout_stream():
                attended = functional.scaled_dot_product_attention(
                    _spans_first(batch_query, batch.num_spans),
                    _spans_first(batch_key, batch.num_spans),
                    _spans_first(batch_value, batch.num_spans),
                    attn_mask=batch.mask,
                    is_causal=batch.mask is None,
                    scale=self.softmax_scale,
                    enable_gqa=True,
                    dropout_p=self.dropout if self.training else 0.0,
                )
            outputs.append(attended.transpose(1, 2).reshape(batch_query.shape[0], -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _dropout_stream(self) -> AbstractContextManager[None]:
        """This tensor-parallel rank's own random stream: its heads are no other rank's.

        With sequence parallelism megatron-core's layers run inside that stream as a whole.
        """
        if self.training and self.dropout > 0.0 and not self.config.sequence_parallel:
            stream: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
            return stream
        return nullcontext()

    def _attend_cached(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: CachedSequences
    ) -> torch.Tensor:
        query = apply_rotary(query, step.rotary_cos, step.rotary_sin)
        key = apply_rotary(key, step.rotary_cos, step.rotary_sin)
        step.cache.write(self.layer_index, step.slots, key.transpose(0, 1), value.transpose(0, 1))
        attended = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            step.cache.keys[self.layer_index, :, : step.reach].transpose(1, 2),
            step.cache.values[self.layer_index, :, : step.reach].transpose(1, 2),
            attn_mask=step.mask,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return attended.permute(2, 0, 1, 3).flatten(2)  # [t, B, heads * d]


def _spans_first(rows: torch.Tensor, num_spans: int) -> torch.Tensor:
    """[num_spans * length, heads, d] -> [num_spans, heads, length, d], a view."""
    return rows.view(num_spans, -1, *rows.shape[1:]).transpose(1, 2)
