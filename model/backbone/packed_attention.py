"""Core attention: a plan over packed rows, context parallelism, decoding with a cache.

megatron-core's layers call `PackedAttention` with the projected heads. What is particular to a batch (its plan, its
positions, the cache) travels in `packed_seq_params`, which megatron hands down unread: `PlannedAttention` in training,
`CachedSequences` in decoding. RoPE is applied here from the positions given.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as functional

from model.backbone import sdpa_pieces, varlen_pieces
from model.backbone.attention_plan import AttentionPlan
from model.backbone.context_parallel import gather_tokens, gathered_order, held_tokens, slice_plan
from model.backbone.key_value_cache import KeyValueCache
from model.backbone.rotary import apply_rotary, rotary_tables
from model.parallel.megatron import MegatronModule, PackedSeqParams, get_cuda_rng_tracker


@dataclass(kw_only=True)
class PlannedAttention(PackedSeqParams):
    """One micro-batch, flattened to T tokens; T_local = T / context of them on this rank.

    What a kernel needs is prepared when the first layer asks for it, and serves all layers.
    """

    plan: AttentionPlan  # this rank's queries
    context_rank: int
    context_size: int
    rotary_cos: torch.Tensor  # [T_local, 1, head_dim]
    rotary_sin: torch.Tensor
    gathered_order: torch.Tensor | None  # int64 [T], token -> its row after the gather; None: one context rank
    copies: torch.Tensor | bool = (
        False  # bool [T_local], true for tokens of noisy copies of images; False: there is none
    )

    @cached_property
    def sdpa(self) -> sdpa_pieces.SdpaPieces:
        held = held_tokens(self.plan.num_tokens, self.context_rank, self.context_size)
        return sdpa_pieces.prepare(self.plan, held, self.rotary_cos.device)

    @cached_property
    def varlen(self) -> varlen_pieces.VarlenPieces:
        held = held_tokens(self.plan.num_tokens, self.context_rank, self.context_size)
        return varlen_pieces.prepare(self.plan, held, self.rotary_cos.device)


@dataclass(kw_only=True)
class CachedSequences(PackedSeqParams):
    """B sequences that decode in step: t new tokens each behind what `cache` holds of them."""

    cache: KeyValueCache
    slots: torch.Tensor  # int64 [B, t], where the new keys go
    reach: int  # slots that any row may attend to
    mask: torch.Tensor | None  # bool [B, 1, t, reach], true where attended; None: one token, equal lengths
    rotary_cos: torch.Tensor  # [t, B, 1, head_dim]
    rotary_sin: torch.Tensor
    copies: bool = False  # whether the new tokens are noisy copies of images


def prepare_attention(
    plan: AttentionPlan,
    position_ids: torch.Tensor,
    *,
    head_dim: int,
    rope_theta: float,
    dtype: torch.dtype = torch.float32,
    context_rank: int = 0,
    context_size: int = 1,
    copies: torch.Tensor | None = None,
) -> PlannedAttention:
    """Describe one micro-batch for `PackedAttention`.

    `plan` is that of the whole flattened row of T tokens; every token is a query in it. `position_ids` int64
    [T_local] are those of this context rank's tokens (see `context_parallel.held_tokens`). `copies` bool [T_local]: which
    of these belong to noisy copies of images, for adapters that act on no others.
    """
    plan_of_rank = slice_plan(plan, context_rank, context_size)
    num_held = plan.num_tokens // context_size
    assert position_ids.shape == (num_held,), "position_ids must be those of this context rank's tokens"
    assert int(plan_of_rank.query_lengths.sum()) == num_held, "a token of the row is not a query of the plan"
    order = None
    if context_size > 1:
        order = torch.from_numpy(gathered_order(plan.num_tokens, context_size)).to(position_ids.device)
    cos, sin = rotary_tables(position_ids, head_dim, rope_theta, dtype)
    return PlannedAttention(
        qkv_format="thd",
        plan=plan_of_rank,
        context_rank=context_rank,
        context_size=context_size,
        rotary_cos=cos[:, None],
        rotary_sin=sin[:, None],
        gathered_order=order,
        copies=False if copies is None else copies,
    )


class PackedAttention(MegatronModule):
    """Drop-in `core_attention` of megatron-core's layers: attends as a plan says, grouped queries, RoPE."""

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
        assert isinstance(packed_seq_params, PlannedAttention), "packed_seq_params must be PlannedAttention"
        return self._attend_planned(query, key, value, packed_seq_params)

    def _attend_planned(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planned: PlannedAttention
    ) -> torch.Tensor:
        query = apply_rotary(query, planned.rotary_cos, planned.rotary_sin)
        key = apply_rotary(key, planned.rotary_cos, planned.rotary_sin)
        if planned.gathered_order is not None:
            key = gather_tokens(key, planned.gathered_order, self.context_group)
            value = gather_tokens(value, planned.gathered_order, self.context_group)
        dropout = self.dropout if self.training else 0.0
        with self._dropout_stream():
            if takes_flash(query):
                return varlen_pieces.attend(query, key, value, planned.varlen, self.softmax_scale, dropout)
            return sdpa_pieces.attend(query, key, value, planned.sdpa, self.softmax_scale, dropout)

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
            step.cache.keys[self.layer_index, :, :, : step.reach],
            step.cache.values[self.layer_index, :, :, : step.reach],
            attn_mask=step.mask,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return attended.permute(2, 0, 1, 3).flatten(2)  # [t, B, heads * d]


def takes_flash(query: torch.Tensor) -> bool:
    """The choice of kernel: flash kernels run on CUDA in 16 bits, everything else as SDPA pieces."""
    return query.is_cuda and query.dtype in varlen_pieces.DTYPES
