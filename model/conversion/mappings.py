"""The maps between our logical parameters and published layouts, as tables; both directions come from the same row.

A row says: this parameter of ours holds the rows of these tensors of theirs, arranged in this way. All else (names of
every layer, shapes, which rows go where in either direction, tensor-parallel slices) is derived.

Our names and arrangements are megatron-core's: query, key and value rows interleaved by group of heads, and the two
halves of the gated MLP one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from model.config import ModelConfig
from model.errors import UserError
from model.vocabulary import Vocabulary

SAME, GROUPED, STACKED, VOCABULARY = "same", "grouped", "stacked", "vocabulary"


@dataclass(frozen=True)
class Rule:
    """One row of a table. `rows` of their tensors and `columns` are names of sizes (see `sizes_of`)."""

    ours: str
    theirs: tuple[tuple[str, str], ...]  # (name pattern, size of its rows)
    columns: str | None = None  # None: a vector
    arrangement: str = SAME
    split: str | None = None  # over tensor-parallel ranks: rows | halves | columns | None (a copy)
    stage: str = "layer"  # pipeline stage: first | layer | last


_DECODER = "decoder.layers.{layer}."
_LAYER = "model.layers.{layer}."

_COMMON = (
    Rule(
        "embedding.word_embeddings.weight",
        (("model.embed_tokens.weight", "vocabulary"),),
        "hidden",
        VOCABULARY,
        "rows",
        "first",
    ),
    Rule(_DECODER + "self_attention.linear_qkv.layer_norm_weight", ((_LAYER + "input_layernorm.weight", "hidden"),)),
    Rule(
        _DECODER + "self_attention.linear_qkv.weight",
        (
            (_LAYER + "self_attn.q_proj.weight", "query"),
            (_LAYER + "self_attn.k_proj.weight", "key_value"),
            (_LAYER + "self_attn.v_proj.weight", "key_value"),
        ),
        "hidden",
        GROUPED,
        "rows",
    ),
    Rule(
        _DECODER + "self_attention.linear_proj.weight",
        ((_LAYER + "self_attn.o_proj.weight", "hidden"),),
        "query",
        split="columns",
    ),
    Rule(_DECODER + "mlp.linear_fc1.layer_norm_weight", ((_LAYER + "post_attention_layernorm.weight", "hidden"),)),
    Rule(
        _DECODER + "mlp.linear_fc1.weight",
        ((_LAYER + "mlp.gate_proj.weight", "ffn"), (_LAYER + "mlp.up_proj.weight", "ffn")),
        "hidden",
        STACKED,
        "halves",
    ),
    Rule(_DECODER + "mlp.linear_fc2.weight", ((_LAYER + "mlp.down_proj.weight", "hidden"),), "ffn", split="columns"),
    Rule("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),), stage="last"),
    Rule("output_layer.weight", (("lm_head.weight", "vocabulary"),), "hidden", VOCABULARY, "rows", "last"),
)
_HEAD_NORMS = (
    Rule(_DECODER + "self_attention.q_layernorm.weight", ((_LAYER + "self_attn.q_norm.weight", "head"),)),
    Rule(_DECODER + "self_attention.k_layernorm.weight", ((_LAYER + "self_attn.k_norm.weight", "head"),)),
)


@dataclass(frozen=True)
class Layout:
    """A published layout of a language model. `absent`: parameters of ours that it has no tensors for."""

    name: str
    model_type: str  # in config.json
    architecture: str
    rules: tuple[Rule, ...]
    absent: tuple[Rule, ...] = ()

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        return self.rules + self.absent


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("emu35", "Emu3", "Emu3ForCausalLM", _COMMON + _HEAD_NORMS),
        Layout("qwen3", "qwen3", "Qwen3ForCausalLM", _COMMON + _HEAD_NORMS),
        # Emu3 has no norm of queries and keys: see `hugging_face.check_norms`.
        Layout("emu3", "emu3_text_model", "Emu3ForCausalLM", _COMMON, _HEAD_NORMS),
    )
}
VISION_LAYOUT = "ibq"
LAYOUT_NAMES = (*LAYOUTS, VISION_LAYOUT)
LAYOUT_HINT = f"{', '.join(LAYOUTS)}, or {VISION_LAYOUT} for a vision tokenizer"
OUR_RULES = _COMMON + _HEAD_NORMS


@dataclass(frozen=True)
class Mapped:
    """A row of a table for one layer: our parameter, their tensors, and the runs of rows between them.

    `runs`: (index of their tensor, first row there, number of rows) in the order of our rows. Rows of ours behind
    the last run pad the vocabulary.
    """

    rule: Rule
    layer: int | None
    ours: str
    our_shape: tuple[int, ...]
    theirs: tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape)
    runs: tuple[tuple[int, int, int], ...]

    @property
    def num_padding_rows(self) -> int:
        return self.our_shape[0] - sum(count for _, _, count in self.runs)

    def inverse(self, index: int) -> list[tuple[int, int]]:
        """(first row of ours, number of rows) in the order of the rows of their tensor `index`."""
        found, position = [], 0
        for number, start, count in self.runs:
            if number == index:
                found.append((start, position, count))
            position += count
        return [(ours, count) for _, ours, count in sorted(found)]


def sizes_of(config: ModelConfig) -> dict[str, int]:
    vocabulary = Vocabulary.from_config(config.vocabulary)
    return {
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "query": config.num_attention_heads * config.head_dim,
        "key_value": config.num_query_groups * config.head_dim,
        "head": config.head_dim,
        "vocabulary": vocabulary.size,
        "padded": vocabulary.padded_size,
    }


def mapped_tensors(rules: tuple[Rule, ...], config: ModelConfig) -> Iterator[Mapped]:
    """Every row of the table for every layer of the model, in the order of the forward pass."""
    by_stage = {stage: [rule for rule in rules if rule.stage == stage] for stage in ("first", "layer", "last")}
    for rule in by_stage["first"]:
        yield _map(rule, None, config)
    for layer in range(config.num_layers):
        for rule in by_stage["layer"]:
            yield _map(rule, layer, config)
    for rule in by_stage["last"]:
        yield _map(rule, None, config)


def _map(rule: Rule, layer: int | None, config: ModelConfig) -> Mapped:
    sizes = sizes_of(config)
    tail = () if rule.columns is None else (sizes[rule.columns],)
    theirs = tuple((pattern.format(layer=layer), (sizes[rows], *tail)) for pattern, rows in rule.theirs)
    runs = _runs(rule, [shape[0] for _, shape in theirs], config)
    rows = sizes["padded"] if rule.arrangement == VOCABULARY else sum(run[2] for run in runs)
    return Mapped(rule, layer, rule.ours.format(layer=layer), (rows, *tail), theirs, tuple(runs))


def _runs(rule: Rule, rows: list[int], config: ModelConfig) -> list[tuple[int, int, int]]:
    if rule.arrangement != GROUPED:
        return [(index, 0, count) for index, count in enumerate(rows)]
    groups = config.num_query_groups
    return [
        (index, group * (count // groups), count // groups)
        for group in range(groups)
        for index, count in enumerate(rows)
    ]


def find_layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise UserError(
            f"there is no layout {name!r} of language models", expected=", ".join(LAYOUTS), fix=f"layout={LAYOUT_HINT}"
        )
    return LAYOUTS[name]
