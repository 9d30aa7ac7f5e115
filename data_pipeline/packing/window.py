"""Packing of a stream of pieces into rows of fixed length, by choosing among those that wait. Knows lengths only."""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from data_pipeline.packing.subsets import closest_pair, dearest, fullest


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
_CHOSEN_PIECES = 3
# Among so many of the pieces that wait longest: as the first of a pair, and as one of any number.
_MOST_FIRSTS = 32
_MOST_CANDIDATES = 128
# Lengths times tokens of room up to which `dearest` is affordable (about a millisecond); beyond, `fullest`.
_MOST_PRICED_CELLS = 65_536
# A length of which twice its share waits costs a tenth more. Both figures were chosen on the demo's pools:
# `python benchmarks/packing.py` shows what they give.
_PRICE_OF_DOUBLE_SHARE = 0.1
_EXPECTED_AT_LEAST = 16  # pieces: keeps the share of a rare length from being noise
_PRICE_OF_TOKEN = 4096


class WindowPacker:
    """Holds at most `window_rows` rows' worth of waiting pieces; each row begins with the piece that waits longest.

    The end of a row is chosen among the pieces that wait longest, so that nothing is left of it. Where they have few
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
        self._slack = sequence_length // _SLACK_SHARE
        self._cut = cut
        self._waiting: OrderedDict[int, Piece] = OrderedDict()  # by number of arrival
        self._waiting_tokens = 0
        self._by_length: dict[int, deque[int]] = {}  # numbers of the waiting pieces of each length
        self._lengths: list[int] = []  # of the waiting pieces, each once, sorted
        self._num_arrived: Counter[int] = Counter()  # pieces of each length
        self._num_arrivals = 0
        self._reservoir: deque[Piece] = deque()
        self._reservoir_tokens = 0

    def add(self, piece: Piece) -> Iterator[Row]:
        assert 0 < piece.length <= self.sequence_length, "a piece must fit a row"
        if piece.length not in self._by_length:
            self._by_length[piece.length] = deque()
            bisect.insort(self._lengths, piece.length)
        self._by_length[piece.length].append(self._num_arrivals)
        self._waiting[self._num_arrivals] = piece
        self._waiting_tokens += piece.length
        self._num_arrived[piece.length] += 1
        self._num_arrivals += 1
        while self._waiting_tokens > self._most_tokens:
            yield self._make_row()

    def add_filler(self, piece: Piece) -> Iterator[Row]:
        self._reservoir.append(piece)
        self._reservoir_tokens += piece.length
        while self._reservoir_tokens > self._most_tokens + self.sequence_length:
            yield from self.add(self._first_filler())

    def flush(self) -> Iterator[Row]:
        """Pack what is left, then every filler that is left."""
        while self._waiting:
            yield self._make_row()
        while self._reservoir:
            yield self._fill([], self.sequence_length)

    def _make_row(self) -> Row:
        row: Row = []
        room = self.sequence_length
        chosen_from = _CHOSEN_PIECES * self._waiting_tokens // len(self._waiting)
        while self._waiting and (not row or room > chosen_from):
            oldest = next(iter(self._waiting.values()))
            if oldest.length > room:
                break
            row.append(self._take(oldest.length))
            room -= oldest.length
        if room > self._slack and self._waiting:
            row.extend(self._take(length) for length in self._choose(room))
        return self._fill(row, self.sequence_length - sum(piece.length for piece in row))

    def _take(self, length: int) -> Piece:
        """Of the pieces of that length the one that waits longest."""
        same = self._by_length[length]
        piece = self._waiting.pop(same.popleft())
        self._waiting_tokens -= length
        if not same:
            del self._by_length[length]
            self._lengths.pop(bisect.bisect_left(self._lengths, length))
        return piece

    def _choose(self, room: int) -> list[int]:
        """Lengths of waiting pieces that fill the room best."""
        if len(self._lengths) * room <= _MOST_PRICED_CELLS:
            lengths = [length for length in self._lengths if length <= room]
            copies = [len(self._by_length[length]) for length in lengths]
            taken = dearest(lengths, copies, [self._price(length) for length in lengths], room)
            return [length for length, count in zip(lengths, taken, strict=True) for _ in range(count)]
        pair = closest_pair(self._oldest(_MOST_FIRSTS), self._lengths, room, self._slack)
        if sum(pair) >= room - self._slack and (len(set(pair)) == len(pair) or len(self._by_length[pair[0]]) > 1):
            return pair
        return fullest(self._oldest(_MOST_CANDIDATES), room, self._slack)

    def _oldest(self, count: int) -> Iterator[int]:
        """Lengths of the pieces that wait longest."""
        return (piece.length for piece in islice(self._waiting.values(), count))

    def _price(self, length: int) -> int:
        """Of a piece: its tokens, dearer where more of that length wait than its share of all pieces that came."""
        expected = len(self._waiting) * self._num_arrived[length] / self._num_arrivals
        excess = (len(self._by_length[length]) - expected) / (expected + _EXPECTED_AT_LEAST)
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
