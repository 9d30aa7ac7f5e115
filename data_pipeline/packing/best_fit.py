"""Best-fit packing of a stream of pieces into rows of fixed length. Knows lengths only, not tokens."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """A span of a document of the pool that goes into one row."""

    document: int
    start: int
    length: int


Row = list[Piece]
# (piece, limit) -> the longest head of the piece, at most `limit` tokens, after which it may be cut; 0: none.
Cutter = Callable[[Piece, int], int]


class BestFitPacker:
    """Holds up to `open_bins` rows that are not full; each piece goes where it leaves the least room.

    Pieces given to `add` are never cut. Pieces given to `add_filler` wait in a reservoir, in order, and fill the
    holes of rows that are closed, cut by `cut` where that is needed. The reservoir holds at most as many tokens as
    the open rows: what comes beyond is placed whole, like any other piece. Holes shorter than
    `minimum_piece_tokens` are left for padding, and so is what no filler is left for.

    `add`, `add_filler` and `flush` yield rows as they are closed. Time O(log open_bins) a piece and a memory move.
    """

    def __init__(self, sequence_length: int, open_bins: int, minimum_piece_tokens: int, cut: Cutter):
        self.sequence_length = sequence_length
        self.open_bins = open_bins
        self.minimum_piece_tokens = minimum_piece_tokens
        self._cut = cut
        # (room, number) of each open row, sorted, so that the best fit is found by bisection.
        self._rooms: list[tuple[int, int]] = []
        self._rows: dict[int, Row] = {}
        self._num_opened = 0
        self._reservoir: deque[Piece] = deque()
        self._reservoir_tokens = 0
        self._placed_fillers: set[Piece] = set()  # those in open rows

    def add(self, piece: Piece) -> Iterator[Row]:
        assert 0 < piece.length <= self.sequence_length, "a piece must fit a row"
        if not self._fits(piece) and len(self._rooms) >= self.open_bins:
            yield self._close_fullest()
        yield from self._place(piece)

    def add_filler(self, piece: Piece) -> Iterator[Row]:
        self._reservoir.append(piece)
        self._reservoir_tokens += piece.length
        while self._reservoir_tokens > self.open_bins * self.sequence_length:
            if not self._fits(self._reservoir[0]) and len(self._rooms) >= self.open_bins:
                # Closed before the next filler is taken, so that there is enough to fill it with.
                yield self._close_fullest()
            else:
                filler = self._take_whole()
                self._placed_fillers.add(filler)
                yield from self._place(filler)

    def flush(self) -> Iterator[Row]:
        """Pack what is left, longest first, then fill it with every filler that is left, and close every row."""
        left = [piece for number in sorted(self._rows) for piece in self._rows[number]]
        fillers = [piece for piece in left if piece in self._placed_fillers]
        self._rooms.clear()
        self._rows.clear()
        self._reservoir.extendleft(reversed(fillers))
        for piece in sorted(left, key=lambda piece: -piece.length):
            if piece not in self._placed_fillers:
                yield from self._place(piece)
        while self._rooms:
            yield self._close_fullest()
        while self._reservoir:
            yield self._fill([], self.sequence_length)

    def _fits(self, piece: Piece) -> bool:
        return bool(self._rooms) and self._rooms[-1][0] >= piece.length

    def _place(self, piece: Piece) -> Iterator[Row]:
        """Put the piece where it fits best, in a new row when it fits nowhere."""
        if self._fits(piece):
            room, number = self._rooms.pop(bisect.bisect_left(self._rooms, (piece.length, -1)))
        else:
            room, number = self.sequence_length, self._num_opened
            self._num_opened += 1
            self._rows[number] = []
        self._rows[number].append(piece)
        if room == piece.length:
            yield self._take_row(number)
        else:
            bisect.insort(self._rooms, (room - piece.length, number))

    def _close_fullest(self) -> Row:
        room, number = self._rooms.pop(0)
        return self._fill(self._take_row(number), room)

    def _take_row(self, number: int) -> Row:
        row = self._rows.pop(number)
        self._placed_fillers.difference_update(row)
        return row

    def _fill(self, row: Row, room: int) -> Row:
        """Fill the room of a row from the reservoir, in order."""
        while self._reservoir and room > 0:
            piece = self._reservoir[0]
            if piece.length <= room:
                head = self._take_whole()
            else:
                length = self._cut(piece, room)
                # In an empty row any progress will do; it is the tail of the pool.
                if length < (self.minimum_piece_tokens if row else 1):
                    break
                head = self._take_head(length)
            row.append(head)
            room -= head.length
        assert row, "a filler that cannot be cut is longer than a row"
        return row

    def _take_whole(self) -> Piece:
        """The first piece of the reservoir, or as much of it as a row holds."""
        piece = self._reservoir[0]
        if piece.length > self.sequence_length:
            length = self._cut(piece, self.sequence_length)
            assert length > 0, "a filler that cannot be cut is longer than a row"
            return self._take_head(length)
        self._reservoir_tokens -= piece.length
        return self._reservoir.popleft()

    def _take_head(self, length: int) -> Piece:
        piece = self._reservoir[0]
        self._reservoir[0] = Piece(piece.document, piece.start + length, piece.length - length)
        self._reservoir_tokens -= length
        return Piece(piece.document, piece.start, length)
