"""`config.json` and `generation_config.json` of published layouts: written from a ModelConfig, read and compared with one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint.small_files import read_object
from model.config import AdapterConfig, ModelConfig
from model.conversion.mappings import LAYOUTS, Layout
from model.errors import Problems, UserError
from model.vocabulary import EMU35_VISUAL_SIZE, EMU35_VISUAL_START, Vocabulary, VocabularyConfig

CONFIG_NAME = "config.json"
IMAGE_AREA_PIXELS = 720 * 720  # default of the released Emu3.5 configuration class

# config.json -> ModelConfig; what differs here is another model.
FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
# What the backbone cannot express, with the values that it can.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
# Where a configuration may say the base of the rotary embedding, and all else that these tables may have.
ROPE_TABLES = ("rope_parameters", "rope_scaling")
ROPE_TYPES = ("default", None)
ROPE_NAME = re.compile(r"rope|rotary|yarn|mrope", re.IGNORECASE)


def to_config(layout: Layout, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of an export, whose weights have the given dtype."""
    vocabulary = Vocabulary.from_config(config.vocabulary)
    ids = vocabulary.structure
    values: dict[str, Any] = {
        "architectures": [layout.architecture],
        "attention_dropout": config.dropout,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_sequence_length,
        "model_type": layout.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_query_groups,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocabulary.size,
    }
    if layout.name == "emu35":
        return values | {
            "img_token_id": ids["img"],
            "boi_token_id": ids["boi"],
            "eoi_token_id": ids["eoi"],
            "eol_token_id": ids["eol"],
            "eof_token_id": ids["eof"],
            "image_area": IMAGE_AREA_PIXELS,
            "pretraining_tp": 1,
        }
    # transformers 5 reads the rotary base from this table, earlier versions from rope_theta.
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if layout.name == "qwen3":
        return values | {"attention_bias": False, "sliding_window": None, "use_sliding_window": False}
    return values | {"attention_bias": False, "mlp_bias": False}


