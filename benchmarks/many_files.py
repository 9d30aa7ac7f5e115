"""What starts cost where there are very many files: 100,000 token files, 40,000 packed shards.

    python -m benchmarks.many_files [--token-files 100000] [--shards 40000] [--folder /tmp]

Token files and shards are real and tiny (two documents, two rows of 64 tokens); all but the manifests are hard links to a few, so
that 100,000 take half a gigabyte. Each start runs in a process of its own, with the files in the page cache and imports not counted:
seconds of wall and of CPU, by how much the process's peak memory grew, and the most files that it had open. Where no manifest is noted
(`data_pipeline.storage.manifests`) the notes of the folder are removed before.

- status: `nextstate tokenize status` of all shards done;
- tokenize: the command again where nothing is to do;
- pack, first row: from the call to the first row planned, with a window of 256 rows of a document each;
- pack, first row, one removed: the same where a document is left out: every token file is opened, verified and indexed;
- pack, nothing to do: the command again over the packed shards;
- loader: `PackedDataSource` and its first global batch of 64 rows, of 64 shards;
- one more file: a writer that begins and publishes a file in the full folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.packing import pack as packing_module
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage.atomic import encode_json
from data_pipeline.storage.folder_claim import clear_claim
from data_pipeline.storage.format import FORMAT_VERSION, seal
from data_pipeline.storage.manifests import NOTES_FOLDER
from data_pipeline.storage.packed_files import DATASET_NAME, read_dataset_manifest
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileWriter
from data_pipeline.tokenize import ShardTokenizer
from launch.commands.tokenize import Config, manifests_of, not_done, plan_jobs, run, summarize
from model.durable import fingerprint_of
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(preset="emu35", pad_multiple=1024))
LENGTH = 64  # tokens of a row
LINKS = 50_000  # of one file: file systems have a limit
SUFFIXES = (".bin", ".idx", ".seg.npy", ".crc.npy")
PACKING = PackConfig(sequence_length=LENGTH, rows_per_shard=2, window_rows=1)


def write_original(prefix: Path) -> dict[str, Any]:
    """A token file of two documents as long as a row; returns its manifest."""
    segments = np.zeros(3, SEGMENT_DTYPE)
    segments["start"], segments["length"] = [0, 1, LENGTH - 1], [1, LENGTH - 2, 1]
    segments["kind"] = [Kind.STRUCTURE, Kind.TEXT, Kind.STRUCTURE]
    segments["flags"][0] |= np.uint8(Flag.DOCUMENT_START)
    with TokenFileWriter(prefix, with_crc=True) as writer:
        for number in range(2):
            segments["document"] = number + 1
            writer.add(np.arange(LENGTH), segments)
        return writer.finish(
            {
                "kind": "tokens",
                "num_documents": 2,
                "vocabulary": VOCABULARY.describe(),
                "counts_by_class": {"text": 2 * LENGTH - 4, "visual": 0, "structure": 4, "padding": 0},
                "sources": ["many"],
                "quarantined": {},
                "config_fingerprint": "0" * 32,
                "text_tokenizer": "1" * 32,
                "vision_tokenizer": None,
            }
        )


def multiply(original: Path, manifest: dict[str, Any], folder: Path, count: int, more: Callable[[int], Any]) -> None:
    """`count` files in `folder` that are `original`, each with a manifest of its own."""
    folder.mkdir(parents=True)
    bodies: dict[str, Path] = {}
    for number in range(count):
        name = f"{number:06d}"
        outputs = {}
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if number % LINKS == 0:
                path.write_bytes(original.with_name(original.name + suffix).read_bytes())
                bodies[suffix] = path
            else:
                os.link(bodies[suffix], path)
            outputs[path.name] = manifest["outputs"][original.name + suffix]
        made = seal(manifest | {"outputs": outputs} | more(number))
        (folder / f"{name}.json").write_bytes(encode_json(made))


def make_token_files(folder: Path, count: int) -> None:
    shards = folder / "shards"
    shards.mkdir()
    with tarfile.open(shards / "000000.tar", "w"):
        pass
    body, size = shards / "000000.tar", (shards / "000000.tar").stat().st_size
    for number in range(1, count):
        path = shards / f"{number:06d}.tar"
        if number % LINKS:
            os.link(body, path)
        else:
            body = path
            body.write_bytes((shards / "000000.tar").read_bytes())

    def inputs(number: int) -> dict[str, Any]:
        path = shards / f"{number:06d}.tar"
        entry = {"name": path.name, "checksum": "2" * 32, "bytes": size, "modified_ns": path.stat().st_mtime_ns}
        return {"inputs": [entry]}

    manifest = write_original(folder / "original" / "000000")
    multiply(folder / "original" / "000000", manifest, folder / "tokens", count, inputs)


def make_shards(folder: Path, count: int) -> None:
    """A packed folder as `pack` would leave it of `count` shards."""
    pack({"many": folder / "original"}, folder / "small", PACKING)
    dataset = read_dataset_manifest(folder / "small")
    manifest = json.loads((folder / "small" / "000000.json").read_bytes())
    entries = []

    def more(number: int) -> dict[str, Any]:
        names = {f"{number:06d}{suffix}": manifest["outputs"][f"000000{suffix}"] for suffix in SUFFIXES}
        entries.append({"name": f"{number:06d}", "num_rows": 2, "checksum": fingerprint_of(names)})
        return {}

    multiply(folder / "small" / "000000", manifest, folder / "packed", count, more)
    grown = {key: dataset[key] * count for key in ("num_rows", "num_tokens", "num_real_tokens")}
    whole = dataset | grown | {"shards": entries, "fingerprint": fingerprint_of(entries)}
    assert whole["format_version"] == FORMAT_VERSION
    (folder / "packed" / DATASET_NAME).write_bytes(encode_json(seal(whole)))


def status(folder: Path) -> str:
    answer = run(Config(action="status", input=str(folder / "shards" / "*.tar"), target=str(folder / "tokens")))
    return f"{answer['done_shards']:,} shards done"


def tokenize_again(folder: Path) -> str:
    """What `run` does before the first shard that is not done: with a tokenizer of our own, as there is no need of one."""
    config = Config(input=str(folder / "shards" / "*.tar"), target=str(folder / "tokens"))
    tokenizer = ShardTokenizer.__new__(ShardTokenizer)
    tokenizer.fingerprint = "0" * 32
    jobs = plan_jobs(config, folder / "tokens")
    manifests = manifests_of(folder / "tokens")
    unfinished = not_done(folder / "tokens", jobs, tokenizer, manifests)
    clear_claim(folder / "tokens")
    answer = summarize(folder / "tokens", jobs, len(jobs), manifests)
    return f"{answer['num_shards'] - len(unfinished):,} shards passed over"


def first_row(folder: Path, removed: frozenset[int] = frozenset()) -> str:
    class PlannedError(Exception):
        pass

    def stop(packing: Any, number: int, rows: list[Any]) -> Any:
        raise PlannedError

    packing_module._Packing.write_shard = stop  # type: ignore[method-assign]
    try:
        pack({"many": folder / "tokens"}, folder / "target", replace(PACKING, window_rows=256), removed)
    except PlannedError:
        return "first row planned"
    raise AssertionError


def pack_again(folder: Path) -> str:
    """What the command looks at in its target; what it does before is part of the line above."""
    found = json.loads((folder / "packed" / "000000.json").read_bytes())["config_fingerprint"]
    assert packing_module._is_complete(folder / "packed", found)
    return "all shards there"


def loader(folder: Path) -> str:
    source = PackedDataSource(
        {"many": folder / "packed"},
        {"many": 1.0},
        0,
        LENGTH,
        64,
        1,
        0,
        1,
        {"text": 1.0, "visual": 0.5, "structure": 1.0},
        "document",
        VOCABULARY,
        prefetch_batches=0,
    )
    source.batch(0)
    told = f"{source.num_rows:,} rows, first batch read"
    source.close()
    return told


def one_more(folder: Path) -> str:
    write_original(folder / "tokens" / "999999")
    for suffix in (*SUFFIXES, ".json"):
        (folder / "tokens" / f"999999{suffix}").unlink()
    return "a file in the full folder"


def one_removed(folder: Path) -> str:
    return first_row(folder, frozenset([1 << 63]))


def unnoted(start: Callable[[Path], str], part: str) -> Callable[[Path], str]:
    def begin(folder: Path) -> str:
        shutil.rmtree(folder / part / NOTES_FOLDER, ignore_errors=True)
        return start(folder)

    return begin


STARTS: dict[str, Callable[[Path], str]] = {
    "status, none noted": unnoted(status, "tokens"),
    "status": status,
    "tokenize, nothing to do": tokenize_again,
    "pack, first row": first_row,
    "pack, first row, one removed": one_removed,
    "pack, nothing to do, none noted": unnoted(pack_again, "packed"),
    "pack, nothing to do": pack_again,
    "loader": loader,
    "one more file": one_more,
}


class OpenFiles:
    """The most files that this process has open, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.most, self._is_over = 0, False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._is_over:
            self.most = max(self.most, len(os.listdir("/proc/self/fd")))
            time.sleep(0.01)

    def stop(self) -> int:
        self._is_over = True
        self._thread.join()
        return self.most


