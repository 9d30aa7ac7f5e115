"""Which of the waiting documents fill the rest of a row: three searches over lengths. Pure functions."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np


def closest_pair(firsts: Iterable[int], seconds: Sequence[int], room: int, slack: int) -> list[int]:
    """One length of `firsts` and, where one fits, one of `seconds` that together leave the least of `room`.

    Stops at the first pair that leaves at most `slack` tokens. `seconds` are sorted and used as often as they are found: the
    caller sees to it that there are two where a pair is twice the same length. O(log(len(seconds))) a first.
    """
    best: list[int] = []
    most = 0
    for first in firsts:
        if first > room:
            continue
        place = bisect.bisect_right(seconds, room - first)
        pair = [first, seconds[place - 1]] if place else [first]
        if sum(pair) > most:
            best, most = pair, sum(pair)
            if most >= room - slack:
                break
    return best


def fullest(lengths: Iterable[int], room: int, slack: int) -> list[int]:
    """Some of `lengths`, in order, each used at most once, that leave the least of `room`.

    Stops at the first that leave at most `slack` tokens, so lengths that come early are preferred. Every sum that can be
    reached is one bit of an integer: O(number of lengths * room / 64).
    """
    within, enough = (1 << (room + 1)) - 1, max(0, room - slack)
    reached = 1
    steps: list[tuple[int, int]] = []  # a length, and the sums reached before it came
    for length in lengths:
        both = (reached | (reached << length)) & within
        if both != reached:
            steps.append((length, reached))
            reached = both
            if reached >> enough:
                break
    total = reached.bit_length() - 1
    chosen: list[int] = []
    while total:
        length, before = steps.pop()
        if not (before >> total) & 1:
            chosen.append(length)
            total -= length
    return chosen[::-1]


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
