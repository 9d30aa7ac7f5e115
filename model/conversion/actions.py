"""The conversions of language models: from published layouts, to them, fresh weights, another parallel layout.

Each function checks everything that can be checked, makes a plan, and has it written. None builds the model or starts
a process group, and none but those that draw random values imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.conversion import hugging_face
from model.conversion.checks import check_tensors
from model.conversion.generated_tensors import fresh_weights, ones
from model.conversion.mappings import LAYOUT_HINT, OUR_RULES, VOCABULARY, Layout, Mapped, find_layout, mapped_tensors
from model.conversion.plan import Plan, Segment, Target, into_ranks, into_shards, whole_piece
from model.conversion.record import (
    CARRIED,
    PADDING_NAME,
    expect_recorded,
    layout_record,
    model_metadata,
    read_record,
    write_index,
    write_json,
    write_manifest,
    write_record,
)
from model.conversion.sources import CheckpointSource, SafetensorsSource, listed, open_foreign
from model.conversion.tensors import TensorInfo, TensorSource
from model.conversion.writer import Result, Written, execute, refuse_existing
from model.errors import Problems, UserError
from model.parallel.layout_rules import add_to, split_problems
from model.vocabulary import Vocabulary

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PREFIX = "model/"


@dataclass(frozen=True)
class Options:
    """What all conversions take. `extras(folder, written)` adds files (tokenizers, the certificate) before publication."""

    dtype: str | None = None
    tensor: int = 1
    pipeline: int = 1
    shard_bytes: int = 5_000_000_000
    threads: int = 4
    seed: int = 0
    untie: bool = False
    ignore: tuple[str, ...] = ()
    extras: Callable[[Path, Written], None] | None = None
    text_tokenizer: dict[str, Any] | None = None  # path, fingerprint and size of one that goes into a checkpoint


@dataclass
class Outcome:
    """Of a conversion: the answer of the command is made of it."""

    config: ModelConfig
    layout: str | None
    result: Result
    written: Written | None
    notes: list[str] = field(default_factory=list)


def initialize(target: Path, config: ModelConfig, options: Options) -> Outcome:
    """A checkpoint of fresh weights: bitwise those that training with this seed starts from."""
    refuse_existing(target)
    check_split(config, options)
    source = fresh_weights(config, options.seed)
    targets = [
        Target(
            PREFIX + one.ours,
            source.tensors[one.ours],
            [Segment(source, one.ours, 0, one.our_shape[0])],
            one.rule,
            one.layer,
        )
        for one in mapped_tensors(OUR_RULES, config)
    ]
    what = {"action": "init", "seed": options.seed}
    metadata = model_metadata(config, options.seed)
    return to_checkpoint(target, targets, [source], config, metadata, what, options)


def to_checkpoint(
    target: Path,
    targets: list[Target],
    sources: list[TensorSource],
    config: ModelConfig,
    metadata: dict[str, Any],
    what: dict[str, Any],
    options: Options,
) -> Outcome:
    """Write `targets` as a checkpoint of ours in the options' parallel layout."""
    into_ranks(targets, options.tensor, options.pipeline, config.num_layers)
    full = metadata | {"layout": layout_record(config, options.tensor, options.pipeline), "conversion": what}
    kept: list[Written] = []

    def finish(folder: Path, written: Written) -> None:
        kept.append(written)
        write_manifest(folder, full, targets, written)
        if options.extras:
            options.extras(folder, written)

    plan = Plan(what | {"metadata": full}, targets, sources)
    result = execute(plan, target, finish, threads=options.threads)
    return Outcome(config, None, result, kept[0] if kept else None)


