"""The next tokens of each sequence through all layers: the step that token-by-token decoding repeats.

A step has few tokens and many layers, so that what stands beside the matrix products decides the rate. The arithmetic is
that of megatron-core's modules; of each layer queries and keys share one norm and one rotation, the rotary tables of all
positions are made once, and the queries of a group attend as rows of one product, so that keys are never repeated. The
weights are the modules' own and are never copied. `tests/model/test_transformer.py` holds the numbers against the modules'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from model.backbone.key_value_cache import KeyValueCache
from model.backbone.rotary import rotary_tables
from model.parallel.megatron import GPTModel, reduce_from_tensor_model_parallel_region


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer. Norms of heads: [queries a group + 1, head_dim], the key's last."""

    attention_norm: torch.Tensor
    query_key_value: torch.Tensor
    head_norms: torch.Tensor
    projection: torch.Tensor
    scale: float | None  # of the attention's logits
    mlp_norm: torch.Tensor
    gate_and_up: torch.Tensor
    down: torch.Tensor


class TokenStep:
    """Over a model whose layers are plain for clean tokens (`cached_layers.is_plain`) and a cache that a prompt has filled.

    It counts along how long the rows are, so that a step waits for no device; whoever changes the cache's lengths
    makes another one. Tensor parallel as the modules are; every rank returns the same. No gradient.
    """

    def __init__(self, model: GPTModel, cache: KeyValueCache) -> None:
        core, config = model.config, model.model_config
        self.model, self.cache = model, cache
        self.epsilon, self.width = core.layernorm_epsilon, core.kv_channels
        self.is_split = core.tensor_model_parallel_size > 1
        self.num_groups = cache.num_groups
        # torch's own norm is one kernel on an accelerator and a dozen on a CPU.
        self.norm = plain_norm if not cache.keys.is_cuda and cache.keys.dtype == torch.float32 else functional.rms_norm
        self.layers = [self._layer(layer) for layer in model.decoder.layers]
        positions = torch.arange(cache.max_length, device=cache.keys.device)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, cache.keys.dtype)
        half = self.width // 2
        # Rotated are (first, second) into first * cos - second * sin, second * cos + first * sin.
        self.cos, self.sin = cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)
        self._count()
        self.rows = torch.arange(cache.batch_size, device=cache.keys.device)

    def _count(self) -> None:
        lengths = self.cache.lengths.tolist()
        self.longest = max(lengths)  # no row is longer
        self.are_even = min(lengths) == self.longest

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attention, layer.mlp
        queries = attention.linear_qkv.weight.shape[0] // (self.num_groups * self.width) - 2
        norms = [attention.q_layernorm.weight] * queries + [attention.k_layernorm.weight]
        return _Layer(
            layer.input_layernorm.weight,
            attention.linear_qkv.weight,
            torch.stack(norms).detach(),
            attention.linear_proj.weight,
            attention.core_attention.softmax_scale,
            layer.pre_mlp_layernorm.weight,
            mlp.linear_fc1.weight,
            mlp.linear_fc2.weight,
        )

    @torch.no_grad()
    def run(self, ids: torch.Tensor, advances: torch.Tensor | None = None) -> torch.Tensor:
        """Reads `ids` (int64 [B, t]): hidden states [B, h] of the last ones behind the final norm.

        `advances` (bool [B]): rows that stay as long as they are where it is False.
        """
        cache, count = self.cache, ids.shape[1]
        if self.longest + count > cache.max_length:
            self._count()  # rows that did not advance are shorter than what was counted
        reach = self.longest + count
        assert reach <= cache.max_length, f"the cache holds {cache.max_length} tokens, {reach} are needed"
        slots = self._slots(count)
        hidden = self.model.embedding(ids, None).transpose(0, 1)
        shape = (*hidden.shape[:2], 1, 1, self.width)
        cos, sin = (table[slots].expand(*hidden.shape[:2], -1).view(shape) for table in (self.cos, self.sin))
        mask = self._mask(slots, reach)
        for number, layer in enumerate(self.layers):
            hidden = self._through(
                layer, hidden, cache.keys[number], cache.values[number], cos, sin, slots, mask, reach
            )
        cache.lengths += count if advances is None else advances * count
        self.are_even &= advances is None
        self.longest += count
        return self._norm(hidden[:, -1], self.model.decoder.final_layernorm.weight)

    def _slots(self, count: int) -> torch.Tensor:
        """int64 [t] of all rows, or [B, t]: where in the cache the new tokens go, which is their position too."""
        if self.are_even:
            return torch.arange(self.longest, self.longest + count, device=self.rows.device)
        return self.cache.lengths[:, None] + torch.arange(count, device=self.rows.device)

    def _mask(self, slots: torch.Tensor, reach: int) -> torch.Tensor | None:
        """[1 or B, 1, t * queries of a group, reach], -inf where a new token must not look; None: one token, even rows."""
        if slots.shape == (1,):
            return None
        columns = torch.arange(reach, device=slots.device)
        unseen = columns > slots.view(-1, slots.shape[-1], 1)
        mask = torch.zeros(unseen.shape, dtype=self.cos.dtype, device=slots.device).masked_fill_(unseen, -torch.inf)
        queries = self.layers[0].head_norms.shape[0] - 1
        return mask.repeat_interleave(queries, dim=1)[:, None]

    def _through(
        self,
        layer: _Layer,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        mask: torch.Tensor | None,
        reach: int,
    ) -> torch.Tensor:
        """[B, t, h] through one layer; keys and values [B, groups, max_length, head_dim] gain those of the new tokens."""
        batch, count = hidden.shape[:2]
        fused = functional.linear(self._norm(hidden, layer.attention_norm), layer.query_key_value)
        fused = fused.view(batch, count, self.num_groups, -1, self.width)  # of a group: its queries, its key, its value
        heads = self.norm(fused[:, :, :, :-1], (self.width,), None, self.epsilon) * layer.head_norms
        first, second = heads.chunk(2, dim=-1)
        heads = heads * cos + torch.cat((second, first), dim=-1) * sin
        for held, new in ((keys, heads[:, :, :, -1]), (values, fused[:, :, :, -1])):
            if slots.dim() == 1:
                held[:, :, reach - count : reach] = new.transpose(1, 2)
            else:
                held[self.rows[:, None], :, slots] = new
        queries = heads[:, :, :, :-1].transpose(1, 2)
        attended = functional.scaled_dot_product_attention(
            queries.flatten(2, 3), keys[:, :, :reach], values[:, :, :reach], attn_mask=mask, scale=layer.scale
        )
        attended = attended.view(queries.shape).transpose(1, 2).flatten(2)
        hidden = hidden + self._summed(functional.linear(attended, layer.projection))
        gate, up = functional.linear(self._norm(hidden, layer.mlp_norm), layer.gate_and_up).chunk(2, dim=-1)
        return hidden + self._summed(functional.linear(functional.silu(gate) * up, layer.down))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(hidden, hidden.shape[-1:], weight, self.epsilon)
        return normed

    def _summed(self, partial: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = reduce_from_tensor_model_parallel_region(partial) if self.is_split else partial
        return whole


def plain_norm(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """RMSNorm of float32 over the last axis in few kernels.

    x / sqrt(|x|^2 / n + epsilon) = x sqrt(n) / sqrt(|x|^2 + n epsilon).
    """
    size = shape[0]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    normed: torch.Tensor = x * length.hypot_(length.new_tensor((size * epsilon) ** 0.5)).reciprocal_().mul_(size**0.5)
    return normed if weight is None else normed.mul_(weight)
