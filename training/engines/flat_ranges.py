"""Model weights and optimizer state as rectangles of logical tensors, the same keys in every layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from model.errors import UserError
from model.parallel.sharding import ADAPTER, Block, LogicalParameter
from training.contracts.shards import Shard, ShardReader


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened local parameter and the rectangle of the logical one that they are."""

    start: int
    stop: int
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HeldPart:
    """What a rank holds of a logical parameter: elements [start, start + n) of the local one, as a flat view."""

    parameter: LogicalParameter
    flat: torch.Tensor
    start: int


def _row_runs(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range of a row-major matrix into at most three rectangles: part of a row, whole rows, part of a row."""
    if start % width:
        cut = min(stop, start + width - start % width)
        yield start, cut
        start = cut
    whole = start + (stop - start) // width * width
    if whole > start:
        yield start, whole
    if stop > whole:
        yield whole, stop


def _block_pieces(block: Block, start: int, stop: int) -> Iterator[Piece]:
    width = block.shape[1] if len(block.shape) > 1 else 1
    first = block.local_offset[0] * width
    start, stop = max(start, first), min(stop, first + block.shape[0] * width)
    if start >= stop:
        return
    for run_start, run_stop in _row_runs(start - first, stop - first, width):
        row, column = divmod(run_start, width)
        num_rows = max(1, (run_stop - run_start) // width)
        offset: tuple[int, ...] = (block.global_offset[0] + row,)
        shape: tuple[int, ...] = (num_rows,)
        if len(block.shape) > 1:
            offset += (block.global_offset[1] + column,)
            shape += ((run_stop - run_start) // num_rows,)
        yield Piece(first + run_start, first + run_stop, offset, shape)


def pieces(parameter: LogicalParameter, start: int, stop: int) -> list[Piece]:
    """Rectangles that make up elements [start, stop) of this rank's flattened part of `parameter`."""
    assert len(parameter.global_shape) <= 2, f"{parameter.name}: parameters have one or two dimensions"
    return [piece for block in parameter.blocks for piece in _block_pieces(block, start, stop)]


def shards_of(key: str, parameter: LogicalParameter, flat: torch.Tensor, start: int) -> list[Shard]:
    """Shards of a flat tensor that holds elements [start, start + n) of the local parameter. Views, no copies."""
    return [
        Shard(key, flat[p.start - start : p.stop - start].view(p.shape), parameter.global_shape, p.global_offset)
        for p in pieces(parameter, start, start + flat.numel())
    ]


def check_fits(reader: ShardReader, key: str, parameter: LogicalParameter) -> None:
    """Raises `UserError` where a checkpoint lacks the parameter or has it in another shape."""
    known = key in set(reader.keys())
    if known and tuple(reader.global_shape(key)) == parameter.global_shape:
        return
    raise UserError(
        "the checkpoint does not fit this model",
        where=key,
        expected=str(parameter.global_shape),
        got=str(tuple(reader.global_shape(key))) if known else "no such key",
        fix="train with the model configuration that the checkpoint was written with",
    )


def read_weights(reader: ShardReader, parts: Iterable[HeldPart]) -> None:
    """Fill them from a checkpoint, and read no more than that; adapters that it lacks altogether stay as they are.

    Raises `UserError` where the checkpoint is of another model.
    """
    known = set(reader.keys())
    has_adapters = any(ADAPTER in key for key in known)
    for part in parts:
        key = f"model/{part.parameter.name}"
        if has_adapters or ADAPTER not in key:
            check_fits(reader, key, part.parameter)
            read_into(reader, key, part.parameter, part.flat, part.start)


@torch.no_grad()
def read_into(reader: ShardReader, key: str, parameter: LogicalParameter, flat: torch.Tensor, start: int) -> None:
    """Fill a flat tensor that holds elements [start, start + n) of the local parameter."""
    for shard in shards_of(key, parameter, flat, start):
        shard.tensor.copy_(reader.read(key, shard.global_offset, shard.tensor.shape))