def from_published(
    source_path: Path, target: Path, config: ModelConfig | None, layout_name: str | None, options: Options
) -> Outcome:
    """A checkpoint of ours from a folder (or file) in a published layout.

    `config` None takes the model from the folder's record or config.json. Rows that pad our vocabulary come from the
    record of an export of ours, otherwise they are drawn from the seed.
    """
    refuse_existing(target)
    with_source = open_foreign(source_path)
    try:
        layout, values = identify(source_path, layout_name)
        record = read_record(source_path) if source_path.is_dir() else None
        expect_recorded(with_source, record, source_path)
        config = config or _recorded_config(record, values, source_path)
        check_model(values, config, options, source_path)
        found = {
            name: info
            for name, info in with_source.tensors.items()
            if not any(fnmatchcase(name, pattern) for pattern in options.ignore)
        }
        dtype = check_tensors(str(source_path), found, expected_tensors(layout, config, found, options), options.dtype)
        config = hugging_face.with_dtype(config, dtype)
        check_split(config, options)
        padding = _padding_source(source_path, config, record, dtype, options.seed)
        sources: list[TensorSource] = [with_source, padding]
        targets = [_our_target(one, with_source, padding, dtype, found) for one in mapped_tensors(layout.rules, config)]
        notes = []
        if layout.absent:
            absent = list(mapped_tensors(layout.absent, config))
            norms = ones(absent, dtype)
            sources.append(norms)
            targets += [
                Target(
                    PREFIX + one.ours,
                    norms.tensors[one.ours],
                    [Segment(norms, one.ours, 0, one.our_shape[0])],
                    one.rule,
                    one.layer,
                )
                for one in absent
            ]
            notes.append(
                f"layout {layout.name} has no norms of queries and keys: ours are set to one, which is another "
                "function until it is trained"
            )
        what = {
            "action": "from_hf",
            "layout": layout.name,
            "dtype": dtype,
            "seed": options.seed,
            "untied": options.untie and HEAD not in found,
            "padding_rows": padding.place,
            "notes": notes,
        }
        metadata = model_metadata(config, options.seed)
        if record and record.get("layout") == layout.name:
            metadata |= {name: record["checkpoint"][name] for name in CARRIED if name in record["checkpoint"]}
        if options.text_tokenizer:
            metadata["text_tokenizer"] = _bound_tokenizer(options.text_tokenizer, metadata, config, source_path)
        outcome = to_checkpoint(target, targets, sources, config, metadata, what, options)
    finally:
        with_source.close()
    outcome.layout, outcome.notes = layout.name, notes
    return outcome


def _bound_tokenizer(
    tokenizer: dict[str, Any], metadata: dict[str, Any], config: ModelConfig, place: Path
) -> dict[str, Any]:
    """What the manifest says of a text tokenizer that fits the vocabulary and is the one of an export's record."""
    size, expected = tokenizer["size"], Vocabulary.from_config(config.vocabulary).text_size
    if size != expected:
        raise UserError(
            "the text tokenizer is not of this vocabulary",
            where=str(place),
            expected=f"{expected} text ids",
            got=str(size),
            fix="text_tokenizer=FOLDER of the one that the model was trained with",
        )
    recorded = metadata.get("text_tokenizer")
    fingerprint = recorded["fingerprint"] if isinstance(recorded, dict) else recorded
    if fingerprint and fingerprint != tokenizer["fingerprint"]:
        raise UserError(
            "the text tokenizer is not the one that the checkpoint was trained with",
            where=str(place),
            expected=f"fingerprint {fingerprint}",
            got=tokenizer["fingerprint"],
            fix="text_tokenizer=FOLDER of the right one",
        )
    return {"path": tokenizer["path"], "fingerprint": tokenizer["fingerprint"]}


def identify(path: Path, layout_name: str | None) -> tuple[Layout, dict[str, Any]]:
    """The layout of a published checkpoint and its config.json; the two must agree."""
    values = hugging_face.read_config(path)
    if values is None:
        if layout_name is None:
            raise UserError(
                "the layout cannot be told: there is no config.json", where=str(path), fix=f"layout={LAYOUT_HINT}"
            )
        return find_layout(layout_name), {}
    layout = hugging_face.find_layout_of(values, path)
    if layout_name is not None and find_layout(layout_name) != layout:
        raise UserError(
            "the checkpoint is of another layout",
            where=str(path),
            expected=layout_name,
            got=layout.name,
            fix=f"layout={layout.name}",
        )
    return layout, values


def check_model(
    values: dict[str, Any], config: ModelConfig, options: Options, place: Path, *, vocabulary: bool = True
) -> None:
    """Refuse a config.json that is not this model; every difference is listed."""
    problems = Problems()
    config.validate(problems)
    if values:
        hugging_face.check_config(values, config, problems, untie=options.untie, vocabulary=vocabulary)
    if problems.found:
        raise UserError(
            "the model's configuration does not fit the checkpoint", where=str(place), got=listed(problems.found)
        )


