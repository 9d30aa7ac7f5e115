"""Packing of a stream of pieces into rows of fixed length, by choosing among those that wait. Knows lengths only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Piece(NamedTuple):
    """A span of a document of the pool that goes into one row."""

    document: int
    start: int
    length: int


# Pieces, int64 [n, 3]: document, start, length.
Pieces = np.ndarray
Row = np.ndarray
# (piece, limit) -> the longest head of the piece, at most `limit` tokens, after which it may be cut; 0: none.
Cutter = Callable[[Piece, int], int]

# A row is full when at most one in so many of its tokens is left: nobody searches for the last 8 of 32,768.
_SLACK_SHARE = 4096
# Lengths times tokens of room up to which prices by backlog are affordable; beyond, the ends of rows that leave least are taken.
_MOST_PRICED_CELLS = 65_536
_AT_ONCE = 8_192  # pieces that are taken in at once: memory for as many is kept


# What waits: pieces in `waiting`, fillers in `reservoir[first_filler:end_filler]`. What was made: pieces in `made`, row after row;
# where each row ends among them in `ends`, and how many tokens are left in it in `rooms`.
_STATE = np.dtype(
    [
        ("num_waiting", np.int64),
        ("waiting_tokens", np.int64),
        ("first_filler", np.int64),
        ("end_filler", np.int64),
        ("filler_tokens", np.int64),
        ("num_arrived", np.int64),  # pieces that waited so far
        ("num_made", np.int64),
        ("num_rows", np.int64),
        ("num_closed", np.int64),  # of them the first ones, that were made while no filler waited
    ]
)


class _Settings(NamedTuple):
    """Of a packer."""

    sequence_length: int
    most_tokens: int  # that wait
    rows_at_once: int
    slack: int  # tokens of a row that nobody searches for
    minimum_piece_tokens: int
    most_cells: int


class WindowPacker:
    """Holds at most `window_rows` rows' worth of waiting pieces; each row begins with the piece that waits longest.

    Half a window of rows is made at once (`data_pipeline.packing.kernels`). Their ends are chosen among the pieces that wait, so
    that nothing is left of them. Where those have few lengths, exact fits would use up the lengths that fit well and leave those
    that fit badly to the end. There a token of a length that piles up has a higher price, and the row of the highest price is
    taken: no length is left behind, and the rows are nearly as few as they can be. (Weights by backlog are those of MaxWeight
    scheduling: Tassiulas and Ephremides, 1992.)

    Fillers alone are cut. They wait in a reservoir, in order, and fill what is still left of rows, cut by `cut` where that is
    needed. The reservoir holds at most as many tokens as the window and one row, so that a row's worth stays when it overflows;
    what comes beyond is placed whole, like any other piece. Holes shorter than `minimum_piece_tokens` are left for padding, and so
    is what no filler is left for.

    `add` and `flush` yield rows as they are made. They are the same whatever pieces are added at once.
    """

    def __init__(self, sequence_length: int, window_rows: int, minimum_piece_tokens: int, cut: Cutter):
        from data_pipeline.packing import kernels  # imports numba, for which only packing waits

        self._kernels = kernels
        _tell_of_compiling(kernels.make_full_rows.stats.cache_path)  # type: ignore[attr-defined]
        self.sequence_length = sequence_length
        self._most_tokens = window_rows * sequence_length  # of the window
        self._settings = _Settings(
            sequence_length,
            self._most_tokens,
            max(1, window_rows // 2),
            sequence_length // _SLACK_SHARE,
            minimum_piece_tokens,
            _MOST_PRICED_CELLS,
        )
        self._cut = cut
        self._state = np.zeros(1, _STATE)
        self._arrived = np.zeros(sequence_length + 1, np.int64)  # pieces of each length
        self._waiting, self._reservoir = np.empty((0, 3), np.int64), np.empty((0, 3), np.int64)  # in order of arrival
        # Rows that are made, and what fills them: written anew each time.
        self._made, self._merged, self._filled = (np.empty((0, 3), np.int64) for _ in range(3))
        self._ends, self._rooms, self._rows = (np.empty(0, np.int64) for _ in range(3))

    def add(self, pieces: Pieces, are_fillers: np.ndarray) -> Iterator[Row]:
        """pieces: none longer than a row but fillers. are_fillers: those that may be cut, bool [n]."""
        lengths = pieces[:, 2]
        assert (lengths > 0).all(), "an empty piece"
        assert (are_fillers | (lengths <= self.sequence_length)).all(), "a piece must fit a row"
        for first in range(0, len(pieces), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            yield from self._add(
                np.require(pieces[part], np.int64, ["C", "W"]), np.require(are_fillers[part], bool, ["C", "W"])
            )

    def _add(self, pieces: Pieces, are_fillers: np.ndarray) -> Iterator[Row]:
        self._make_room(len(pieces))
        at = 0
        while True:
            at = self._kernels.make_full_rows(pieces, are_fillers, at, self._reservoir, *self._made_of())
            yield from self._made_rows()
            if self._of("waiting_tokens") > self._most_tokens:
                continue
            if self._of("filler_tokens") > self._most_tokens + self.sequence_length:
                self._cut_long_filler()
            elif at == len(pieces):
                return

    def flush(self) -> Iterator[Row]:
        """Pack what is left, then every filler that is left."""
        while self._of("num_waiting"):
            self._begin_rows(0)
            num_rows = max(1, self._of("waiting_tokens") // self.sequence_length // 2)
            self._kernels.make_rows(num_rows, True, *self._made_of())
            yield from self._made_rows()
        while self._of("filler_tokens"):
            num_rows = max(1, self._of("filler_tokens") // self.sequence_length)
            self._ends, self._rooms = np.zeros(num_rows, np.int64), np.full(num_rows, self.sequence_length)
            self._begin_rows(num_rows)
            yield from self._made_rows()

    def _begin_rows(self, num_rows: int) -> None:
        """So many empty ones."""
        self._state["num_made"], self._state["num_rows"], self._state["num_closed"] = 0, num_rows, 0

    def _made_of(self) -> tuple[Any, ...]:
        """What rows are made of, and where they go."""
        return self._state, self._waiting, self._arrived, self._settings, self._made, self._ends, self._rooms

    def _made_rows(self) -> Iterator[Row]:
        has_open = self._of("num_closed") < self._of("num_rows")
        made = self._with_fillers() if has_open and self._of("filler_tokens") else self._made
        made = made[: self._of("num_made")].copy()
        first = 0
        for end in self._ends[: self._of("num_rows")].tolist():
            assert end > first, "a filler that cannot be cut is longer than a row"
            yield made[first:end]
            first = end

    def _with_fillers(self) -> Pieces:
        """The pieces of the rows that are made, filled from the reservoir, in order."""
        row, cut, count = self._of("num_closed"), -1, 0
        num_rows, num_fillers = self._of("num_rows"), self._of("end_filler") - self._of("first_filler")
        filling = self._state, self._reservoir, self._settings, self._rooms
        while True:
            if count + num_fillers >= len(self._rows):
                self._filled = _grown(self._filled, count, count + num_fillers + 1)
                self._rows = _grown(self._rows, count, count + num_fillers + 1)
            row, count = self._kernels.fill(row, cut, count, *filling, self._filled, self._rows)
            if row == num_rows:
                break
            cut = self._cut_of_first(int(self._rooms[row]))
        self._merged = _grown(self._merged, 0, self._of("num_made") + count)
        self._kernels.merge(count, self._state, self._made, self._ends, self._filled, self._rows, self._merged)
        return self._merged

    def _cut_long_filler(self) -> None:
        """Of a reservoir that overflows: as much as a row holds waits like any piece."""
        if self._reservoir[self._of("first_filler"), 2] > self.sequence_length:
            length = self._cut_of_first(self.sequence_length)
            assert length > 0, "a filler that cannot be cut is longer than a row"
            self._make_room(1)
            self._kernels.move_head(length, self._state, self._reservoir, self._waiting, self._arrived)

    def _cut_of_first(self, limit: int) -> int:
        return self._cut(Piece(*self._reservoir[self._of("first_filler")].tolist()), limit)

    def _make_room(self, num_pieces: int) -> None:
        """For so many pieces that come, wherever they wait: a filler may go on from the reservoir."""
        first, end = self._of("first_filler"), self._of("end_filler")
        if end + num_pieces > len(self._reservoir):
            self._reservoir = _grown(self._reservoir[first:], end - first, end - first + num_pieces)
            self._state["first_filler"], self._state["end_filler"] = 0, end - first
        most = self._of("num_waiting") + end - first + num_pieces
        self._waiting = _grown(self._waiting, self._of("num_waiting"), most)
        self._made = _grown(self._made, 0, len(self._waiting))
        self._ends, self._rooms = _grown(self._ends, 0, len(self._made)), _grown(self._rooms, 0, len(self._made))

    def _of(self, name: str) -> int:
        return int(self._state[name][0])


def _grown(array: np.ndarray, num_used: int, least: int) -> np.ndarray:
    """The array with room for at least so many entries, of which the first `num_used` are kept."""
    if len(array) >= least:
        return array
    grown = np.empty((2 * least, *array.shape[1:]), array.dtype)
    grown[:num_used] = array[:num_used]
    return grown


def _tell_of_compiling(cache: str | None) -> None:
    """Nobody should take the first pack of an installation for one that hangs."""
    if cache is None or not any(Path(cache).glob("kernels.make_full_rows-*.nbi")):
        told = "the choice of rows is compiled, which takes some 20 seconds at the first pack of an installation"
        print(f"{told} [{os.getpid()}]", file=sys.stderr, flush=True)