def to_generation_config(config: ModelConfig) -> dict[str, Any]:
    ids = Vocabulary.from_config(config.vocabulary).structure
    return {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"], "do_sample": True}


def read_config(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of a checkpoint folder, None where there is none."""
    path = folder / CONFIG_NAME if folder.is_dir() else folder.parent / CONFIG_NAME
    if not path.is_file():
        return None
    values = read_object(path, "config.json")
    found = [theta for theta in rope_bases(values) if theta is not None]
    values.setdefault("rope_theta", found[0] if found else None)
    return values


def rope_bases(values: dict[str, Any]) -> list[Any]:
    """Every base of the rotary embedding that a `config.json` names."""
    tables = [values.get(name) for name in ROPE_TABLES]
    return [values.get("rope_theta"), *(table.get("rope_theta") for table in tables if isinstance(table, dict))]


def rope_problems(values: dict[str, Any]) -> list[str]:
    """Everything about positions that this backbone does not do, or that contradicts itself; found by reading alone."""
    problems = []
    bases = {float(base) for base in rope_bases(values) if isinstance(base, int | float)}
    if len(bases) > 1:
        problems.append(f"rope_theta: {' and '.join(f'{base:g}' for base in sorted(bases))} in one configuration")
    if any(base is not None and not isinstance(base, int | float) for base in rope_bases(values)):
        problems.append("rope_theta: not a number")
    for name in ROPE_TABLES:
        table = values.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            problems.append(f"{name}: {table!r} is not a model of this backbone")
            continue
        kinds = [table[key] for key in ("rope_type", "type") if key in table]
        problems += [
            f"{name}.rope_type: {kind!r} is not a model of this backbone" for kind in kinds if kind not in ROPE_TYPES
        ]
        neutral = {"rope_type", "type", "rope_theta"}
        problems += [
            f"{name}.{key}: {value!r} is not known here"
            for key, value in table.items()
            if key not in neutral and value is not None and not _is_whole(key, value)
        ]
    problems += [
        f"{name}: {value!r} is not known here"
        for name, value in values.items()
        if name not in ("rope_theta", *ROPE_TABLES)
        and (ROPE_NAME.search(name) and value not in (None, False) and not _is_whole(name, value))
    ]
    return problems


def _is_whole(name: str, value: Any) -> bool:
    """All of each head rotates: what this backbone does."""
    return name == "partial_rotary_factor" and value == 1


def find_layout_of(values: dict[str, Any], place: Path) -> Layout:
    """The layout that a `config.json` says it is. Raises `UserError` for an architecture that has no table."""
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    for layout in LAYOUTS.values():
        if layout.model_type == model_type and (not architectures or layout.architecture in architectures):
            return layout
    known = ", ".join(f"{one.model_type}/{one.architecture} (layout={one.name})" for one in LAYOUTS.values())
    raise UserError(
        "this architecture cannot be converted",
        where=str(place),
        expected=known,
        got=f"{model_type}/{', '.join(architectures) or 'no architecture'}",
    )


def refuse_rope(values: dict[str, Any], place: Path) -> None:
    problems = rope_problems(values)
    if problems:
        raise UserError(
            "config.json describes positions that this backbone cannot say", where=str(place), got="; ".join(problems)
        )


def derive_config(values: dict[str, Any], place: Path) -> ModelConfig:
    """A ModelConfig from `config.json` alone, for the published vocabulary."""
    published = EMU35_VISUAL_START + EMU35_VISUAL_SIZE
    refuse_rope(values, place)
    missing = sorted(name for name in FIELDS if name != "head_dim" and values.get(name) is None)
    if missing:
        raise UserError("config.json lacks sizes", where=str(place), expected=", ".join(missing))
    if values.get("vocab_size") != published:
        raise UserError(
            "the vocabulary cannot be told from config.json",
            where=str(place),
            expected=f"vocab_size {published} (Emu3.5), or a model configuration",
            got=f"vocab_size {values.get('vocab_size')}",
            fix="add model=NAME with model.vocabulary.* of this checkpoint",
        )
    sizes: dict[str, Any] = {
        ours: head_dim_of(values) if theirs == "head_dim" else values[theirs] for theirs, ours in FIELDS.items()
    }
    vocabulary = VocabularyConfig(preset="emu35", pad_multiple=1024)
    return ModelConfig(
        **sizes,
        name=str(values.get("model_type")),
        vocabulary=vocabulary,
        max_sequence_length=int(values.get("max_position_embeddings") or 32_768),
        dropout=float(values.get("attention_dropout") or 0.0),
        init_std=float(values.get("initializer_range") or 0.02),
    )


def head_dim_of(values: dict[str, Any]) -> int | None:
    if values.get("head_dim") is not None:
        result: int | None = values["head_dim"]
        return result
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    return hidden // heads if heads and hidden else None


def check_config(
    values: dict[str, Any], config: ModelConfig, problems: Problems, *, untie: bool, vocabulary: bool = True
) -> None:
    """Every way in which a `config.json` describes another function than `config` does."""
    for theirs, ours in FIELDS.items():
        found = head_dim_of(values) if theirs == "head_dim" else values.get(theirs)
        expected = getattr(config, ours)
        if found is not None and found != expected:
            problems.add(f"model.{ours}", f"{expected}, but config.json has {theirs} {found}", f"model.{ours}={found}")
    for problem in rope_problems(values):
        problems.add(f"config.json {problem.split(':')[0]}", problem.split(": ", 1)[1])
    for name, allowed in FIXED.items():
        if values.get(name, allowed[0]) not in allowed:
            problems.add(f"config.json {name}", f"{values[name]!r} is not a model of this backbone")
    if values.get("tie_word_embeddings") and not untie:
        problems.add(
            "config.json tie_word_embeddings",
            "the output head is tied to the embedding; this backbone has a head of its own",
            "untie=true copies the embedding into the head",
        )
    sizes = Vocabulary.from_config(config.vocabulary)
    if vocabulary and values.get("vocab_size") not in (None, sizes.size, sizes.padded_size):
        problems.add(
            "model.vocabulary",
            f"{sizes.size} ids, but config.json has vocab_size {values['vocab_size']}",
            "name the model with the checkpoint's vocabulary, or use `nextstate convert surgery`",
        )


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    return config if config.dtype == dtype else replace(config, dtype=dtype)


def model_config(values: dict[str, Any], place: str) -> ModelConfig:
    """The `ModelConfig` that a manifest or a record holds as a plain dictionary."""
    try:
        adapter = AdapterConfig(**values.get("adapter", {}))
        return ModelConfig(**values | {"vocabulary": VocabularyConfig(**values["vocabulary"]), "adapter": adapter})
    except (KeyError, TypeError) as error:
        raise UserError(
            "the model's configuration cannot be read", where=place, got=f"{type(error).__name__}: {error}"
        ) from None
