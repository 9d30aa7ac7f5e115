"""Which of the waiting documents fill the rest of a row, where they have few lengths. A pure function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def dearest(lengths: Sequence[int], copies: Sequence[int], prices: Sequence[int], room: int) -> list[int]:
    """How many of each length to take, at most `copies`, for the highest sum of prices in at most `room` tokens.

    O(len(lengths) * log(copies) * room): copies are tried in heaps of 1, 2, 4...
    """
    best = np.zeros(room + 1, np.int64)  # the highest price of a sum of at most so many tokens
    heaps: list[tuple[int, int, np.ndarray]] = []
    for number, (length, left, price) in enumerate(zip(lengths, copies, prices, strict=True)):
        left, size = min(left, room // length), 1
        while left > 0:
            size = min(size, left)
            with_heap = best[: room + 1 - size * length] + size * price
            better = with_heap > best[size * length :]
            best[size * length :][better] = with_heap[better]
            heaps.append((number, size, better))
            left, size = left - size, 2 * size
    taken = [0] * len(lengths)
    end = room
    for number, size, better in reversed(heaps):
        start = end - size * lengths[number]
        if start >= 0 and better[start]:
            taken[number] += size
            end = start
    return taken
