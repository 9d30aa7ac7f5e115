"""Reading packed rows at random: `PackedDataset` beside numpy.memmap and readers of other projects.

    python -m benchmarks.read_rows [--rows 4096] [--reads 512] [--length 32768] [--rounds 5]

Every reader gives the same `reads` rows, drawn from all `rows`, in the same order, and every token is cast to int64 by torch: written to a
batch of 8 rows, as training reads them. `PackedDataset` also reads the segments and checks the CRC of the row, which the others have not. CPU
seconds, median of the rounds, the readers taking turns; each round opens the files anew, once with them in the page cache and once without.

The others: megatron-core's IndexedDataset; where they are installed, litData's StreamingDataset with its TokensLoader (its own
format for tokens) and mosaicml-streaming's LocalDataset over MDS (rows as arrays of int32 of a fixed shape), both with files of 64 MB,
their default, on the local disk and in this process. Their fastest settings that we know; none has checksums on.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage.packed_files import PackedDataset, cast_into
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader, TokenFileWriter
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(preset="emu35", pad_multiple=1024))
SEGMENTS_PER_ROW = 29


def make_rows(folder: Path, num_rows: int, length: int) -> None:
    """One packed shard of rows that alternate text and images, made by `pack` from documents as long as a row."""
    random = np.random.default_rng(0)
    bounds = np.linspace(0, length, SEGMENTS_PER_ROW + 1).astype(np.int64)
    segments = np.zeros(SEGMENTS_PER_ROW, SEGMENT_DTYPE)
    segments["start"], segments["length"] = bounds[:-1], np.diff(bounds)
    segments["kind"] = [Kind.IMAGE if number % 2 else Kind.TEXT for number in range(SEGMENTS_PER_ROW)]
    segments["flags"][::6] |= np.uint8(Flag.DOCUMENT_START)
    manifest = {"kind": "tokens", "num_documents": num_rows, "vocabulary": VOCABULARY.describe()}
    with TokenFileWriter(folder / "tokens" / "000000", with_crc=True) as writer:
        for _ in range(num_rows):
            writer.add(random.integers(0, VOCABULARY.size, length), segments)
        writer.finish(manifest)
    pack({"rows": folder / "tokens"}, folder / "packed", PackConfig(length, num_rows, window_rows=1))


Reader = Callable[[int, np.ndarray], Any]  # (row, int64 [S] that takes its tokens)


def copied(read: Callable[[int], np.ndarray]) -> Reader:
    """A reader that writes what `read` gives, with the cast that `PackedDataset` has."""

    def write(row: int, tokens: np.ndarray) -> None:
        cast_into(tokens, read(row))

    return write


def write_for_others(folder: Path, num_rows: int, length: int) -> dict[str, Callable[[], Reader]]:
    """The same rows in the formats of readers that are installed, and how to open them."""
    rows = np.memmap(folder / "packed" / "000000.bin", "<i4", "r", shape=(num_rows, length))
    found: dict[str, Callable[[], Reader]] = {}
    if importlib.util.find_spec("litdata"):
        import torch
        from litdata import StreamingDataset, TokensLoader
        from litdata.streaming import Cache

        cache = Cache(str(folder / "litdata"), chunk_size=(64 << 20) // 4, item_loader=TokensLoader(length))
        for number, row in enumerate(rows):
            cache[number] = torch.from_numpy(np.array(row))
        cache.done()
        cache.merge()

        def litdata() -> Reader:
            dataset = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(length))
            return copied(lambda row: dataset[row].numpy())

        found["litData StreamingDataset"] = litdata
    if importlib.util.find_spec("streaming"):
        from streaming import LocalDataset, MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:int32:{length}"}) as writer:
            for row in rows:
                writer.write({"tokens": np.array(row)})

        def mds() -> Reader:
            dataset = LocalDataset(str(folder / "mds"))
            return copied(lambda row: dataset[row]["tokens"])

        found["MDS LocalDataset"] = mds
    return found


def open_readers(folder: Path, num_rows: int, length: int) -> dict[str, Callable[[], Reader]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = folder / "packed" / "000000"

    def packed() -> Reader:
        return PackedDataset(folder / "packed").row_into

    def mapped() -> Reader:
        rows = np.memmap(prefix.with_suffix(".bin"), "<i4", "r", shape=(num_rows, length))
        return copied(lambda row: rows[row])

    def megatron() -> Reader:
        dataset = IndexedDataset(str(prefix))
        return copied(lambda row: dataset[row])

    return {
        "PackedDataset (segments, CRC)": packed,
        "TokenFileReader (pread)": lambda: copied(TokenFileReader(folder / "tokens" / "000000").tokens),
        "numpy.memmap": mapped,
        "megatron IndexedDataset": megatron,
        **write_for_others(folder, num_rows, length),
    }


def measure(opener: Callable[[], Reader], order: list[int], batch: np.ndarray, folder: Path, cold: bool) -> float:
    """CPU seconds (of the process, kernel included) to open and to read the rows."""
    gc.collect()  # closes the maps of the round before, which would keep their pages
    if cold:
        drop_cache(folder)
    started = time.process_time()
    read = opener()
    for number, row in enumerate(order):
        read(row, batch[number % len(batch)])
    return time.process_time() - started


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_loader(folder: Path, length: int, num_rows: int) -> float:
    source = PackedDataSource(
        {"rows": folder / "packed"},
        {"rows": 1.0},
        0,
        length,
        num_rows,
        1,
        0,
        1,
        {"text": 1.0, "visual": 0.5, "structure": 1.0},
        "document",
        VOCABULARY,
        prefetch_batches=0,
    )
    started = time.process_time()
    source.batch(0)
    source.close()
    return (time.process_time() - started) / num_rows


def print_ratios(medians: dict[str, float], num_tokens: int, cold: bool) -> None:
    title = "not in the page cache" if cold else "in the page cache"
    print(f"{title:<32}{'Mtokens/CPU-s':>15}{'PackedDataset is':>18}")
    ours = medians["PackedDataset (segments, CRC)"]
    for name, median in medians.items():
        print(f"{name:<32}{num_tokens / 1e6 / median:>15.0f}{median / ours:>15.2f} x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--reads", type=int, default=512)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder, arguments.rows, arguments.length)
        order = np.random.default_rng(1).permutation(arguments.rows)[: arguments.reads].tolist()
        batch = np.zeros((8, arguments.length), np.int64)
        openers = open_readers(folder, arguments.rows, arguments.length)
        for cold in (False, True):
            seconds: dict[str, list[float]] = {name: [] for name in openers}
            for _ in range(arguments.rounds):
                for name, opener in openers.items():
                    seconds[name].append(measure(opener, order, batch, folder, cold))
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            print_ratios(medians, len(order) * arguments.length, cold)
        loader = statistics.median(
            measure_loader(folder, arguments.length, min(64, arguments.rows)) for _ in range(arguments.rounds)
        )
        print(f"PackedDataSource, all arrays of a micro-batch: {loader * 1e3:.2f} ms of CPU a row")


if __name__ == "__main__":
    main()
