"""What the choice of rows computes, over arrays. Compiled by numba when it is first called, and kept in numba's cache.

Pieces are int64 [n, 3]: document, start, length. `places` count the pieces that wait, those first that wait longest. `state` and
`settings` are those of `data_pipeline.packing.window`.

Everything that is compiled stands in this file: numba's cache looks at the file of the function that is called, and would
not see that one in another file has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    """Typed as the plain function."""
    compiler: Any = numba.njit
    try:
        kept: _Function = compiler(cache=True)(function)
    except RuntimeError:  # neither the folder of this file nor the user's cache can be written
        kept = compiler(function)
    return kept


# The end of a row, about so many pieces of average length, is chosen; what comes before is taken as it comes.
_CHOSEN_PIECES = 2.5
_CHOSEN_PRICED_PIECES = 3  # where lengths are few
# A length of which twice its share waits costs a tenth more. Both figures were chosen on the demo's pools:
# `python -m benchmarks.packing` shows what they give.
_PRICE_OF_DOUBLE_SHARE = 0.1
_EXPECTED_AT_LEAST = 16  # pieces: keeps the share of a rare length from being noise
_PRICE_OF_TOKEN = 4096
_PRICED_SHARE = 2  # of the rows made at once: what they begin with cannot be chosen any more
_REPRICED_ROWS = 16  # prices are computed anew after so many rows
# Where nothing comes any more, what fits badly has to be used up: fewer rows at once, each with prices of its own.
_LAST_PRICED_SHARE = 8

_FIRSTS = 8  # pieces tried as the first of a pair, for each row in each round
_ROUNDS = 4  # with a bound on what is left, so that a row that finds an exact fit later does not take a poor one now
_GROWTH = 8  # of that bound from round to round
_NOTHING = 1 << 40  # more than any room


@_compiled
def copy(source, at, target, to):
    for column in range(3):
        target[to, column] = source[at, column]


@_compiled
def take_in(pieces, fillers, at, state, waiting, reservoir, arrived, settings):
    """Lets pieces from place `at` on wait until they are too many, or the reservoir overflows and its first filler is longer than
    a row; returns the place of the next one.
    """
    s = state[0]
    while s.waiting_tokens <= settings.most_tokens:
        if s.filler_tokens > settings.most_tokens + settings.sequence_length:
            length = reservoir[s.first_filler, 2]
            if length > settings.sequence_length:
                break
            copy(reservoir, s.first_filler, waiting, s.num_waiting)
            s.first_filler += 1
            s.filler_tokens -= length
        elif at == len(pieces):
            break
        else:
            at += 1
            length = pieces[at - 1, 2]
            if fillers[at - 1]:
                copy(pieces, at - 1, reservoir, s.end_filler)
                s.end_filler += 1
                s.filler_tokens += length
                continue
            copy(pieces, at - 1, waiting, s.num_waiting)
        s.num_waiting += 1
        s.waiting_tokens += length
        s.num_arrived += 1
        arrived[length] += 1
    return at


@_compiled
def make_full_rows(pieces, fillers, at, reservoir, state, waiting, arrived, settings, made, ends, rooms):
    """Takes pieces in and makes rows, until nothing comes, rows have to be filled or there is no room; returns the next place."""
    s = state[0]
    s.num_made = s.num_rows = s.num_closed = 0
    while True:
        at = take_in(pieces, fillers, at, state, waiting, reservoir, arrived, settings)
        is_full = s.num_made > 0 and s.num_made + s.num_waiting > len(made)
        if s.waiting_tokens <= settings.most_tokens or is_full:
            return at
        make_rows(settings.rows_at_once, False, state, waiting, arrived, settings, made, ends, rooms)
        if s.filler_tokens > 0:
            return at
        s.num_closed = s.num_rows


@_compiled
def make_rows(num_rows, is_end, state, waiting, arrived, settings, made, ends, rooms):
    """At most `num_rows` rows of the pieces that wait, fewer where fewer wait or lengths are few; behind those in `made`.

    is_end: nothing comes any more.
    """
    s = state[0]
    lengths = waiting[: s.num_waiting, 2].copy()
    average = s.waiting_tokens / len(lengths)
    distinct = _few_lengths(lengths, average, settings)
    is_priced = len(distinct) > 0
    chosen_from = average * (_CHOSEN_PRICED_PIECES if is_priced else _CHOSEN_PIECES)
    if is_priced:
        share = _LAST_PRICED_SHARE if is_end else _PRICED_SHARE
        num_rows = max(1, min(num_rows, settings.rows_at_once // share))
    starts = _begin_rows(lengths, num_rows, settings.sequence_length, chosen_from)
    taken = starts[-1]
    left = rooms[s.num_rows : s.num_rows + len(starts) - 1]
    for row in range(len(left)):
        left[row] = settings.sequence_length
        for place in range(starts[row], starts[row + 1]):
            left[row] -= lengths[place]
    if is_priced:
        repriced = 1 if is_end else _REPRICED_ROWS
        rows, places = _priced_ends(left, lengths[taken:], distinct, arrived, s.num_arrived, repriced, settings.slack)
    else:
        rows, places = fill_rooms(left, lengths[taken:], settings.slack)
    for number in range(len(rows)):
        left[rows[number]] -= lengths[taken + places[number]]
    for room in left:
        s.waiting_tokens -= settings.sequence_length - room
    _lay_out(state, waiting, starts, rows, places, made, ends)
    s.num_waiting = _drop(waiting, s.num_waiting, taken, places)


@_compiled
def _few_lengths(lengths, average, settings):
    """The different lengths, ascending; none where they are too many for prices."""
    is_there = np.zeros(settings.sequence_length + 1, np.bool_)
    found = np.empty(len(lengths), np.int64)
    count = 0
    for length in lengths:
        if not is_there[length]:
            if (count + 1) * _CHOSEN_PRICED_PIECES * average > settings.most_cells:
                return found[:0]
            is_there[length], found[count] = True, length
            count += 1
    found[:count].sort()
    return found[:count]


@_compiled
def _begin_rows(lengths, num_rows, sequence_length, chosen_from):
    """The first places of at most `num_rows` rows that take the pieces as they come, and the place behind the last row.

    A row takes pieces until at most `chosen_from` tokens are left, or the next one does not fit.
    """
    starts = np.empty(num_rows + 1, np.int64)
    starts[0], count, room = 0, 1, sequence_length
    for place in range(len(lengths)):
        if place > starts[count - 1] and (room <= chosen_from or lengths[place] > room):
            starts[count], room = place, sequence_length
            count += 1
            if count > num_rows:
                return starts
        room -= lengths[place]
    starts[count] = len(lengths)
    return starts[: count + 1]


@_compiled
def _lay_out(state, waiting, starts, rows, places, made, ends):
    """Row after row what each begins with, then what ends it, in the order in which that was found."""
    s = state[0]
    num_rows, taken = len(starts) - 1, starts[-1]
    sizes = np.zeros(num_rows, np.int64)
    for row in rows:
        sizes[row] += 1
    end = s.num_made
    at = np.empty(num_rows, np.int64)
    for row in range(num_rows):
        at[row] = end + starts[row + 1] - starts[row]
        for place in range(starts[row], starts[row + 1]):
            copy(waiting, place, made, end + place - starts[row])
        end = at[row] + sizes[row]
        ends[s.num_rows + row] = end
    for number in range(len(rows)):
        copy(waiting, taken + places[number], made, at[rows[number]])
        at[rows[number]] += 1
    s.num_made, s.num_rows = end, s.num_rows + num_rows


@_compiled
def _drop(waiting, num_waiting, taken, places):
    """Takes the first pieces and those of `places` behind them out of those that wait; returns how many are left."""
    is_left = np.ones(num_waiting - taken, np.bool_)
    for place in places:
        is_left[place] = False
    count = 0
    for place in range(num_waiting - taken):
        if is_left[place]:
            copy(waiting, taken + place, waiting, count)
            count += 1
    return count


@_compiled
def _priced_ends(rooms, lengths, distinct, arrived, num_arrived, repriced_rows, slack):
    """Rows and places of the pieces that end them, of each length those that wait longest."""
    rows, found = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    count = priced_end = 0
    places, first, end = _by_number(lengths, distinct)
    numbers, sizes, better = first[:0], first[:0], np.zeros((0, 0), np.bool_)
    counts = np.zeros(len(distinct), np.int64)
    for row in range(len(rooms)):
        if rooms[row] <= slack:
            continue
        if row < priced_end:
            copies_in(rooms[row], distinct, numbers, sizes, better, counts)
        # Rows before may have used up a length.
        if row >= priced_end or (end - first < counts).any():
            priced_end = row + repriced_rows
            prices = _prices(distinct, end - first, arrived, num_arrived)
            most_room = rooms[row:priced_end].max()
            numbers, sizes, better = dearest(distinct, end - first, prices, most_room)
            copies_in(rooms[row], distinct, numbers, sizes, better, counts)
        for number in range(len(distinct) - 1, -1, -1):
            for _ in range(counts[number]):
                rows[count], found[count] = row, places[first[number]]
                first[number] += 1
                count += 1
    return rows[:count], found[:count]


@_compiled
def _by_number(lengths, distinct):
    """All places, length after length; where those of each length begin and end among them."""
    numbers = _num_up_to(lengths, distinct) - 1
    end = np.zeros(len(distinct), np.int64)
    for number in numbers:
        end[number] += 1
    for number in range(1, len(end)):
        end[number] += end[number - 1]
    places, first = np.empty(len(lengths), np.int64), end.copy()
    for place in range(len(lengths) - 1, -1, -1):
        first[numbers[place]] -= 1
        places[first[numbers[place]]] = place
    return places, first, end


@_compiled
def _num_up_to(values, ordered):
    """For each value how many entries of an ascending array are at most that. All are searched for side by side, and without
    branches, which the processor would guess wrongly.
    """
    found = np.zeros(len(values), np.int64)
    count = len(ordered)
    while count > 0:
        half = (count + 1) >> 1
        for number in range(len(values)):
            found[number] += half * (ordered[found[number] + half - 1] <= values[number])
        count -= half
    return found


@_compiled
def _prices(distinct, copies, arrived, num_arrived):
    """Of a piece of each length: its tokens, dearer where more of it wait than are expected by its share of all that came."""
    num_waiting = copies.sum()
    prices = np.empty(len(distinct), np.int64)
    for number, length in enumerate(distinct):
        expected = num_waiting * arrived[length] / num_arrived
        excess = (copies[number] - expected) / (expected + _EXPECTED_AT_LEAST)
        prices[number] = round(length * _PRICE_OF_TOKEN * (1 + _PRICE_OF_DOUBLE_SHARE * excess))
    return prices


@_compiled
def dearest(lengths, copies, prices, most_room):
    """What to take of each length, at most `copies`, for the highest sum of prices, in every room of at most `most_room` tokens.

    O(len(lengths) * log(copies) * most_room), as copies are tried in heaps of 1, 2, 4... Returns of each heap the number of its
    length, its copies, and by room whether it is taken, bool [heaps, most_room + 1].
    """
    numbers, sizes = _heaps(lengths, copies, most_room)
    better = np.zeros((len(numbers), most_room + 1), np.bool_)
    best = np.zeros(most_room + 1, np.int64)  # the highest price of a sum of at most so many tokens
    after = np.zeros(most_room + 1, np.int64)  # the same when one heap more was tried
    for heap in range(len(numbers)):
        width, price = sizes[heap] * lengths[numbers[heap]], sizes[heap] * prices[numbers[heap]]
        after[:width] = best[:width]
        without, beneath, chosen, is_better = (
            best[width:],
            best[: len(best) - width],
            after[width:],
            better[heap, width:],
        )
        for room in range(len(without)):
            with_heap = beneath[room] + price
            is_better[room] = with_heap > without[room]
            chosen[room] = max(with_heap, without[room])
        best, after = after, best
    return numbers, sizes, better


@_compiled
def _heaps(lengths, copies, most_room):
    """Numbers of lengths and copies: at most so many as a room holds, in heaps that together make every count."""
    numbers, sizes = np.empty(64 * len(lengths), np.int64), np.empty(64 * len(lengths), np.int64)
    count = 0
    for number in range(len(lengths)):
        left, size = min(copies[number], most_room // lengths[number]), 1
        while left > 0:
            size = min(size, left)
            numbers[count], sizes[count] = number, size
            left, size, count = left - size, 2 * size, count + 1
    return numbers[:count], sizes[:count]


@_compiled
def copies_in(room, lengths, numbers, sizes, better, counts):
    """Writes into `counts` how many of each length the heaps that `better` takes in a room have."""
    counts[:] = 0
    end = room
    for heap in range(len(numbers) - 1, -1, -1):
        if better[heap, end]:
            counts[numbers[heap]] += sizes[heap]
            end -= sizes[heap] * lengths[numbers[heap]]


@_compiled
def fill_rooms(rooms, lengths, slack):
    """Which of the waiting pieces end which rows: rows and places of pieces, both int64 [k], each piece at most once.

    rooms: tokens left in each row, int64 [R]. lengths: of the waiting pieces, int64 [n]. Rows that leave more than `slack` go on
    until nothing fits.

    In a round every row tries a few first pieces, and for each the longest second one that fits beside it (or none); it takes the
    pair that leaves the least. Of rows that want the same piece the first one has it, the others try again.
    """
    rooms = rooms.copy()
    rows, found = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    count = number = 0
    by_length = sorted_places(lengths)  # of those that are not taken
    by_age = np.arange(len(lengths))
    active = np.arange(len(rooms))
    while len(by_age):
        is_open = np.empty(len(rooms), np.bool_)
        for row, room in enumerate(rooms):
            is_open[row] = room > slack and room >= lengths[by_length[0]]
        active = _those(active, is_open)
        if not len(active):
            break
        bound = max(slack, 1) * _GROWTH**number if number < _ROUNDS else _NOTHING
        winners, pairs = _won_pairs(active, rooms, lengths, by_length, by_age, number, bound)
        is_left = np.ones(len(lengths), np.bool_)
        for place, winner in enumerate(winners):
            for piece in pairs[place]:
                if piece >= 0:
                    rows[count], found[count] = winner, piece
                    count += 1
                    rooms[winner] -= lengths[piece]
                    is_left[piece] = False
        by_length, by_age = _those(by_length, is_left), _those(by_age, is_left)
        number += 1
    return rows[:count], found[:count]


@_compiled
def _those(numbers, are_wanted):
    """Of some numbers, in order."""
    found = np.empty(len(numbers), np.int64)
    count = 0
    for number in numbers:
        found[count] = number
        count += are_wanted[number]
    return found[:count]


@_compiled
def sorted_places(lengths):
    """By length, those of one length in order."""
    keys = np.empty(len(lengths), np.int64)
    for place, length in enumerate(lengths):
        keys[place] = length << 32 | place
    keys.sort()
    return keys & 0xFFFF_FFFF


@_compiled
def _won_pairs(active, rooms, lengths, by_length, by_age, number, bound):
    """The rows that get their pair in this round, and the pairs, int64 [k, 2] of places (-1: none).

    A row whose pair leaves more than `bound` waits for the next round, and so does one that wants what an earlier row wants.
    """
    tried = min(_FIRSTS, len(by_age)) + 1  # none, too: one piece may be enough
    firsts, beside = _firsts(active, rooms, lengths, by_age, tried, number * (_FIRSTS - 1))
    seconds = _num_up_to(beside, lengths[by_length]) - 1
    winners, pairs = np.empty(len(active), np.int64), np.empty((len(active), 2), np.int64)
    is_wanted = np.zeros(len(lengths) + 1, np.bool_)  # the last for -1
    count = 0
    for place, row in enumerate(active):
        first = second = -1
        least = bound + 1
        for at in range(place * tried, (place + 1) * tried):
            found = seconds[at]
            if found >= 0 and by_length[found] == firsts[at]:  # not the same piece twice
                found -= 1
            left = beside[at] - lengths[by_length[found]] if found >= 0 else beside[at]
            if 0 <= left < least and (found >= 0 or firsts[at] >= 0):
                first, second, least = firsts[at], by_length[found] if found >= 0 else -1, left
        if least <= bound:
            winners[count], pairs[count, 0], pairs[count, 1] = row, first, second
            count += not (is_wanted[first] or is_wanted[second])
            is_wanted[first] = is_wanted[second] = True
            is_wanted[-1] = False
    return winners[:count], pairs[:count]


@_compiled
def _firsts(active, rooms, lengths, by_age, tried, begin):
    """For each row the first pieces that it tries (-1: none), and what they leave; int64 [rows * tried]."""
    firsts, beside = np.empty(len(active) * tried, np.int64), np.empty(len(active) * tried, np.int64)
    next_first = begin % len(by_age)
    for place, row in enumerate(active):
        firsts[place * tried], beside[place * tried] = -1, rooms[row]
        for at in range(place * tried + 1, (place + 1) * tried):
            firsts[at] = by_age[next_first]
            beside[at] = rooms[row] - lengths[firsts[at]]
            next_first = next_first + 1 if next_first + 1 < len(by_age) else 0
    return firsts, beside


@_compiled
def fill(row, cut, count, state, reservoir, settings, rooms, filled, rows):
    """Fills rooms with fillers in order, from `row` on, until one has to be cut; returns that row (or how many there are) and `count`.

    cut: tokens of the first filler that go into `row`, found by the caller; -1 where none was asked for. filled, rows: pieces and
    the row of each, of which there are `count`.
    """
    s = state[0]
    while row < s.num_rows and s.first_filler < s.end_filler:
        length = reservoir[s.first_filler, 2] if cut < 0 else cut
        # In an empty row any progress will do: it is the tail of the pool.
        least = settings.minimum_piece_tokens if rooms[row] < settings.sequence_length else 1
        if rooms[row] == 0 or 0 <= cut < least or rooms[row] < min(length, least):
            row += 1
        elif length > rooms[row]:
            return row, count
        else:
            take_head(length, state, reservoir, filled, count)
            rows[count] = row
            rooms[row] -= length
            count += 1
        cut = -1
    return s.num_rows, count


@_compiled
def take_head(length, state, reservoir, target, to):
    """Puts the first tokens of the first filler into `target`; what is left of it stays the first."""
    s = state[0]
    copy(reservoir, s.first_filler, target, to)
    target[to, 2] = length
    reservoir[s.first_filler, 1] += length
    reservoir[s.first_filler, 2] -= length
    s.first_filler += reservoir[s.first_filler, 2] == 0
    s.filler_tokens -= length


@_compiled
def move_head(length, state, reservoir, waiting, arrived):
    """Lets the first tokens of the first filler wait like any piece."""
    s = state[0]
    take_head(length, state, reservoir, waiting, s.num_waiting)
    s.num_waiting += 1
    s.waiting_tokens += length
    s.num_arrived += 1
    arrived[length] += 1


@_compiled
def merge(count, state, made, ends, filled, rows, merged):
    """Writes into `merged` row after row with what fills it behind its own pieces, and into `ends` where each ends there."""
    s = state[0]
    at = first = extra = 0
    for row in range(s.num_rows):
        for place in range(first, ends[row]):
            copy(made, place, merged, at)
            at += 1
        first = ends[row]
        while extra < count and rows[extra] == row:
            copy(filled, extra, merged, at)
            at, extra = at + 1, extra + 1
        ends[row] = at
    s.num_made = at
