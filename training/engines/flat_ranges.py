"""Model weights and optimizer state as rectangles of logical tensors, the same keys in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.parallel.sharding import Block, LogicalParameter
from training.contracts.shards import Shard, ShardReader


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened local parameter and the rectangle of the logical one that they are."""

    start: int
    stop: int
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]


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


@torch.no_grad()
def read_into(reader: ShardReader, key: str, parameter: LogicalParameter, flat: torch.Tensor, start: int) -> None:
    """Fill a flat tensor that holds elements [start, start + n) of the local parameter."""
    for shard in shards_of(key, parameter, flat, start):
        shard.tensor.copy_(reader.read(key, shard.global_offset, shard.tensor.shape))
