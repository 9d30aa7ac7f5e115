"""Prompts and the next tokens of each sequence through all layers: what decoding repeats.

A step has few tokens and many layers, so that what stands beside the matrix products decides the rate: on a CPU
megatron-core's modules take three times as long as the operations in them. The arithmetic is
that of megatron-core's modules; of each layer queries and keys share one norm and one rotation, the rotary tables of all
positions are made once, the queries of a group attend as rows of one product, so that keys are never repeated, and a
product adds itself to what it is added to. The matrices are the modules' own and are never copied.
`tests/model/test_transformer.py` holds the numbers against the modules'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from model.backbone.key_value_cache import KeyValueCache
from model.backbone.rotary import rotary_tables
from model.parallel.megatron import GPTModel, reduce_from_tensor_model_parallel_region

PROMPT_TOKENS_AT_ONCE = 512  # of a row: what they see of the cache is a mask in memory


@dataclass(frozen=True)
class _Linear:
    """x W + scale (x A) B of this rank, each turned to [in, out]; without an adapter x W.

    Of a layer that is split by its inputs each rank has a share of both products.
    """

    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0

    def __call__(self, x: torch.Tensor, added_to: torch.Tensor | None = None) -> torch.Tensor:
        found = torch.mm(x, self.weight) if added_to is None else torch.addmm(added_to, x, self.weight)
        if self.a is None or self.b is None:
            return found
        return torch.addmm(found, torch.mm(x, self.a), self.b, alpha=self.scale)


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer. Norms of heads: [queries a group + 1, head_dim], the key's last."""

    attention_norm: torch.Tensor
    query_key_value: _Linear
    head_norms: torch.Tensor
    projection: _Linear
    scale: float | None  # of the attention's logits
    mlp_norm: torch.Tensor
    gate_and_up: _Linear
    down: _Linear


@dataclass(frozen=True)
class _Places:
    """Where the new tokens of one step go in every layer, and what they see."""

    batch_size: int
    count: int  # new tokens of a row
    cos: torch.Tensor  # [1 or B, t, 1, 1, head_dim]
    sin: torch.Tensor
    slots: (
        torch.Tensor | None
    )  # int64 [B, t]; None: the same of all rows, of which `new_keys` and `new_values` are views
    mask: torch.Tensor | None  # [1 or B, 1, t * queries of a group, reach], -inf where a new token must not look
    keys: tuple[torch.Tensor, ...]  # a layer each: [B, groups, reach, head_dim]
    values: tuple[torch.Tensor, ...]
    new_keys: tuple[torch.Tensor, ...]
    new_values: tuple[torch.Tensor, ...]


def has_known_layers(model: GPTModel) -> bool:
    """The layers are those that `TokenStep` knows, not Transformer Engine's."""
    return isinstance(model.decoder.layers[0].input_layernorm, torch.nn.RMSNorm)


