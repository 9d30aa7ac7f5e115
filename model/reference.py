"""The backbone and the image grammar once more, as plainly as possible: what tests and `convert verify` compare with.

Nothing here is shared with the code it checks. Weights go by the names of the Hugging Face layouts (Qwen3 and Emu3.5
use the same) and are asked for one at a time, so a model of any size can be run within the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.config import ModelConfig
from model.vocabulary import Vocabulary

GetWeight = Callable[[str], torch.Tensor]

# Rows of the output matrix that are read and multiplied at once.
_OUTPUT_ROWS = 1 << 15


@dataclass(frozen=True)
class Sizes:
    """All that the forward pass needs beside the weights."""

    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float

    @classmethod
    def from_config(cls, config: ModelConfig) -> Sizes:
        return cls(
            config.num_layers,
            config.num_attention_heads,
            config.num_query_groups,
            config.head_dim,
            config.rope_theta,
            config.rms_norm_eps,
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Sizes:
        """Of a `config.json`. transformers 5 keeps the base of RoPE under `rope_parameters`."""
        heads = values["num_attention_heads"]
        rope = values.get("rope_parameters") or {}
        return cls(
            values["num_hidden_layers"],
            heads,
            values.get("num_key_value_heads") or heads,
            values.get("head_dim") or values["hidden_size"] // heads,
            float(values.get("rope_theta") or rope["rope_theta"]),
            values["rms_norm_eps"],
        )


def logits(
    weight: GetWeight,
    sizes: Sizes,
    tokens: torch.Tensor,
    documents: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits [T, V] of tokens int64 [T]; V is the number of rows of `lm_head.weight`.

    `documents` holds the lengths of the documents that are packed side by side: attention and positions start anew
    in each. One document by default.
    """
    lengths = list(documents or [len(tokens)])
    assert sum(lengths) == len(tokens), "the documents must cover the tokens"
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    order = torch.arange(len(tokens))
    visible = (number[:, None] == number[None]) & (order[:, None] >= order[None])

    hidden = weight("model.embed_tokens.weight")[tokens].to(dtype)
    for layer in range(sizes.num_layers):
        name = f"model.layers.{layer}."

        def own(part: str, name: str = name) -> torch.Tensor:
            return weight(f"{name}{part}.weight").to(dtype)

        hidden = hidden + _attention(_norm(hidden, own("input_layernorm"), sizes), own, sizes, positions, visible)
        normed = _norm(hidden, own("post_attention_layernorm"), sizes)
        gate, up = normed @ own("mlp.gate_proj").T, normed @ own("mlp.up_proj").T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ own("mlp.down_proj").T
    hidden = _norm(hidden, weight("model.norm.weight").to(dtype), sizes)
    blocks = weight("lm_head.weight").split(_OUTPUT_ROWS)
    return torch.cat([hidden @ block.to(dtype).T for block in blocks], dim=1)


