"""A conversion before a byte is written: which rows of which sources make which rectangles of which files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from model.conversion.mappings import Rule
from model.conversion.safetensors_file import FileLayout, lay_out_file
from model.conversion.tensors import TensorInfo, TensorSource


@dataclass(frozen=True)
class Segment:
    """Rows [start, start + count) of a source's tensor."""

    source: TensorSource
    name: str
    start: int
    count: int

    @property
    def dtype(self) -> str:
        return self.source.tensors[self.name].dtype


@dataclass(frozen=True)
class Piece:
    """A rectangle of a target tensor and where it is stored. Columns count elements of a row."""

    file: str
    stored_name: str
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    shape: tuple[int, ...]  # as the file's header says it

    @property
    def offset(self) -> tuple[int, ...]:
        return (self.first_row, self.first_column, *(0,) * (len(self.shape) - 2))[: len(self.shape)]


@dataclass
class Target:
    """A tensor to be written: the rows of its segments behind each other, stored as its pieces."""

    name: str
    info: TensorInfo
    segments: list[Segment]
    rule: Rule | None = None
    layer: int | None = None
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Plan:
    """`what` names the conversion (JSON); with the sources' identity it decides whether a half-done one goes on."""

    what: dict[str, Any]
    targets: list[Target]
    sources: list[TensorSource]
    files: list[FileLayout] = field(default_factory=list)

    def __post_init__(self) -> None:
        for target in self.targets:
            num_rows = sum(segment.count for segment in target.segments)
            assert num_rows == target.info.num_rows, f"{target.name}: {num_rows} rows planned"
        stored: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
        for target in self.targets:
            for piece in target.pieces:
                tensors = stored.setdefault(piece.file, {})
                assert piece.stored_name not in tensors, f"two tensors named {piece.stored_name}"
                tensors[piece.stored_name] = (piece.shape, target.info.dtype)
        self.files = [lay_out_file(name, tensors) for name, tensors in sorted(stored.items())]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def fingerprint(self) -> str:
        identity = [self.what, [source.identity() for source in self.sources]]
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16)
        for file in self.files:
            digest.update(file.name.encode() + file.header)
        return digest.hexdigest()


def whole_piece(target: Target, file: str, stored_name: str) -> Piece:
    info = target.info
    return Piece(file, stored_name, 0, info.num_rows, 0, info.row_elements, info.shape)


def into_shards(targets: Iterable[Target], shard_bytes: int) -> None:
    """Whole tensors into files named as transformers names them, each of `shard_bytes` at most where tensors allow."""
    shards: list[list[Target]] = [[]]
    used = 0
    for target in targets:
        if shards[-1] and used + target.info.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(target)
        used += target.info.num_bytes
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for target in shard:
            target.pieces = [whole_piece(target, name, target.name)]


def into_ranks(targets: Iterable[Target], tensor: int, pipeline: int, num_layers: int) -> None:
    """Each rank's rectangles into that rank's file, as training with this layout would write them."""
    per_stage = -(-num_layers // pipeline)
    stages = {"first": 0, "last": pipeline - 1}
    for target in targets:
        rule = target.rule
        stage = 0
        if rule is not None:
            stage = stages.get(rule.stage, (target.layer or 0) // per_stage)
        for part, rectangle in _slices(target, tensor):
            rank = stage * tensor + part
            first_row, num_rows, first_column, num_columns = rectangle
            shape = target.info.shape
            if len(shape) == 2:
                shape = (num_rows, num_columns)
            elif shape:
                shape = (num_rows, *shape[1:])
            name = f"{target.name}@{','.join(map(str, (first_row, first_column)[: len(shape)]))}"
            target.pieces.append(
                Piece(f"rank_{rank:05d}.safetensors", name, first_row, num_rows, first_column, num_columns, shape)
            )


def _slices(target: Target, tensor: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(tensor-parallel rank, (first row, rows, first column, columns)) of each rectangle."""
    rows, columns = target.info.num_rows, target.info.row_elements
    split = target.rule.split if target.rule else None
    if split is None or tensor == 1:
        return [(0, (0, rows, 0, columns))]
    if split == "columns":
        width = columns // tensor
        return [(rank, (0, rows, rank * width, width)) for rank in range(tensor)]
    num_parts = 2 if split == "halves" else 1
    height = rows // (num_parts * tensor)
    return [
        (rank, (part * (rows // num_parts) + rank * height, height, 0, columns))
        for rank in range(tensor)
        for part in range(num_parts)
    ]
