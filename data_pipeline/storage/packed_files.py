"""Random access to packed files: one read for the tokens and about one for the segments of a row, no index in memory."""

from __future__ import annotations

import bisect
import os
import sys
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.descriptors import DescriptorCache, read_exactly, read_into
from data_pipeline.storage.format import (
    FORMAT_VERSION,
    NPY_ERRORS,
    REWRITE,
    TOKEN_DTYPE,
    check_crc,
    check_seal,
    crc32,
    read_manifest,
    suffixed,
    verify_output,
)
from data_pipeline.storage.segments import SEGMENT_DTYPE
from model.durable import fingerprint_of, read_json
from model.errors import UserError

DATASET_NAME = "dataset.json"
# Segments read around the place where those of a row are expected: 8 KiB, and where they are not there 64 KiB.
_WINDOWS = (256, 2048)
_SEGMENT_BYTES = SEGMENT_DTYPE.itemsize
_MAX_SHARDS = 4096
_CAST_AT_ONCE = 32_768  # tokens; of more torch would start threads, in each thread that reads


class PackedShard:
    """The rows of one packed shard. Keeps a few numbers, however many rows there are.

    expected: the shard's entry of dataset.json. Opening compares it with the shard's manifest, and that with the file
    of the rows' CRCs, so that every row that is read is one that dataset.json speaks of. Raises `UserError`.
    """

    def __init__(self, prefix: Path, expected: dict[str, Any], sequence_length: int, descriptors: DescriptorCache):
        num_rows = int(expected["num_rows"])
        self.prefix, self.num_rows, self.sequence_length = prefix, num_rows, sequence_length
        self._descriptors = descriptors
        manifest = suffixed(prefix, ".json")
        if not manifest.is_file():
            raise UserError(
                "a shard of a packed dataset has no manifest",
                where=str(manifest),
                fix="run `nextstate pack` again: it writes that shard anew",
            )
        found = read_manifest(prefix, "packed")
        check_shard(self.prefix, found, expected)
        # As text, whose hash is kept: the one of a Path is computed at every look-up.
        self._bin, self._crc, self._seg = (os.fspath(suffixed(prefix, end)) for end in (".bin", ".crc.npy", ".seg.npy"))
        verify_output(Path(self._crc), found)
        self._crcs_at = self._after_header(self._crc, np.dtype("<u4"))
        self._segments_at = self._after_header(self._seg, SEGMENT_DTYPE)
        total_bytes = os.fstat(descriptors.get(self._seg)).st_size
        self._num_segments = (total_bytes - self._segments_at) // _SEGMENT_BYTES

    def read(self, row: int, tokens: memoryview) -> np.ndarray:
        """Fill `tokens` (4 * S bytes) with those of a row, int32; returns its segments.

        Raises `UserError` with file and row when it is damaged.
        """
        assert 0 <= row < self.num_rows
        read_into(self._descriptors.get(self._bin), tokens, row * len(tokens), self._bin, f"row {row}")
        expected = int.from_bytes(self._read(self._crc, 4, self._crcs_at + 4 * row, row), "little")
        segments = self._find_segments(row)
        check_crc(self.prefix, row, crc32(segments, crc32(tokens)), expected)
        return np.frombuffer(segments, SEGMENT_DTYPE)

    def _find_segments(self, row: int) -> memoryview:
        """Look where the row's segments are if all rows have equally many; search by halves when they are not there."""
        number = self._num_segments
        expected = int(number * (row + 0.5) / self.num_rows)
        for width in _WINDOWS:
            first = max(0, min(expected - width // 2, number - width))
            end = min(first + width, number)
            window = self._segments(first, end, row)
            rows = window.cast("I")[:: _SEGMENT_BYTES // 4]
            if number and (first == 0 or rows[0] < row) and (end == number or rows[-1] > row):
                here = bisect.bisect_left(rows, row)
                return window[here * _SEGMENT_BYTES : bisect.bisect_left(rows, row + 1, here) * _SEGMENT_BYTES]
        every = range(number)
        first = bisect.bisect_left(every, row, key=self._row_of)
        return self._segments(first, bisect.bisect_left(every, row + 1, lo=first, key=self._row_of), row)

    def _row_of(self, segment: int) -> int:
        return int.from_bytes(self._segments(segment, segment + 1, -1)[:4], "little")

    def _segments(self, first: int, end: int, row: int) -> memoryview:
        num_bytes = (end - first) * _SEGMENT_BYTES
        return memoryview(self._read(self._seg, num_bytes, self._segments_at + first * _SEGMENT_BYTES, row))

    def _read(self, path: str, num_bytes: int, offset: int, row: int) -> bytes:
        return read_exactly(self._descriptors.get(path), num_bytes, offset, path, f"row {row}")

    def _after_header(self, path: str, dtype: np.dtype) -> int:
        """Bytes of a `.npy` header, after checking that it announces a plain array of `dtype`."""
        with os.fdopen(os.dup(self._descriptors.get(path)), "rb") as stream:
            stream.seek(0)
            try:
                version = np.lib.format.read_magic(stream)
                shape, fortran_order, found = np.lib.format.read_array_header_1_0(stream)
            except NPY_ERRORS as error:
                raise UserError("not a readable .npy file", where=path, got=str(error), fix=REWRITE) from None
            if version != (1, 0) or len(shape) != 1 or fortran_order or found != dtype:
                raise UserError(
                    "an array of another type", where=path, expected=str(dtype), got=str(found), fix=REWRITE
                )
            return stream.tell()


class PackedDataset:
    """All rows of a packed folder, by one number. Opens a shard when one of its rows is read. Not thread-safe."""

    def __init__(self, folder: str | Path, descriptors: DescriptorCache | None = None):
        self.folder = Path(folder)
        self.manifest = read_dataset_manifest(self.folder)
        self.sequence_length = int(self.manifest["sequence_length"])
        self.fingerprint = str(self.manifest["fingerprint"])
        self.sources: list[str] = list(self.manifest["sources"])
        self._entries: list[dict[str, Any]] = self.manifest["shards"]
        sizes = [int(shard["num_rows"]) for shard in self._entries]
        self._first_row = [0, *accumulate(sizes)]
        self._descriptors = descriptors if descriptors is not None else DescriptorCache()
        self._shards: OrderedDict[int, PackedShard] = OrderedDict()
        # Rows that are cast come through here: a buffer that is used again stays in the processor's cache.
        self._buffer = np.empty(self.sequence_length, TOKEN_DTYPE)
        self._buffer_bytes = self._buffer.view(np.uint8).data

    def __len__(self) -> int:
        return self._first_row[-1]

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32 [S]) and segments (`SEGMENT_DTYPE` [k]) of a row, checked against its CRC."""
        tokens = np.empty(self.sequence_length, TOKEN_DTYPE)
        return tokens, self._read(row, tokens.view(np.uint8).data)

    def row_into(self, row: int, tokens: np.ndarray) -> np.ndarray:
        """Write a row's tokens to `tokens` (integers [S]), cast to its type; returns the segments. Checked as `row` is."""
        segments = self._read(row, self._buffer_bytes)
        cast_into(tokens, self._buffer)
        return segments

    def _read(self, row: int, tokens: memoryview) -> np.ndarray:
        number = bisect.bisect_right(self._first_row, row) - 1
        return self._shard(number).read(row - self._first_row[number], tokens)

    def _shard(self, number: int) -> PackedShard:
        shard = self._shards.get(number)
        if shard is not None:
            self._shards.move_to_end(number)
            return shard
        entry = self._entries[number]
        shard = PackedShard(self.folder / entry["name"], entry, self.sequence_length, self._descriptors)
        self._shards[number] = shard
        if len(self._shards) > _MAX_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def close(self) -> None:
        self._descriptors.close()


def cast_into(target: np.ndarray, tokens: np.ndarray) -> None:
    """Write int32 [n] into integers [n]. In a process that has torch, torch does it: numpy's cast takes twice as long."""
    from_numpy = getattr(sys.modules.get("torch"), "from_numpy", None)  # none yet while torch is being imported
    if from_numpy is None or target.dtype != np.int64:
        target[:] = tokens
        return
    for first in range(0, len(tokens), _CAST_AT_ONCE):
        part = slice(first, first + _CAST_AT_ONCE)
        from_numpy(target[part]).copy_(from_numpy(tokens[part]))


def check_shard(prefix: Path, manifest: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises `UserError` when a shard's manifest is not of the shard that dataset.json has an entry of."""
    found = fingerprint_of(manifest["outputs"])
    if found != expected["checksum"]:
        raise UserError(
            f"a packed shard is not the one that {DATASET_NAME} describes: it was replaced",
            where=str(suffixed(prefix, ".json")),
            expected=str(expected["checksum"]),
            got=found,
            fix=f"bring the shard back; or delete {DATASET_NAME} and that shard's .json and run `nextstate pack` again",
        )


def check_listed_shard(prefix: Path, manifest: dict[str, Any]) -> None:
    """The same for a shard whose folder may have a dataset.json; a shard that it does not list is refused too."""
    if not (prefix.parent / DATASET_NAME).is_file():
        return
    entries = {entry["name"]: entry for entry in read_dataset_manifest(prefix.parent)["shards"]}
    check_shard(prefix, manifest, entries.get(prefix.name, {"checksum": "none: the shard is not listed"}))


def read_dataset_manifest(folder: str | Path) -> dict[str, Any]:
    """`dataset.json` of a finished packed folder; raises `UserError` when packing has not finished there."""
    path = Path(folder) / DATASET_NAME
    if not path.is_file():
        raise UserError(
            "no finished packed dataset",
            where=str(folder),
            expected=DATASET_NAME,
            fix="run `nextstate pack target=FOLDER ...` to its end (it continues where it stopped)",
        )
    manifest = read_json(path)
    check_seal(path, manifest)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or manifest.get("kind") != "packed_dataset":
        raise UserError(
            "not a packed dataset of this version of the format",
            where=str(path),
            expected=f"packed_dataset, version {FORMAT_VERSION}",
            got=f"{manifest.get('kind')}, version {version}",
            fix="pack again with this version",
        )
    return manifest