class TokenStep:
    """Over a model of known layers (`has_known_layers`) and a cache.

    It counts along how long the rows are, so that a step waits for no device; whoever changes the cache's lengths
    makes another one. Tensor parallel as the modules are; every rank returns the same. No gradient.
    """

    def __init__(self, model: GPTModel, cache: KeyValueCache, *, adapted: bool = False) -> None:
        """`adapted`: adapters act on the tokens that are read."""
        core, config = model.config, model.model_config
        self.model, self.cache, self.adapted = model, cache, adapted
        self.width, self.num_groups = core.kv_channels, cache.num_groups
        self.is_split = core.tensor_model_parallel_size > 1
        self.norm = Norm(core.layernorm_epsilon, like=cache.keys)
        self.layers = [self._layer(layer) for layer in model.decoder.layers]
        self.final_norm = self.norm.prepared(model.decoder.final_layernorm.weight)
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
            self.norm.prepared(layer.input_layernorm.weight),
            self._linear(attention.linear_qkv),
            self.norm.prepared(torch.stack(norms)),
            self._linear(attention.linear_proj),
            attention.core_attention.softmax_scale,
            self.norm.prepared(layer.pre_mlp_layernorm.weight),
            self._linear(mlp.linear_fc1),
            self._linear(mlp.linear_fc2),
        )

    def _linear(self, module: Any) -> _Linear:
        adapter = getattr(module, "lora", None) if self.adapted else None
        if adapter is None:
            return _Linear(module.weight.t())
        return _Linear(module.weight.t(), adapter.a.t(), adapter.b.t(), adapter.scale)

    @torch.no_grad()
    def read_prompts(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Reads the first `lengths` (int64 [B]) of `ids` (int64 [B, t]) into an empty cache.

        Hidden states [B, h] of each row's last token behind the final norm.
        """
        assert self.longest == 0, "the cache is empty"
        assert ids.shape[1] <= self.cache.max_length, f"the cache holds {self.cache.max_length} tokens"
        ends = []  # of a part each: the last tokens of rows that end there
        for part in ids.split(PROMPT_TOKENS_AT_ONCE, dim=1):
            start, count = self.longest, part.shape[1]
            hidden = self._read(part, whole=False)  # padding too, as if all rows were as long
            self.longest += count
            ends.append(hidden[self.rows, (lengths - 1 - start).clamp(0, count - 1)])
        self.cache.lengths.copy_(lengths)
        self._count()
        last = torch.stack(ends)[(lengths - 1) // PROMPT_TOKENS_AT_ONCE, self.rows]
        return self.norm(last, self.final_norm)

    @torch.no_grad()
    def run(self, ids: torch.Tensor, advances: torch.Tensor | None = None) -> torch.Tensor:
        """Reads `ids` (int64 [B, t]): hidden states [B, h] of the last ones behind the final norm.

        `advances` (bool [B]): rows that stay as long as they are where it is False.
        """
        count = ids.shape[1]
        hidden = self._read(ids, whole=False)
        self.cache.lengths += count if advances is None else advances * count
        self.are_even &= advances is None
        self.longest += count
        return self.norm(hidden[:, -1], self.final_norm)

    @torch.no_grad()
    def look(self, ids: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """Hidden states [B, t, h] of `ids` (int64 [B, t]) behind every row; rows stay as long as they are.

        `whole`: each of the tokens sees all of them, else itself and those before it.
        """
        return self.norm(self._read(ids, whole=whole), self.final_norm)

    @torch.no_grad()
    def extend(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, t, h] of `ids` (int64 [B, t]), which see one another and from now on belong to the rows.

        `positions` (int64 [B, t]) say where they stand; the cache takes them in the order in which they come.
        """
        hidden = self._read(ids, whole=True, positions=positions)
        self.cache.lengths += ids.shape[1]
        self.longest += ids.shape[1]
        return self.norm(hidden, self.final_norm)

    def _read(self, ids: torch.Tensor, *, whole: bool, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[B, t, h] before the final norm; keys and values lie behind the rows, which are as long as before."""
        count = ids.shape[1]
        if self.longest + count > self.cache.max_length:
            self._count()  # rows that did not advance are shorter than what was counted
        reach = self.longest + count
        assert reach <= self.cache.max_length, f"the cache holds {self.cache.max_length} tokens, {reach} are needed"
        hidden, places = self._embedded(ids), self._places(count, reach, positions, whole=whole)
        for number in range(len(self.layers)):
            hidden = self._through(number, hidden, places)
        return hidden.view(*ids.shape, -1)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """[B * t, h]"""
        if self.is_split:
            embedded: torch.Tensor = self.model.embedding(ids, None)  # [t, B, h]
            return embedded.transpose(0, 1).flatten(0, 1)
        return functional.embedding(ids.flatten(), self.model.embedding.word_embeddings.weight)

    def _places(self, count: int, reach: int, positions: torch.Tensor | None, *, whole: bool) -> _Places:
        """`positions` int64 [B, t]; by default the tokens stand where the cache takes them."""
        cache, start, slots = self.cache, reach - count, None
        if not self.are_even:
            slots = cache.lengths[:, None] + torch.arange(count, device=self.rows.device)
            positions = slots if positions is None else positions
        places: Any = slice(start, reach) if positions is None else positions
        cos, sin = self.cos[places], self.sin[places]
        shape = (-1, count, 1, 1, self.width)
        return _Places(
            cache.batch_size,
            count,
            cos.view(shape),
            sin.view(shape),
            slots,
            self._mask(slots, count, reach, whole=whole),
            *(all_layers[:, :, :, :reach].unbind() for all_layers in (cache.keys, cache.values)),
            *(all_layers[:, :, :, start:reach].unbind() for all_layers in (cache.keys, cache.values)),
        )

    def _mask(self, slots: torch.Tensor | None, count: int, reach: int, *, whole: bool) -> torch.Tensor | None:
        if slots is None:
            if count == 1 or whole:
                return None
            slots = torch.arange(reach - count, reach, device=self.rows.device)[None]
        columns = torch.arange(reach, device=slots.device)
        last_seen = slots[:, -1:].expand_as(slots) if whole else slots
        unseen = columns > last_seen[:, :, None]
        mask = torch.zeros(unseen.shape, dtype=self.cos.dtype, device=slots.device).masked_fill_(unseen, -torch.inf)
        queries = self.layers[0].head_norms.shape[0] - 1
        return mask.repeat_interleave(queries, dim=1)[:, None]

    def _through(self, number: int, hidden: torch.Tensor, places: _Places) -> torch.Tensor:
        """[B * t, h] through one layer, whose keys and values gain those of the new tokens."""
        layer = self.layers[number]
        fused = layer.query_key_value(self.norm(hidden, layer.attention_norm))
        # Of a group: its queries, its key, its value.
        fused = fused.view(places.batch_size, places.count, self.num_groups, -1, self.width)
        heads = self.norm(fused[:, :, :, :-1], layer.head_norms)
        heads = torch.addcmul(heads * places.cos, heads.roll(self.width // 2, -1), places.sin)
        self._keep(number, heads[:, :, :, -1], fused[:, :, :, -1], places)
        queries = heads[:, :, :, :-1].transpose(1, 2)
        attended = functional.scaled_dot_product_attention(
            queries.flatten(2, 3), places.keys[number], places.values[number], attn_mask=places.mask, scale=layer.scale
        )
        attended = attended.view(queries.shape).transpose(1, 2).reshape(len(hidden), -1)
        hidden = self._added(hidden, attended, layer.projection)
        gate, up = layer.gate_and_up(self.norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return self._added(hidden, functional.silu(gate).mul_(up), layer.down)

    def _keep(self, number: int, key: torch.Tensor, value: torch.Tensor, places: _Places) -> None:
        """Key and value [B, t, groups, head_dim] of the new tokens go to the cache."""
        if places.slots is None:
            places.new_keys[number].copy_(key.transpose(1, 2))
            places.new_values[number].copy_(value.transpose(1, 2))
        else:
            places.keys[number][self.rows[:, None], :, places.slots] = key
            places.values[number][self.rows[:, None], :, places.slots] = value

    def _added(self, hidden: torch.Tensor, x: torch.Tensor, linear: _Linear) -> torch.Tensor:
        """hidden + linear(x), of which every tensor-parallel rank has a share of the products."""
        if not self.is_split:
            return linear(x, hidden)
        whole: torch.Tensor = reduce_from_tensor_model_parallel_region(linear(x))
        return hidden + whole


class Norm:
    """RMSNorm over the last axis: torch's own is one kernel on an accelerator, and on a CPU a dozen.

    There four are enough: x / sqrt(|x|^2 / n + epsilon) = x sqrt(n) / sqrt(|x|^2 + n epsilon), with sqrt(n) in the weight.
    """

    def __init__(self, epsilon: float, like: torch.Tensor) -> None:
        self.epsilon, self.is_fused = epsilon, like.is_cuda or like.dtype != torch.float32
        self.floors: dict[int, torch.Tensor] = {}  # sqrt(n epsilon)

    def prepared(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [..., n] as `__call__` wants it."""
        weight, size = weight.detach(), weight.shape[-1]
        if self.is_fused:
            return weight
        if size not in self.floors:
            self.floors[size] = weight.new_tensor(math.sqrt(size * self.epsilon))
        return weight * math.sqrt(size)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [..., n], normed and times a weight from `prepared` that broadcasts to it."""
        size = x.shape[-1]
        if self.is_fused:
            return functional.rms_norm(x, (size,), None, self.epsilon) * weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed: torch.Tensor = x.div(length.hypot_(self.floors[size])).mul_(weight)
        return normed
