"""Which of the waiting documents fill the rest of a row, where they have few lengths. A pure function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Dearest:
    """How many of each length to take, at most `copies`, for the highest sum of prices in a room of at most `most_room` tokens.

    Made once for all rooms: O(len(lengths) * log(copies) * most_room), as copies are tried in heaps of 1, 2, 4...
    """

    def __init__(self, lengths: Sequence[int], copies: Sequence[int], prices: Sequence[int], most_room: int):
        self._lengths = lengths
        best = np.zeros(most_room + 1, np.int64)  # the highest price of a sum of at most so many tokens
        self._heaps: list[tuple[int, int, bytes]] = []  # number of the length, copies, whether they are taken by room
        self._found: dict[int, dict[int, int]] = {}
        for number, (length, left, price) in enumerate(zip(lengths, copies, prices, strict=True)):
            left, size = min(left, most_room // length), 1
            while left > 0:
                size = min(size, left)
                with_heap = best[: most_room + 1 - size * length] + size * price
                rest = best[size * length :]
                better = with_heap > rest
                np.maximum(rest, with_heap, out=rest)
                self._heaps.append((number, size, better.tobytes()))
                left, size = left - size, 2 * size

    def of(self, room: int) -> dict[int, int]:
        """Copies to take by the number of their length, those of none left out."""
        if room in self._found:
            return self._found[room]
        taken: dict[int, int] = {}
        end = room
        for number, size, better in reversed(self._heaps):
            start = end - size * self._lengths[number]
            if start >= 0 and better[start]:
                taken[number] = taken.get(number, 0) + size
                end = start
        self._found[room] = taken
        return taken
