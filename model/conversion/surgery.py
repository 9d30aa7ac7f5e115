"""Vocabulary surgery: a text model's weights under our vocabulary, with new rows for the tokens it does not know.

The rows of the text tokens are copied; special, visual and padding rows are new, in the embedding and in the output
head alike. The rest of the model is converted as `from_hf` does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.conversion import hugging_face
from model.conversion.actions import (
    EMBEDDING,
    HEAD,
    PREFIX,
    Options,
    Outcome,
    check_model,
    check_split,
    expected_tensors,
    identify,
    to_checkpoint,
)
from model.conversion.checks import check_tensors
from model.conversion.generated_tensors import rows_from
from model.conversion.mappings import VOCABULARY, Layout, mapped_tensors
from model.conversion.plan import Segment, Target
from model.conversion.record import model_metadata
from model.conversion.sources import CheckpointSource, open_foreign
from model.conversion.tensors import TensorInfo, TensorSource, cast_rows
from model.conversion.writer import refuse_existing
from model.errors import UserError
from model.vocabulary import Vocabulary

COPIED_EMU35 = 151_646  # Qwen3's rows that mean the same in Emu3.5: text, and the first three special tokens
METHODS = ("normal", "mean", "codebook")
NUM_MIXED = 1024  # text rows whose random mixtures make noise of the text rows' covariance
NEW_ROWS = 1024  # drawn by one generator; part of the definition of the new rows
STATISTICS_ROWS = 4096  # read at a time
CODEBOOK_NAME = "quantize.embedding.weight"


@dataclass
class SurgeryOptions:
    """How the new rows of `convert surgery` start."""

    rows: str = "mean"  # normal | mean | codebook: see docs/conversion.md
    std: float | None = None  # of `normal`; null: the model's init_std
    noise: float = 1.0  # of `mean`: the noise's covariance in units of the text rows' own
    codebook: str | None = None  # of `codebook`: a vision tokenizer, ours or a published one
    copied_rows: int | None = None  # null: 151,646 for the emu35 vocabulary, otherwise the text ids


@dataclass(frozen=True)
class TextRows:
    """Statistics of the copied rows: mean [n], mean variance, and a sample of rows minus the mean [m, n]."""

    mean: np.ndarray
    variance: float
    sample: np.ndarray


# New rows [start, stop) of the full table, float32, asked for in blocks of NEW_ROWS.
Rows = Callable[[int, int], np.ndarray]


def operate(
    source_path: Path,
    target: Path,
    config: ModelConfig,
    layout_name: str | None,
    options: Options,
    surgery: SurgeryOptions,
) -> Outcome:
    """A checkpoint of `config` (its own vocabulary) from a text model of the same sizes."""
    refuse_existing(target)
    source = open_foreign(source_path)
    try:
        layout, values = identify(source_path, layout_name)
        check_model(values, config, options, source_path, vocabulary=False)
        copied = copied_rows(config, surgery)
        dtype = _check_source(source, layout, config, copied, options, source_path)
        config = hugging_face.with_dtype(config, dtype)
        check_split(config, options)
        codebook = read_codebook(surgery, config) if surgery.rows == "codebook" else None
        targets: list[Target] = []
        sources: list[TensorSource] = [source]
        for one in mapped_tensors(layout.rules, config):
            info = TensorInfo(one.our_shape, dtype)
            names = [EMBEDDING if name == HEAD and name not in source.tensors else name for name, _ in one.theirs]
            if one.rule.arrangement == VOCABULARY:
                make = new_rows(one.ours, info, source, names[0], copied, config, options.seed, surgery, codebook)
                new = rows_from(f"new rows of {one.ours}", one.ours, info, make, NEW_ROWS)
                sources.append(new)
                segments = [
                    Segment(source, names[0], 0, copied),
                    Segment(new, one.ours, copied, info.num_rows - copied),
                ]
            else:
                segments = [Segment(source, names[index], start, count) for index, start, count in one.runs]
            targets.append(Target(PREFIX + one.ours, info, segments, one.rule, one.layer))
        what = describe(config, layout.name, copied, surgery, options, untied=HEAD not in source.tensors)
        metadata = model_metadata(config, options.seed)
        outcome = to_checkpoint(target, targets, sources, config, metadata, what, options)
        outcome.layout = layout.name
        return outcome
    finally:
        source.close()


def copied_rows(config: ModelConfig, surgery: SurgeryOptions) -> int:
    vocabulary = Vocabulary.from_config(config.vocabulary)
    default = COPIED_EMU35 if config.vocabulary.preset == "emu35" else vocabulary.text_size
    copied = surgery.copied_rows if surgery.copied_rows is not None else default
    if not 0 < copied <= vocabulary.visual_start:
        raise UserError(
            "surgery.copied_rows is outside the text part of the vocabulary",
            expected=f"1 to {vocabulary.visual_start}",
            got=str(copied),
        )
    return copied


def describe(
    config: ModelConfig, layout: str, copied: int, surgery: SurgeryOptions, options: Options, *, untied: bool
) -> dict[str, Any]:
    """What the manifest records of the new rows."""
    vocabulary = Vocabulary.from_config(config.vocabulary)
    return {
        "action": "surgery",
        "layout": layout,
        "dtype": config.dtype,
        "seed": options.seed,
        "untied": untied,
        "copied_rows": copied,
        "new_special_rows": vocabulary.visual_start - copied,
        "new_visual_rows": vocabulary.visual_size,
        "padding_rows": vocabulary.padded_size - vocabulary.size,
        "rows": surgery.rows,
        "std": surgery.std,
        "noise": surgery.noise,
        "codebook": surgery.codebook,
    }


def _check_source(
    source: TensorSource, layout: Layout, config: ModelConfig, copied: int, options: Options, place: Path
) -> str:
    """Like `from_hf`'s check, but with any number of vocabulary rows that holds the copied ones."""
    expected = expected_tensors(layout, config, source.tensors, options)
    for name in (EMBEDDING, HEAD):
        info = source.tensors.get(name)
        if name in expected and info is not None:
            fits = len(info.shape) == 2 and info.shape[0] >= copied
            expected[name] = [
                info.shape if fits and info.shape[1] == config.hidden_size else (copied, config.hidden_size)
            ]
    return check_tensors(str(place), source.tensors, expected, options.dtype)


