"""Packing of a stream of pieces into rows of fixed length, by choosing among those that wait. Knows lengths only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np

from data_pipeline.packing.endings import begin_rows, fill_rooms
from data_pipeline.packing.subsets import Dearest


class Piece(NamedTuple):
    """A span of a document of the pool that goes into one row."""

    document: int
    start: int
    length: int


Row = list[Piece]
# (piece, limit) -> the longest head of the piece, at most `limit` tokens, after which it may be cut; 0: none.
Cutter = Callable[[Piece, int], int]

# A row is full when at most one in so many of its tokens is left: nobody searches for the last 8 of 32,768.
_SLACK_SHARE = 4096
# The end of a row, about so many pieces of average length, is chosen; what comes before is taken as it comes.
_CHOSEN_PIECES = 2.5
_CHOSEN_PRICED_PIECES = 3  # where lengths are few
# Lengths times tokens of room up to which `Dearest` is affordable (about a millisecond); beyond, `fill_rooms`.
_MOST_PRICED_CELLS = 65_536
# A length of which twice its share waits costs a tenth more. Both figures were chosen on the demo's pools:
# `python -m benchmarks.packing` shows what they give.
_PRICE_OF_DOUBLE_SHARE = 0.1
_EXPECTED_AT_LEAST = 16  # pieces: keeps the share of a rare length from being noise
_PRICE_OF_TOKEN = 4096
_PRICED_SHARE = 2  # of the rows made at once: what they begin with cannot be chosen any more
_REPRICED_ROWS = 16  # prices are computed anew after so many rows
# Where nothing comes any more, what fits badly has to be used up: fewer rows at once, each with prices of its own.
_LAST_PRICED_SHARE = 8


class WindowPacker:
    """Holds at most `window_rows` rows' worth of waiting pieces; each row begins with the piece that waits longest.

    Half a window of rows is made at once. Their ends are chosen among the pieces that wait, so that nothing is left of
    them (`fill_rooms`). Where those have few
    lengths, exact fits would use up the lengths that fit well and leave those that fit badly to the end. There a
    token of a length that piles up has a higher price, and the row of the highest price is taken: no length is left
    behind, and the rows are nearly as few as they can be. (Weights by backlog are those of MaxWeight scheduling:
    Tassiulas and Ephremides, 1992.)

    Pieces given to `add` are never cut. Pieces given to `add_filler` wait in a reservoir, in order, and fill what is
    still left of rows, cut by `cut` where that is needed. The reservoir holds at most as many tokens as the window and
    one row, so that a row's worth stays when it overflows; what comes beyond is placed whole, like any other piece. Holes shorter than `minimum_piece_tokens` are left for
    padding, and so is what no filler is left for.

    `add`, `add_filler` and `flush` yield rows as they are made.
    """

    def __init__(self, sequence_length: int, window_rows: int, minimum_piece_tokens: int, cut: Cutter):
        self.sequence_length = sequence_length
        self.minimum_piece_tokens = minimum_piece_tokens
        self._most_tokens = window_rows * sequence_length  # of the window
        self._rows_at_once = max(1, window_rows // 2)
        self._slack = sequence_length // _SLACK_SHARE
        self._cut = cut
        self._waiting: list[Piece] = []  # in order of arrival
        self._waiting_tokens = 0
        self._num_new = 0  # of them, at the end: not counted yet
        self._num_arrived: Counter[int] = Counter()  # pieces of each length
        self._reservoir: deque[Piece] = deque()
        self._reservoir_tokens = 0

    def add(self, piece: Piece) -> Iterator[Row]:
        assert 0 < piece.length <= self.sequence_length, "a piece must fit a row"
        self._waiting.append(piece)
        self._waiting_tokens += piece.length
        self._num_new += 1
        while self._waiting_tokens > self._most_tokens:
            yield from self._make_rows(self._rows_at_once, is_end=False)

    def add_filler(self, piece: Piece) -> Iterator[Row]:
        self._reservoir.append(piece)
        self._reservoir_tokens += piece.length
        while self._reservoir_tokens > self._most_tokens + self.sequence_length:
            yield from self.add(self._first_filler())

    def flush(self) -> Iterator[Row]:
        """Pack what is left, then every filler that is left."""
        while self._waiting:
            yield from self._make_rows(max(1, self._waiting_tokens // self.sequence_length // 2), is_end=True)
        while self._reservoir:
            yield self._fill([], self.sequence_length)

    def _make_rows(self, num_rows: int, *, is_end: bool) -> Iterator[Row]:
        """At most so many, fewer where fewer pieces wait or lengths are few. is_end: nothing comes any more."""
        waiting = self._waiting
        lengths = [piece.length for piece in waiting]
        self._num_arrived.update(lengths[len(lengths) - self._num_new :])
        self._num_new = 0
        average = self._waiting_tokens / len(waiting)
        distinct = sorted(set(lengths))
        is_priced = len(distinct) * _CHOSEN_PRICED_PIECES * average <= _MOST_PRICED_CELLS
        chosen_from = average * (_CHOSEN_PRICED_PIECES if is_priced else _CHOSEN_PIECES)
        if is_priced:
            num_rows = max(1, min(num_rows, self._rows_at_once // (_LAST_PRICED_SHARE if is_end else _PRICED_SHARE)))
        starts = begin_rows(lengths, num_rows, self.sequence_length, chosen_from)
        rows = [waiting[start:end] for start, end in pairwise(starts)]
        rooms = [self.sequence_length - sum(piece.length for piece in row) for row in rows]
        taken = starts[-1]
        ends: Iterable[tuple[int, int]]
        if is_priced:
            ends = self._priced_ends(rooms, lengths[taken:], distinct, 1 if is_end else _REPRICED_ROWS)
        else:
            found = fill_rooms(np.array(rooms, np.int64), np.array(lengths[taken:], np.int64), self._slack)
            ends = zip(*(part.tolist() for part in found), strict=True)
        is_left = [True] * (len(waiting) - taken)
        for row, place in ends:
            rows[row].append(waiting[taken + place])
            rooms[row] -= lengths[taken + place]
            is_left[place] = False
        self._waiting = list(compress(waiting[taken:], is_left))
        self._waiting_tokens -= len(rows) * self.sequence_length - sum(rooms)
        for row, room in zip(rows, rooms, strict=True):
            yield self._fill(row, room) if room and self._reservoir else row

    def _priced_ends(
        self, rooms: list[int], lengths: list[int], distinct: list[int], repriced_rows: int
    ) -> Iterator[tuple[int, int]]:
        """Rows and places of the pieces that end them, of each length those that wait longest."""
        places: dict[int, deque[int]] = {length: deque() for length in distinct}
        for place, length in enumerate(lengths):
            places[length].append(place)
        if not lengths:
            return
        chosen: Dearest | None = None
        priced_end = 0
        for row, room in enumerate(rooms):
            if room <= self._slack:
                continue
            counts = chosen.of(room) if chosen is not None and row < priced_end else None
            # Rows before may have used up a length.
            if counts is None or any(len(places[distinct[number]]) < count for number, count in counts.items()):
                priced_end = row + repriced_rows
                copies = [len(places[length]) for length in distinct]
                chosen = self._dearest(distinct, copies, max(rooms[row:priced_end]))
                counts = chosen.of(room)
            for number, count in counts.items():
                waiting = places[distinct[number]]
                for _ in range(count):
                    yield row, waiting.popleft()

    def _dearest(self, lengths: list[int], copies: list[int], most_room: int) -> Dearest:
        num_waiting, num_arrived = sum(copies), self._num_arrived.total()
        prices = [
            self._price(length, count, num_waiting * self._num_arrived[length] / num_arrived)
            for length, count in zip(lengths, copies, strict=True)
        ]
        return Dearest(lengths, copies, prices, most_room)

    def _price(self, length: int, num_waiting: int, expected: float) -> int:
        """Of a piece: its tokens, dearer where more of that length wait than are expected by its share of all pieces that came."""
        excess = (num_waiting - expected) / (expected + _EXPECTED_AT_LEAST)
        return round(length * _PRICE_OF_TOKEN * (1 + _PRICE_OF_DOUBLE_SHARE * excess))

    def _fill(self, row: Row, room: int) -> Row:
        """Fill the room of a row from the reservoir, in order."""
        while self._reservoir and room > 0:
            piece = self._reservoir[0]
            if piece.length <= room:
                head = self._first_filler()
            else:
                length = self._cut(piece, room)
                # In an empty row any progress will do; it is the tail of the pool.
                if length < (self.minimum_piece_tokens if row else 1):
                    break
                head = self._head_of_filler(length)
            row.append(head)
            room -= head.length
        assert row, "a filler that cannot be cut is longer than a row"
        return row

    def _first_filler(self) -> Piece:
        """The first piece of the reservoir, or as much of it as a row holds."""
        piece = self._reservoir[0]
        if piece.length > self.sequence_length:
            length = self._cut(piece, self.sequence_length)
            assert length > 0, "a filler that cannot be cut is longer than a row"
            return self._head_of_filler(length)
        self._reservoir_tokens -= piece.length
        return self._reservoir.popleft()

    def _head_of_filler(self, length: int) -> Piece:
        piece = self._reservoir[0]
        self._reservoir[0] = Piece(piece.document, piece.start + length, piece.length - length)
        self._reservoir_tokens -= length
        return Piece(piece.document, piece.start, length)
