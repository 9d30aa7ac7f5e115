"""How full rows get, and at what speed: choosing from a window, beside next fit, concatenate-and-cut and TRL's best fit.

    python -m benchmarks.packing [--documents 20000] [--length 32768] [--rounds 5]

Lengths only (no tokens are read): images of 1,058 tokens (video frames) or 1,024-4,096 (pairs), text of a median of
about 800 tokens. `cut` is the share of documents that the row boundaries cut: concatenation cuts images as well, choosing
cuts fillers only. The demo's chats (rows of 576, three sources of nearly constant length, nothing may be cut) come last.

Where TRL is installed, its best fit decreasing over the whole pool comes too, and ratios are to it: the loop of its `_pack_bfd` with its
segment tree, over lengths alone, as plain integers (it has numpy's there, which are slower). `as it is` is that function itself, over
documents whose tokens are bytes, which it also moves. Every other line is the fastest of `--rounds` rounds in CPU
seconds; what is imported or compiled once is not counted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np

from data_pipeline.packing.window import Piece, WindowPacker

Document = tuple[int, bool]  # length, may be cut
PlainRow = list[Piece]


def make_pool(shares: dict[str, float], num_documents: int, length: int) -> list[Document]:
    random = np.random.default_rng(0)
    pool: list[Document] = []
    for kind in random.choice(list(shares), num_documents, p=list(shares.values())):
        if kind == "text":
            pool.append((int(np.clip(random.lognormal(6.7, 1.0), 16, length)), True))
        elif kind == "pairs":
            pool.append((int(random.integers(1024, 4097)) + int(random.integers(20, 200)), False))
        else:
            frames = int(np.clip(random.lognormal(2.2, 0.6), 1, length // 1100))
            pool.append((frames * 1058 + int(random.integers(10, 40)) * frames, False))
    return [(min(size, length), filler) for size, filler in pool]


def make_chats(num_documents: int) -> list[Document]:
    """Edits, pairs and videos as 3 : 3 : 2."""
    random = np.random.default_rng(0)
    lengths = {0: [130, 131, 131, 131], 1: [81, 81, 84, 88, 89, 89, 91, 92], 2: [181, 181, 195, 197, 197]}
    kinds = random.choice(3, num_documents, p=[0.375, 0.375, 0.25])
    return [(int(random.choice(lengths[kind])), False) for kind in kinds]


def choose(lengths: np.ndarray, fillers: np.ndarray, length: int, window_rows: int) -> Iterator[np.ndarray]:
    """As `pack` does: from arrays of lengths to rows, each the array of its pieces."""
    packer = WindowPacker(length, window_rows, 8, lambda piece, limit: limit)
    documents = np.arange(len(lengths))
    yield from packer.add(np.stack([documents, np.zeros_like(documents), lengths], axis=1), fillers)
    yield from packer.flush()


def next_fit(pool: list[Document], length: int) -> Iterator[PlainRow]:
    row: PlainRow = []
    room = length
    for number, (size, _) in enumerate(pool):
        if size > room:
            yield row
            row, room = [], length
        row.append(Piece(number, 0, size))
        room -= size
    yield row


def concatenate(pool: list[Document], length: int) -> Iterator[PlainRow]:
    row: PlainRow = []
    room = length
    for number, (size, _) in enumerate(pool):
        start = 0
        while start < size:
            part = min(size - start, room)
            row.append(Piece(number, start, part))
            start, room = start + part, room - part
            if room == 0:
                yield row
                row, room = [], length
    if row:
        yield row


def best_fit_decreasing(pool: list[Document], length: int) -> Iterator[PlainRow]:
    from trl.data_utils import _SegmentTree

    tree = _SegmentTree(length)
    tree.add(length)
    by_space: defaultdict[int, deque[PlainRow]] = defaultdict(deque)
    rows: list[PlainRow] = []
    for number in np.argsort([-size for size, _ in pool], kind="stable").tolist():
        size = pool[number][0]
        space = tree.search(size)
        if space == length:
            rows.append([])
        row = by_space[space].popleft() if space < length else rows[-1]
        row.append(Piece(number, 0, size))
        if space < length and not by_space[space]:
            tree.remove(space)
        by_space[space - size].append(row)
        if space > size:
            tree.add(space - size)
    yield from rows


def trl_table(pool: list[Document]) -> Any:
    import pyarrow

    sizes = [size for size, _ in pool]
    column = pyarrow.LargeListArray.from_arrays(np.cumsum([0, *sizes]), pyarrow.array(np.zeros(sum(sizes), np.int8)))
    return pyarrow.table({"input_ids": column})


def trl_as_it_is(table: Any, length: int) -> Iterator[PlainRow]:
    """Its rows say how long their documents are, not which they are: those are numbered here."""
    from trl.data_utils import _pack_bfd

    numbers = count()
    for row in _pack_bfd(table, length)["seq_lengths"].to_pylist():
        yield [Piece(next(numbers), 0, size) for size in row]


def report(
    name: str, make: Callable[[], Iterator], pool: list[Document], length: int, rounds: int, base: float
) -> float:
    """Documents a CPU second. base: of TRL's."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        rows = list(make())
        seconds.append(time.process_time() - started)
    tokens = sum(size for size, _ in pool)
    pieces = np.bincount(np.concatenate([np.array(row)[:, 0] for row in rows]), minlength=len(pool))
    fill, cut = tokens / (len(rows) * length), float((pieces > 1).mean())
    speed = len(pool) / min(seconds)
    ratio = f"   {speed / base:.2f} x TRL" if base else ""
    print(f"  {name:<28}fill {fill:8.4%}   cut {cut:7.2%}   {speed / 1e3:8.0f} k documents/CPU-s{ratio}", flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pools = {
        "video only": {"video": 1.0},
        "pairs only": {"pairs": 1.0},
        "text only": {"text": 1.0},
        "video 50, pairs 40, text 10": {"video": 0.5, "pairs": 0.4, "text": 0.1},
        "video 20, pairs 30, text 50": {"video": 0.2, "pairs": 0.3, "text": 0.5},
    }
    warm_up()
    for name, shares in pools.items():
        compare(name, make_pool(shares, arguments.documents, arguments.length), arguments.length, arguments.rounds)
    compare("the demo's chats", make_chats(arguments.documents), 576, arguments.rounds)


def warm_up() -> None:
    """Imports and compiles, which takes seconds."""
    for pool, length in (make_pool({"pairs": 0.5, "text": 0.5}, 500, 8192), 8192), (make_chats(500), 576):
        deque(choose(*arrays_of(pool), length, 4), maxlen=0)
    if importlib.util.find_spec("trl"):
        importlib.import_module("trl.data_utils")


def arrays_of(pool: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    lengths, fillers = zip(*pool, strict=True)
    return np.array(lengths, np.int64), np.array(fillers, bool)


def compare(name: str, pool: list[Document], length: int, rounds: int) -> None:
    filler = sum(size for size, may_cut in pool if may_cut) / sum(size for size, _ in pool)
    print(f"{name} (% of documents); text is {filler:.1%} of the tokens")
    base = 0.0
    if importlib.util.find_spec("trl"):
        base = report("best fit decreasing (TRL)", lambda: best_fit_decreasing(pool, length), pool, length, rounds, 0.0)
        table = trl_table(pool)
        report("  as it is, with tokens", lambda: trl_as_it_is(table, length), pool, length, 1, base)
    report("next fit", lambda: next_fit(pool, length), pool, length, rounds, base)
    report("concatenate and cut", lambda: concatenate(pool, length), pool, length, rounds, base)
    lengths, fillers = arrays_of(pool)
    for rows in (16, 256):
        named = f"choose, window of {rows} rows"
        report(named, lambda rows=rows: choose(lengths, fillers, length, rows), pool, length, rounds, base)  # type: ignore[misc]


if __name__ == "__main__":
    main()