def new_rows(
    ours: str,
    info: TensorInfo,
    source: TensorSource,
    name: str,
    copied: int,
    config: ModelConfig,
    seed: int,
    surgery: SurgeryOptions,
    codebook: np.ndarray | None,
) -> Rows:
    """Rows of one table by the chosen method; special and padding rows of `codebook` are those of `mean`."""
    from model.parallel.initialization import initial_rows

    vocabulary = Vocabulary.from_config(config.vocabulary)
    std = surgery.std if surgery.std is not None else config.init_std

    def draw(start: int, stop: int, width: int, spread: float) -> np.ndarray:
        shape = (stop - start, width)
        return initial_rows(f"surgery/{ours}/{start}", shape, spread, seed, 0, stop - start).numpy()

    def normal(start: int, stop: int) -> np.ndarray:
        return draw(start, stop, info.row_elements, std)

    if surgery.rows == "normal":
        return normal
    text = text_statistics(source, name, copied)
    num_mixed = len(text.sample)

    def mean(start: int, stop: int) -> np.ndarray:
        draws = draw(start, stop, num_mixed, 1.0)
        result: np.ndarray = text.mean + math.sqrt(surgery.noise / num_mixed) * (draws @ text.sample)
        return result

    if codebook is None:
        return mean
    width = codebook.shape[1]
    projection = initial_rows("surgery/projection", (width, info.row_elements), 1.0, seed, 0, width).numpy()
    spread = float(np.mean(np.square(codebook, dtype=np.float64)))  # one projected value has `width` times this
    gain = math.sqrt(text.variance / max(width * spread, 1e-30))

    def projected(start: int, stop: int) -> np.ndarray:
        rows = mean(start, stop)
        first, last = vocabulary.visual_start, vocabulary.size
        low, high = max(start, first), min(stop, last)
        if low < high:
            rows[low - start : high - start] = text.mean + gain * (codebook[low - first : high - first] @ projection)
        return rows

    return projected


def text_statistics(source: TensorSource, name: str, copied: int) -> TextRows:
    """One pass over the copied rows, in blocks."""
    info = source.tensors[name]
    total = np.zeros(info.row_elements)
    squares, sample = 0.0, []
    stride = max(1, copied // NUM_MIXED)
    for start in range(0, copied, STATISTICS_ROWS):
        stop = min(start + STATISTICS_ROWS, copied)
        values = read_floats(source, name, start, stop)
        total += values.sum(axis=0, dtype=np.float64)
        squares += float(np.square(values, dtype=np.float64).sum())
        sample.append(values[(-start) % stride :: stride].copy())
    mean = total / copied
    variance = max(squares / (copied * info.row_elements) - float(np.square(mean).mean()), 0.0)
    rows = np.concatenate(sample)[:NUM_MIXED] - mean
    return TextRows(mean.astype(np.float32), variance, rows.astype(np.float32))


def read_floats(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    """Rows as float32 [stop - start, n]."""
    info = source.tensors[name]
    raw = np.empty((stop - start, info.row_bytes), np.uint8)
    source.read_rows(name, start, stop, raw)
    return cast_rows(raw, info.dtype, "float32").view(np.float32).reshape(stop - start, -1)


def read_codebook(surgery: SurgeryOptions, config: ModelConfig) -> np.ndarray:
    """float32 [number of codes, width] of a vision tokenizer; as many codes as the vocabulary has visual ids."""
    if surgery.codebook is None:
        raise UserError("surgery.rows=codebook needs a vision tokenizer", fix="surgery.codebook=FOLDER")
    path, name = Path(surgery.codebook), CODEBOOK_NAME
    source: TensorSource
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        source, name = CheckpointSource(path), PREFIX + CODEBOOK_NAME
    else:
        source = open_foreign(path)
    try:
        size = Vocabulary.from_config(config.vocabulary).visual_size
        info = source.tensors.get(name)
        if info is None or len(info.shape) != 2 or info.shape[0] != size:
            raise UserError(
                "the vision tokenizer's codebook does not fit the vocabulary",
                where=str(path),
                expected=f"{name} with {size} rows",
                got=str(list(info.shape)) if info else "no such tensor",
            )
        values = read_floats(source, name, 0, size)
        source.verify()
        return values
    finally:
        source.close()
