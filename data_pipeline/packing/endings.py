"""How many rows at once are filled to their ends: for all of them the best pair among the pieces that wait. Pure functions."""

from __future__ import annotations

import numpy as np

_FIRSTS = 8  # pieces tried as the first of a pair, for each row in each round
_ROUNDS = 4  # with a bound on what is left, so that a row that finds an exact fit later does not take a poor one now
_GROWTH = 8  # of that bound from round to round
_NOTHING = 1 << 40  # more than any room


def begin_rows(lengths: list[int], num_rows: int, sequence_length: int, chosen_from: float) -> list[int]:
    """The first places of at most `num_rows` rows that take the pieces as they come, and the place behind the last row.

    A row takes pieces until at most `chosen_from` tokens are left, or the next one does not fit.
    """
    starts = [0]
    room = sequence_length
    for place, length in enumerate(lengths):
        if place > starts[-1] and (room <= chosen_from or length > room):
            starts.append(place)
            room = sequence_length
            if len(starts) > num_rows:
                return starts
        room -= length
    return [*starts, len(lengths)]


def fill_rooms(rooms: np.ndarray, lengths: np.ndarray, slack: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the waiting pieces end which rows: rows and places of pieces, both int64 [k], each piece at most once.

    rooms: tokens left in each row, int64 [R]. lengths: of the waiting pieces, int64 [n], those first that wait longest. Rows
    that leave more than `slack` go on until nothing fits.

    In a round every row tries a few first pieces, and for each the longest second one that fits beside it (or none); it takes the
    pair that leaves the least. Of rows that want the same piece the first one has it, the others try again.
    """
    rooms = rooms.copy()
    by_length = np.argsort(lengths, kind="stable")  # of those that are not taken, by length
    by_age = np.arange(len(lengths))
    rows_found, places_found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    active = np.arange(len(rooms))
    number = 0
    while len(by_age):
        active = active[(rooms[active] > slack) & (rooms[active] >= lengths[by_length[0]])]
        if not len(active):
            break
        firsts, seconds, left = _best_pairs(rooms[active], lengths, by_length, by_age, number)
        bound = max(slack, 1) * _GROWTH**number if number < _ROUNDS else _NOTHING
        rows = active[left <= bound]
        pairs = np.stack([firsts, seconds])[:, left <= bound]
        pairs = pairs[:, wins := _first_come(pairs, len(lengths))]
        rows = rows[wins]
        for places in pairs:
            is_piece = places >= 0
            rows_found.append(rows[is_piece])
            places_found.append(places[is_piece])
            np.subtract.at(rooms, rows[is_piece], lengths[places[is_piece]])
        is_left = np.ones(len(lengths), bool)
        is_left[pairs[pairs >= 0]] = False
        by_length, by_age = by_length[is_left[by_length]], by_age[is_left[by_age]]
        number += 1
    return np.concatenate(rows_found), np.concatenate(places_found)


def _best_pairs(
    rooms: np.ndarray, lengths: np.ndarray, by_length: np.ndarray, by_age: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each room the places of a first and a second piece, -1 for none, and what they leave (`_NOTHING`: none fits)."""
    count = min(_FIRSTS, len(by_age))
    every = np.arange(len(rooms))
    tried = by_age[(every[:, None] * count + np.arange(count) + number * (_FIRSTS - 1)) % len(by_age)]
    firsts = np.concatenate([np.full((len(rooms), 1), -1), tried], axis=1)  # or none: one piece may be enough
    room_beside = np.concatenate([rooms[:, None], rooms[:, None] - lengths[tried]], axis=1)
    ordered = lengths[by_length]
    at = np.searchsorted(ordered, room_beside, side="right") - 1
    at -= (at >= 0) & (by_length[at] == firsts)  # not the same piece twice
    left = room_beside - np.where(at >= 0, ordered[at], 0)
    left[(room_beside < 0) | ((at < 0) & (firsts < 0))] = _NOTHING
    best = left.argmin(axis=1)
    seconds = np.where(at >= 0, by_length[at], -1)
    return firsts[every, best], seconds[every, best], left[every, best]


def _first_come(pairs: np.ndarray, num_places: int) -> np.ndarray:
    """bool [k] of pairs [2, k] of places: those of which no earlier pair has a piece, and that have one."""
    order = np.arange(pairs.shape[1])
    owners = np.full(num_places + 1, len(order))  # the last for -1
    for places in pairs:
        np.minimum.at(owners, places, order)
    mine = (owners[pairs] == order) | (pairs < 0)
    wins: np.ndarray = mine.all(axis=0) & (pairs >= 0).any(axis=0)
    return wins