def measure(name: str, folder: Path) -> dict[str, Any]:
    """In this process, which has not used any of it before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = OpenFiles()
    wall, cpu = time.perf_counter(), time.process_time()
    told = STARTS[name](folder)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "open_files": opened.stop(),
        "told": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token-files", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=40_000)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="the files are made below it, and removed")
    parser.add_argument("--kept", type=Path, help="a folder whose files are made if they are not there, and stay")
    parser.add_argument("--start", choices=STARTS, help="measure this one in this process, in --kept")
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(measure(arguments.start, arguments.kept)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = arguments.kept or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "packed").exists():
            began = time.perf_counter()
            make_token_files(folder, arguments.token_files)
            make_shards(folder, arguments.shards)
            print(f"files made in {time.perf_counter() - began:.0f} s", flush=True)
        print(f"{'':<33}{'wall s':>8}{'CPU s':>8}{'MiB':>7}{'files open':>12}")
        for start in STARTS:
            command = [sys.executable, "-m", "benchmarks.many_files", "--start", start, "--kept", str(folder)]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            found = json.loads(made.splitlines()[-1])
            print(
                f"{start:<33}{found['wall']:>8.2f}{found['cpu']:>8.2f}{found['mebibytes']:>7.0f}"
                f"{found['open_files']:>12}   {found['told']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
