"""How full rows get, and at what speed: choosing from a window, beside next fit and concatenate-and-cut.

    python -m benchmarks.packing [--documents 20000] [--length 32768]

Lengths only (no tokens are read): images of 1,058 tokens (video frames) or 1,024-4,096 (pairs), text of a median of
about 800 tokens. `cut` is the share of documents that the row boundaries cut: concatenation cuts images as well, choosing
cuts fillers only. The demo's chats (rows of 576, three sources of nearly constant length, nothing may be cut) come last.
Ratios are to next fit in the same run. Where TRL is installed, best fit decreasing over the whole pool with its segment tree comes too (the
loop of its packing, over lengths alone).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections import defaultdict, deque
from collections.abc import Iterator

import numpy as np

from data_pipeline.packing.window import Piece, Row, WindowPacker

Document = tuple[int, bool]  # length, may be cut


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


def choose(pool: list[Document], length: int, window_rows: int) -> Iterator[Row]:
    packer = WindowPacker(length, window_rows, 8, lambda piece, limit: limit)
    for number, (size, filler) in enumerate(pool):
        yield from (packer.add_filler if filler else packer.add)(Piece(number, 0, size))
    yield from packer.flush()


def next_fit(pool: list[Document], length: int) -> Iterator[Row]:
    row: Row = []
    room = length
    for number, (size, _) in enumerate(pool):
        if size > room:
            yield row
            row, room = [], length
        row.append(Piece(number, 0, size))
        room -= size
    yield row


def concatenate(pool: list[Document], length: int) -> Iterator[Row]:
    row: Row = []
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


def best_fit_decreasing(pool: list[Document], length: int) -> Iterator[Row]:
    from trl.data_utils import _SegmentTree

    tree = _SegmentTree(length)
    tree.add(length)
    by_space: defaultdict[int, deque[Row]] = defaultdict(deque)
    rows: list[Row] = []
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


def report(name: str, rows: Iterator[Row], pool: list[Document], length: int, base: float) -> float:
    started = time.process_time()
    packed = list(rows)
    seconds = time.process_time() - started
    tokens = sum(size for size, _ in pool)
    pieces = np.bincount([piece.document for row in packed for piece in row], minlength=len(pool))
    fill, cut = tokens / (len(packed) * length), float((pieces > 1).mean())
    speed = len(pool) / seconds
    print(
        f"  {name:<28}fill {fill:8.4%}   cut {cut:7.2%}   {speed / 1e3:8.0f} k documents/CPU-s"
        + (f"   {speed / base:.2f} x next fit" if base else "")
    )
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=32_768)
    arguments = parser.parse_args()
    pools = {
        "video only": {"video": 1.0},
        "pairs only": {"pairs": 1.0},
        "text only": {"text": 1.0},
        "video 50, pairs 40, text 10": {"video": 0.5, "pairs": 0.4, "text": 0.1},
        "video 20, pairs 30, text 50": {"video": 0.2, "pairs": 0.3, "text": 0.5},
    }
    for name, shares in pools.items():
        compare(name, make_pool(shares, arguments.documents, arguments.length), arguments.length)
    compare("the demo's chats", make_chats(arguments.documents), 576)


def compare(name: str, pool: list[Document], length: int) -> None:
    filler = sum(size for size, may_cut in pool if may_cut) / sum(size for size, _ in pool)
    print(f"{name} (% of documents); text is {filler:.1%} of the tokens")
    base = report("next fit", next_fit(pool, length), pool, length, 0.0)
    report("concatenate and cut", concatenate(pool, length), pool, length, base)
    if importlib.util.find_spec("trl"):
        importlib.import_module("trl.data_utils")  # takes seconds, which are not counted
        report("best fit decreasing (TRL)", best_fit_decreasing(pool, length), pool, length, base)
    for rows in (16, 256):
        report(f"choose, window of {rows} rows", choose(pool, length, rows), pool, length, base)


if __name__ == "__main__":
    main()