def _recorded_config(record: dict[str, Any] | None, values: dict[str, Any], place: Path) -> ModelConfig:
    if record:
        return hugging_face.model_config(record["checkpoint"]["model"], str(place))
    if not values:
        raise UserError("the model cannot be told: there is no config.json", where=str(place), fix="add model=NAME")
    return hugging_face.derive_config(values, place)


def expected_tensors(
    layout: Layout, config: ModelConfig, found: dict[str, TensorInfo], options: Options
) -> dict[str, list[tuple[int, ...]]]:
    """Their tensors and the shapes that each may have: with or without the rows that pad our vocabulary."""
    expected = {}
    for one in mapped_tensors(layout.rules, config):
        for name, shape in one.theirs:
            expected[name] = [shape]
            if one.rule.arrangement == VOCABULARY and one.num_padding_rows:
                expected[name].append(one.our_shape)
    if options.untie and HEAD not in found:
        del expected[HEAD]
    return expected


def _our_target(
    one: Mapped, source: TensorSource, padding: TensorSource, dtype: str, found: dict[str, TensorInfo]
) -> Target:
    """Our parameter from their tensors; a head that is tied to the embedding becomes its copy."""
    names = [EMBEDDING if name == HEAD and name not in found else name for name, _ in one.theirs]
    segments = [Segment(source, names[index], start, count) for index, start, count in one.runs]
    if one.num_padding_rows:
        if found[names[0]].num_rows == one.our_shape[0]:
            segments = [Segment(source, names[0], 0, one.our_shape[0])]
        else:
            first = one.our_shape[0] - one.num_padding_rows
            if padding.tensors[one.ours].num_rows == one.num_padding_rows:
                first = 0  # of a file of these rows alone
            segments.append(Segment(padding, one.ours, first, one.num_padding_rows))
    return Target(PREFIX + one.ours, TensorInfo(one.our_shape, dtype), segments, one.rule, one.layer)


def _padding_source(
    path: Path, config: ModelConfig, record: dict[str, Any] | None, dtype: str, seed: int
) -> TensorSource:
    """The rows that pad the vocabulary: those of the export's record where they fit, otherwise fresh ones."""
    if record and (path / PADDING_NAME).is_file():
        kept = SafetensorsSource(path / PADDING_NAME)
        expect_recorded(kept, record, path)
        wanted = {
            one.ours: (one.num_padding_rows, *one.our_shape[1:])
            for one in mapped_tensors(OUR_RULES, config)
            if one.num_padding_rows
        }
        if all(name in kept.tensors and kept.tensors[name].shape == shape for name, shape in wanted.items()):
            return kept
        kept.close()
    if not any(one.num_padding_rows for one in mapped_tensors(OUR_RULES, config)):
        return _Nothing()
    return fresh_weights(config, seed)


class _Nothing:
    """A source without tensors."""

    place = "none"

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        raise AssertionError(f"there is no tensor {name}")

    def verify(self) -> None:
        pass

    def rows_at_once(self, name: str) -> int | None:
        return None

    def identity(self) -> Any:
        return None

    def close(self) -> None:
        pass


def to_published(source_path: Path, target: Path, layout_name: str, options: Options) -> Outcome:
    """A folder in a published layout from a checkpoint of ours, whatever layout wrote it."""
    refuse_existing(target)
    layout = find_layout(layout_name)
    source = CheckpointSource(source_path)
    try:
        config = config_of(source)
        refuse_adapters(config, source.place)
        found = our_weights(source)
        expected = {one.ours: [one.our_shape] for one in mapped_tensors(layout.all_rules, config)}
        dtype = check_tensors(source.place, found, expected, options.dtype)
        check_absent(layout, config, source)
        targets, padding = [], []
        for one in mapped_tensors(layout.rules, config):
            key = PREFIX + one.ours
            for index, (name, shape) in enumerate(one.theirs):
                segments = [Segment(source, key, start, count) for start, count in one.inverse(index)]
                targets.append(Target(name, TensorInfo(shape, dtype), segments))
            if one.num_padding_rows:
                count = one.num_padding_rows
                segments = [Segment(source, key, one.our_shape[0] - count, count)]
                info = TensorInfo((count, *one.our_shape[1:]), dtype)
                padding.append(Target(one.ours, info, segments))
        into_shards(targets, options.shard_bytes)
        for one_target in padding:
            one_target.pieces = [whole_piece(one_target, PADDING_NAME, one_target.name)]
        targets += padding
        kept: list[Written] = []

        def finish(folder: Path, written: Written) -> None:
            kept.append(written)
            write_index(folder, targets)
            write_json(folder / "config.json", hugging_face.to_config(layout, config, dtype))
            write_json(folder / "generation_config.json", hugging_face.to_generation_config(config))
            write_record(folder, layout.name, source.manifest, written)
            if options.extras:
                options.extras(folder, written)

        what = {"action": "to_hf", "layout": layout.name, "dtype": dtype}
        result = execute(Plan(what, targets, [source]), target, finish, threads=options.threads)
    finally:
        source.close()
    return Outcome(config, layout.name, result, kept[0] if kept else None)


