"""Ranges of flattened parameters as rectangles of logical ones."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.parallel.sharding import Block, LogicalParameter
from training.engines.flat_ranges import shards_of


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 5),
    halves=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    column_parts=st.integers(1, 2),
)
def test_shards_of_all_ranges_cover_the_logical_tensor_once(
    rows: int, columns: int, halves: bool, cuts: list[int], column_parts: int
) -> None:
    """Two tensor ranks (by rows, or by columns), a fused pair of halves or not, data ranks cut anywhere."""
    whole = torch.arange(rows * 2 * (2 if halves else 1) * columns * column_parts).view(-1, columns * column_parts)
    shape = tuple(whole.shape)
    rebuilt, count = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int)
    for rank in range(2 if column_parts == 1 else column_parts):
        if column_parts == 2:
            blocks = (Block((0, 0), (0, rank * columns), (shape[0], columns)),)
        elif halves:
            blocks = (
                Block((0, 0), (rank * rows, 0), (rows, columns)),
                Block((rows, 0), (2 * rows + rank * rows, 0), (rows, columns)),
            )
        else:
            blocks = (Block((0, 0), (rank * rows, 0), (rows, columns)),)
        place = [tuple(slice(o, o + n) for o, n in zip(b.global_offset, b.shape, strict=True)) for b in blocks]
        local = torch.cat([whole[where] for where in place]).contiguous().view(-1)
        parameter = LogicalParameter("name", shape, blocks, True)
        bounds = sorted({0, local.numel(), *(min(cut, local.numel()) for cut in cuts)})
        for start, stop in itertools.pairwise(bounds):
            for shard in shards_of("key", parameter, local[start:stop], start):
                where = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.tensor.shape, strict=True))
                rebuilt[where] = shard.tensor
                count[where] += 1
    assert bool((count == 1).all())
    assert torch.equal(rebuilt, whole)


def test_a_range_inside_one_row_and_a_vector() -> None:
    matrix = LogicalParameter("m", (4, 10), (Block((0, 0), (0, 0), (4, 10)),), False)
    (shard,) = shards_of("m", matrix, torch.arange(3), 12)
    assert (shard.global_offset, tuple(shard.tensor.shape)) == ((1, 2), (1, 3))
    vector = LogicalParameter("v", (10,), (Block((0,), (0,), (10,)),), False)
    (shard,) = shards_of("v", vector, torch.arange(4), 3)
    assert (shard.global_offset, tuple(shard.tensor.shape)) == ((3,), (4,))
