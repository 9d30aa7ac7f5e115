"""Millions of documents through `pack`: time and memory.

    python -m benchmarks.many_documents [--documents 5000000] [--folder /tmp]

Token files of 50,000 documents of 8 to 40 tokens, hard links to one of them; rows of 4,096 tokens. Packed in a process of its own: CPU
seconds, peak resident memory after the imports, and fill.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.many_files import multiply
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileWriter
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(preset="emu35", pad_multiple=1024))
DOCUMENTS_PER_FILE = 50_000
PACKING = PackConfig(sequence_length=4096)


def make_token_files(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    segments = np.zeros(3, SEGMENT_DTYPE)
    segments["kind"] = [Kind.STRUCTURE, Kind.TEXT, Kind.STRUCTURE]
    segments["flags"][0] = np.uint8(Flag.DOCUMENT_START)
    with TokenFileWriter(folder / "original" / "000000", with_crc=True) as writer:
        for number, length in enumerate(random.integers(8, 41, DOCUMENTS_PER_FILE).tolist()):
            segments["start"], segments["length"] = [0, 1, length - 1], [1, length - 2, 1]
            segments["document"] = number
            writer.add(random.integers(0, VOCABULARY.text_size, length), segments)
        entries = {
            "kind": "tokens",
            "num_documents": len(writer),
            "vocabulary": VOCABULARY.describe(),
            "sources": ["many"],
        }
        manifest = writer.finish(entries | {"counts_by_class": {}, "quarantined": {}, "inputs": []})
    multiply(folder / "original" / "000000", manifest, folder / "tokens", count, lambda number: {})


def measure(folder: Path) -> dict[str, float]:
    """In this process, which has packed nothing before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    summary = pack({"many": folder / "tokens"}, folder / "packed", PACKING)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "rows": summary.num_rows,
        "fill": summary.fill,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="the files are made below it, and removed")
    parser.add_argument("--pack", type=Path, help="pack the files of this folder in this process")
    arguments = parser.parse_args()
    if arguments.pack:
        print(json.dumps(measure(arguments.pack)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        count = -(-arguments.documents // DOCUMENTS_PER_FILE)
        make_token_files(Path(name), count)
        command = [sys.executable, "-m", "benchmarks.many_documents", "--pack", name]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ).stdout)
        documents = count * DOCUMENTS_PER_FILE
        print(
            f"{documents:,} documents in {found['rows']:,.0f} rows, fill {found['fill']:.4%}: {found['cpu']:.0f} s of CPU "
            f"({1e6 * found['cpu'] / documents:.0f} us a document), {found['wall']:.0f} s of wall, {found['mebibytes']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