def _norm(values: torch.Tensor, scale: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    mean_square = values.square().mean(dim=-1, keepdim=True)
    return values / torch.sqrt(mean_square + sizes.norm_epsilon) * scale


def _attention(
    values: torch.Tensor, own: GetWeight, sizes: Sizes, positions: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]. Norms of queries and keys come before RoPE; every group serves several heads."""

    def heads(part: str, count: int) -> torch.Tensor:
        return (values @ own(f"self_attn.{part}").T).view(-1, count, sizes.head_dim)

    query = _norm(heads("q_proj", sizes.num_heads), own("self_attn.q_norm"), sizes)
    key = _norm(heads("k_proj", sizes.num_groups), own("self_attn.k_norm"), sizes)
    query, key = _rotate(query, positions, sizes), _rotate(key, positions, sizes)
    repeats = sizes.num_heads // sizes.num_groups
    key = key.repeat_interleave(repeats, dim=1)
    value = heads("v_proj", sizes.num_groups).repeat_interleave(repeats, dim=1)
    mixed = []
    for head in range(sizes.num_heads):
        scores = query[:, head] @ key[:, head].T / sizes.head_dim**0.5
        scores = scores.masked_fill(~visible, float("-inf"))
        mixed.append(torch.softmax(scores, dim=-1) @ value[:, head])
    return torch.cat(mixed, dim=-1) @ own("self_attn.o_proj").T


def _rotate(heads: torch.Tensor, positions: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """RoPE on [T, heads, head_dim]: coordinate i turns with coordinate i + head_dim / 2."""
    half = sizes.head_dim // 2
    speed = sizes.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions[:, None].double() * speed)[:, None]
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


_OF_A_LAYER = {
    "self_attn.o_proj": "self_attention.linear_proj.weight",
    "self_attn.q_norm": "self_attention.q_layernorm.weight",
    "self_attn.k_norm": "self_attention.k_layernorm.weight",
    "mlp.down_proj": "mlp.linear_fc2.weight",
    "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm": "mlp.linear_fc1.layer_norm_weight",
}


def weights_of_checkpoint(reader: Any, config: ModelConfig) -> GetWeight:
    """A `ShardReader` of our own checkpoints, asked by the names of Hugging Face. Rows of padded ids are left out."""
    num_ids = Vocabulary.from_config(config.vocabulary).size
    per_group = config.num_attention_heads // config.num_query_groups

    def read(key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        shape = tuple(reader.global_shape(f"model/{key}"))
        stop = shape[0] if stop is None else stop
        offset = (start,) + (0,) * (len(shape) - 1)
        result: torch.Tensor = reader.read(f"model/{key}", offset, (stop - start, *shape[1:]))
        return result

    def weight(name: str) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            return read("embedding.word_embeddings.weight", 0, num_ids)
        if name == "lm_head.weight":
            return read("output_layer.weight", 0, num_ids)
        if name == "model.norm.weight":
            return read("decoder.final_layernorm.weight")
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        ours = f"decoder.layers.{layer}."
        if part in _OF_A_LAYER:
            return read(ours + _OF_A_LAYER[part])
        if part in ("mlp.gate_proj", "mlp.up_proj"):
            first = config.ffn_hidden_size if part == "mlp.up_proj" else 0
            return read(ours + "mlp.linear_fc1.weight", first, first + config.ffn_hidden_size)
        # Rows of the fused projection: for each group its queries, its key, its value.
        fused = read(ours + "self_attention.linear_qkv.weight")
        fused = fused.view(config.num_query_groups, per_group + 2, config.head_dim, -1)
        start, stop = {
            "self_attn.q_proj": (0, per_group),
            "self_attn.k_proj": (per_group, per_group + 1),
            "self_attn.v_proj": (per_group + 1, per_group + 2),
        }[part]
        return fused[:, start:stop].flatten(0, 2)

    return weight


def weight_names(num_layers: int) -> list[str]:
    """Every weight of the layout, in order."""
    projections = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    layer = [*projections, *_OF_A_LAYER, "mlp.gate_proj", "mlp.up_proj"]
    inner = [f"model.layers.{index}.{part}.weight" for index in range(num_layers) for part in layer]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


@dataclass(frozen=True)
class ImageRules:
    """The grammar's options (see `model.generation.grammar.GrammarOptions`, whose defaults these are)."""

    max_images: int | None = None
    stop_after_images: int | None = None
    begin_with_image: bool = False
    repeat_grid: bool = False
    max_side: int = 999
    max_image_tokens: int = 16_384
    emu3_format: bool = False
    structure_in_text: tuple[str, ...] = ("eos", "ess", "boc", "eoc", "bog", "eog")


def allowed_next(
    ids: Sequence[int],
    vocabulary: Vocabulary,
    digits: Sequence[int],
    star: int,
    rules: ImageRules | None = None,
    grid: tuple[int, int] | None = None,
) -> set[int]:
    """The ids that may follow `ids`, all of which are generated; found by reading them from the start.

    `digits` are the ids of "0" to "9", `star` that of "*". `grid` is the (height, width) that images must have.
    """
    ids, rules = list(ids), rules or ImageRules()
    position, num_images = 0, 0
    text = {*range(vocabulary.text_size), *(vocabulary.structure[n] for n in rules.structure_in_text)}
    while True:
        if num_images == rules.stop_after_images:
            return {vocabulary.pad}
        if position == len(ids):
            if rules.begin_with_image and not ids:
                return {vocabulary.boi}
            may_begin = rules.max_images is None or num_images < rules.max_images
            return text | ({vocabulary.boi} if may_begin else set())
        token = ids[position]
        if token == vocabulary.eos:
            return {vocabulary.pad}
        if token == vocabulary.ess:
            return {vocabulary.eos if position + 1 == len(ids) else vocabulary.pad}
        if token != vocabulary.boi:
            position += 1
            continue
        block = ids[position:]
        if vocabulary.eoi not in block:
            return _allowed_in_image(block, vocabulary, digits, star, rules, grid)
        end = block.index(vocabulary.eoi)
        if rules.repeat_grid:
            grid = _grid_of(block[: end + 1], vocabulary, digits, star)
        position, num_images = position + end + 1, num_images + 1


def _grid_of(block: list[int], vocabulary: Vocabulary, digits: Sequence[int], star: int) -> tuple[int, int]:
    spelled = ["*" if token == star else str(digits.index(token)) for token in block[1 : block.index(vocabulary.img)]]
    height, width = "".join(spelled).split("*")
    return int(height), int(width)


def _allowed_in_image(
    block: list[int],
    vocabulary: Vocabulary,
    digits: Sequence[int],
    star: int,
    rules: ImageRules,
    grid: tuple[int, int] | None,
) -> set[int]:
    """What may follow an image block that begins with BOI and has not ended."""
    if vocabulary.img not in block:
        return _allowed_in_header(block[1:], vocabulary, digits, star, rules, grid)
    height, width = _grid_of(block, vocabulary, digits, star)
    done = len(block) - 1 - block.index(vocabulary.img)
    row = ["code"] * width + ["eol"]
    body = row * height + ["eof"] if rules.emu3_format else (row * height)[:-1]
    kind = [*body, "eoi"][done]
    if kind == "code":
        return set(range(vocabulary.visual_start, vocabulary.size))
    return {vocabulary.structure[kind]}


def _allowed_in_header(
    header: Sequence[int],
    vocabulary: Vocabulary,
    digits: Sequence[int],
    star: int,
    rules: ImageRules,
    grid: tuple[int, int] | None,
) -> set[int]:
    """What may follow the digits and the star of "H*W": every number that can still become a legal side."""
    spelled = "".join("*" if token == star else str(digits.index(token)) for token in header)
    sides = spelled.split("*")
    current, height = sides[-1], int(sides[0]) if len(sides) == 2 else 0
    largest = min(rules.max_side, rules.max_image_tokens // height if height else rules.max_image_tokens)
    target = str(grid[len(sides) - 1]) if grid else ""
    end = vocabulary.img if height else star
    allowed = set()
    for digit in range(10):
        longer = current + str(digit)
        fits = target.startswith(longer) if grid else not longer.startswith("0") and int(longer) <= largest
        if fits:
            allowed.add(digits[digit])
    if current == target if grid else current:
        allowed.add(end)
    return allowed


def padded_mask(allowed: Collection[int], vocabulary: Vocabulary) -> torch.Tensor:
    """bool [padded vocabulary], true at the allowed ids."""
    mask = torch.zeros(vocabulary.padded_size, dtype=torch.bool)
    mask[list(allowed)] = True
    return mask