def config_of(source: CheckpointSource) -> ModelConfig:
    """The model of a checkpoint of ours, which must be a language model."""
    kind = source.manifest.get("kind")
    if kind != "transformer":
        raise UserError(
            "this checkpoint is not a language model",
            where=source.place,
            expected="kind transformer",
            got=f"kind {kind}",
            fix="layout=ibq for a vision tokenizer",
        )
    return hugging_face.model_config(source.manifest.get("model") or {}, source.place)


def refuse_adapters(config: ModelConfig, place: str) -> None:
    """Of conversions that know weights only."""
    if config.adapter.rank > 0:
        raise UserError(
            "the checkpoint has adapters beside its weights",
            where=place,
            fix=f"nextstate convert merge source={place} target=FOLDER, and convert that one; or to_peft for them alone",
        )


def our_weights(source: CheckpointSource) -> dict[str, TensorInfo]:
    return {name.removeprefix(PREFIX): info for name, info in source.tensors.items() if name.startswith(PREFIX)}


def check_absent(layout: Layout, config: ModelConfig, source: CheckpointSource) -> None:
    """Refuse to drop norms that do something."""
    for one in mapped_tensors(layout.absent, config):
        info = source.tensors[PREFIX + one.ours]
        rows = np.empty((info.num_rows, info.row_bytes), np.uint8)
        source.read_rows(PREFIX + one.ours, 0, info.num_rows, rows)
        expected = {"float32": b"\x00\x00\x80\x3f", "bfloat16": b"\x80\x3f"}[info.dtype]
        if rows.tobytes() != expected * info.num_rows:
            raise UserError(
                f"layout {layout.name} has no place for the norms of queries and keys, which this model uses",
                where=f"{source.place}: {one.ours}",
                expected="norms of one",
                fix="layout=qwen3 or layout=emu35",
            )


def reshard(source_path: Path, target: Path, options: Options) -> Outcome:
    """The same checkpoint, optimizer state included, in files that match another parallel layout."""
    refuse_existing(target)
    source = CheckpointSource(source_path)
    try:
        config = config_of(source)
        check_split(config, options)
        places = {one.ours: one for one in mapped_tensors(OUR_RULES, config)}
        targets = []
        for name, info in source.tensors.items():
            if name.startswith("random/"):  # streams belong to the ranks of the old layout
                continue
            logical = name.removeprefix(PREFIX)
            if name.startswith("optimizer/"):
                logical = name.split("/", 2)[-1]
            place = places.get(logical)
            segment = Segment(source, name, 0, info.num_rows)
            rule, layer = (place.rule, place.layer) if place else (None, None)
            targets.append(Target(name, info, [segment], rule, layer))
        derived = ("keys", "files", "manifest_crc32", "layout", "conversion", "format_version")
        metadata = {name: value for name, value in source.manifest.items() if name not in derived}
        what = {"action": "reshard", "tensor": options.tensor, "pipeline": options.pipeline}
        return to_checkpoint(target, targets, [source], config, metadata, what, options)
    finally:
        source.close()


def check_split(config: ModelConfig, options: Options) -> None:
    """Whether megatron-core could hold this model in the layout."""
    problems = Problems()
    config.validate(problems)
    problems.raise_if_any()
    ranks = {"tensor": options.tensor, "pipeline": options.pipeline}
    add_to(problems, split_problems(config, ranks, section="", of=""))
    problems.raise_if_any()
