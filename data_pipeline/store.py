"""The on-disk token format: token files and the shards of packed files.

A file is five pieces that share a prefix:

- `.bin`      the tokens of all documents (or rows), little-endian int32, end to end;
- `.idx`      Megatron's index of them (`megatron.core.datasets.indexed_dataset`, version 1), each one a document;
- `.seg.npy`  the segments (`SEGMENT_DTYPE`), sorted by document (or row) and start;
- `.crc.npy`  packed files only: one CRC32 (uint32) a row, of its tokens' bytes followed by its segments' bytes;
- `.json`     the manifest, published last: a file without one does not exist for any reader.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.atomic import (
    atomic_write_json,
    no_space_is_a_user_error,
    publish,
    read_json,
    remove_stale_temporaries,
    temporary_path,
)
from data_pipeline.descriptors import DescriptorCache, read_exactly
from data_pipeline.segments import SEGMENT_DTYPE, tile_exactly
from model.errors import UserError

FORMAT_VERSION = 1
TOKEN_DTYPE = np.dtype("<i4")
_TOKEN_BYTES = TOKEN_DTYPE.itemsize

# Megatron's index: magic, version 1, dtype code 4 (int32), number of sequences, number of document marks.
_INDEX_HEADER_DTYPE = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype_code", "u1"), ("sequences", "<u8"), ("marks", "<u8")]
)
_INDEX_MAGIC = b"MMIDIDX"  # followed by two zero bytes, which numpy's "S9" supplies
_INT32_CODE = 4
_REWRITE = "delete the .json of that file and run the command that wrote it again"


def suffixed(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def checksum(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def checksum_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def encode_index(lengths: np.ndarray) -> bytes:
    """The bytes of Megatron's `.idx` for sequences of these lengths (int32 [n]), each a document of its own."""
    num_sequences = len(lengths)
    header = np.array(
        (_INDEX_MAGIC, 1, _INT32_CODE, num_sequences, num_sequences + 1), _INDEX_HEADER_DTYPE
    )
    ends = np.cumsum(lengths, dtype=np.int64) * _TOKEN_BYTES
    offsets = np.concatenate([np.zeros(1, np.int64), ends])[:num_sequences]
    marks = np.arange(num_sequences + 1, dtype="<i8")
    pieces = (header, lengths.astype("<i4"), offsets.astype("<i8"), marks)
    return b"".join(piece.tobytes() for piece in pieces)


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens (int32 [n]) and offsets in bytes (int64 [n]) of a Megatron `.idx` of int32 tokens.

    Raises `UserError` for anything else, a truncated file included.
    """
    if not path.is_file():
        raise UserError("a file named by its manifest is missing", where=str(path), fix=_REWRITE)
    content = path.read_bytes()
    header_bytes = _INDEX_HEADER_DTYPE.itemsize
    if len(content) < header_bytes:
        raise UserError("an index file is truncated", where=str(path), got=f"{len(content)} bytes")
    header = np.frombuffer(content, _INDEX_HEADER_DTYPE, count=1)[0]
    found = (bytes(header["magic"]), int(header["version"]), int(header["dtype_code"]))
    if found != (_INDEX_MAGIC, 1, _INT32_CODE):
        raise UserError(
            "not a Megatron index of int32 tokens", where=str(path),
            expected=str((_INDEX_MAGIC, 1, _INT32_CODE)), got=str(found),
        )  # fmt: skip
    num_sequences = int(header["sequences"])
    if len(content) < header_bytes + num_sequences * 12 + int(header["marks"]) * 8:
        raise UserError("an index file is truncated", where=str(path), got=f"{len(content)} bytes")
    lengths = np.frombuffer(content, "<i4", num_sequences, header_bytes)
    offsets = np.frombuffer(content, "<i8", num_sequences, header_bytes + 4 * num_sequences)
    return lengths, offsets


class TokenFileWriter:
    """Writes one token file or packed shard: `add` documents (or rows), then `finish` to publish.

    Used as a context manager: leaving it without `finish` (an error, a stop) removes every trace. `with_crc` is for
    packed files. Raises `UserError` when the folder has no room.
    """

    def __init__(self, prefix: str | Path, *, with_crc: bool = False):
        self.prefix = Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(self.prefix.parent, f"{self.prefix.name}.")
        self.with_crc = with_crc
        self._lengths: list[int] = []
        self._segments: list[np.ndarray] = []
        self._crcs: list[int] = []
        self._num_bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._bin = suffixed(self.prefix, ".bin")
        self._stream = temporary_path(self._bin).open("wb", buffering=1 << 20)

    def __len__(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, tokens: np.ndarray, segments: np.ndarray) -> None:
        """Append one document or row. tokens int [n]; segments `SEGMENT_DTYPE` [k], tiling the n tokens."""
        assert segments.dtype == SEGMENT_DTYPE, "segments have another record type"
        assert tile_exactly(segments, len(tokens)), "segments do not tile the tokens"
        content = np.ascontiguousarray(tokens, TOKEN_DTYPE).tobytes()
        numbered = segments.copy()
        numbered["row"] = len(self._lengths)
        self._num_bytes += len(content)
        with no_space_is_a_user_error(self.prefix.parent, self._num_bytes):
            self._stream.write(content)
        self._digest.update(content)
        self._lengths.append(len(tokens))
        self._segments.append(numbered)
        if self.with_crc:
            self._crcs.append(zlib.crc32(numbered.tobytes(), zlib.crc32(content)))

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Publish the data, then the manifest; returns the manifest as written.

        Adds `format_version`, `num_tokens` and `outputs` (file name -> checksum) to the given entries. The caller
        supplies `kind`, `num_documents` or `num_rows` and the rest.
        """
        side_files = {".idx": encode_index(np.array(self._lengths, np.int32))}
        side_files[".seg.npy"] = _encode_array(_concatenate(self._segments))
        if self.with_crc:
            side_files[".crc.npy"] = _encode_array(np.array(self._crcs, "<u4"))
        outputs = {self._bin.name: self._digest.hexdigest()}
        needed_bytes = self._num_bytes + sum(map(len, side_files.values()))
        with no_space_is_a_user_error(self.prefix.parent, needed_bytes):
            self._stream.close()
            for suffix, content in side_files.items():
                path = suffixed(self.prefix, suffix)
                temporary_path(path).write_bytes(content)
                outputs[path.name] = checksum(content)
        # A file that is replaced must not be described by its old manifest meanwhile.
        manifest_path = suffixed(self.prefix, ".json")
        manifest_path.unlink(missing_ok=True)
        for name in outputs:
            final = self.prefix.with_name(name)
            publish(temporary_path(final), final)
        complete = manifest | {
            "format_version": FORMAT_VERSION,
            "num_tokens": sum(self._lengths),
            "outputs": outputs,
        }
        atomic_write_json(manifest_path, complete)
        return complete

    def discard(self) -> None:
        """Remove the temporaries of an unfinished file; nothing to do after `finish`."""
        # On a full disk the buffered rest cannot be flushed; that is being reported already.
        with suppress(OSError):
            self._stream.close()
        for suffix in (".bin", ".idx", ".seg.npy", ".crc.npy", ".json"):
            temporary_path(suffixed(self.prefix, suffix)).unlink(missing_ok=True)


def _concatenate(segments: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(segments) if segments else np.zeros(0, SEGMENT_DTYPE)


def _encode_array(array: np.ndarray) -> bytes:
    """The bytes of a `.npy` file."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def read_manifest(prefix: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a published file. Raises `UserError` when there is none or it is of another kind."""
    path = suffixed(Path(prefix), ".json")
    manifest = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind is not None and found != kind:
        raise UserError(
            "not the kind of file that was asked for", where=str(path), expected=kind, got=str(found)
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            "the file was written by another version of the format", where=str(path),
            expected=str(FORMAT_VERSION), got=str(manifest.get("format_version")),
            fix="write it again with this version",
        )  # fmt: skip
    return manifest


def published_prefixes(folder: str | Path) -> list[Path]:
    """Prefixes `NNNNNN` of the published files of a folder, in order."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder))
    return sorted(path.with_suffix("") for path in folder.glob("*.json") if path.stem.isdigit())


def verify_outputs(prefix: str | Path, manifest: dict[str, Any]) -> None:
    """Read every piece and compare its checksum with the manifest; raises `UserError` naming the damaged one."""
    for name, expected in manifest["outputs"].items():
        path = Path(prefix).with_name(name)
        if not path.is_file():
            raise UserError("a file named by its manifest is missing", where=str(path), fix=_REWRITE)
        found = checksum_file(path)
        if found != expected:
            raise UserError(
                "a file is damaged: its checksum is not the manifest's", where=str(path),
                expected=expected, got=found, fix=_REWRITE,
            )  # fmt: skip


class TokenFileReader:
    """Random access to one published token file or packed shard by `pread`; opens nothing before the first read.

    `descriptors` bounds the open files of all readers that share it. Not thread-safe.
    """

    def __init__(self, prefix: str | Path, descriptors: DescriptorCache | None = None):
        self.prefix = Path(prefix)
        self.manifest = read_manifest(self.prefix)
        self._descriptors = descriptors if descriptors is not None else DescriptorCache()
        self._loaded: _Index | None = None

    def __len__(self) -> int:
        key = "num_rows" if self.manifest["kind"] == "packed" else "num_documents"
        return int(self.manifest[key])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document or row, int32 [n]."""
        return self._index.lengths

    @property
    def _index(self) -> _Index:
        if self._loaded is None:
            self._loaded = _Index.load(self.prefix, len(self))
        return self._loaded

    def tokens(self, index: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of a document or row, int32; a part of them with `start` and `length`. No CRC check: see `row`."""
        total = int(self._index.lengths[index])
        count = total - start if length is None else length
        assert 0 <= start and start + count <= total, "outside the document"
        path = suffixed(self.prefix, ".bin")
        offset = int(self._index.offsets[index]) + start * _TOKEN_BYTES
        where = f"{path}, {self._unit} {index}"
        content = read_exactly(self._descriptors.get(path), count * _TOKEN_BYTES, offset, where)
        return np.frombuffer(content, TOKEN_DTYPE)

    def segments(self, index: int) -> np.ndarray:
        """Segments of a document or row, `SEGMENT_DTYPE` [k]."""
        first, end = self._index.segment_offsets[index : index + 2]
        path = suffixed(self.prefix, ".seg.npy")
        size = SEGMENT_DTYPE.itemsize
        offset = self._index.segments_at + int(first) * size
        where = f"{path}, {self._unit} {index}"
        content = read_exactly(self._descriptors.get(path), int(end - first) * size, offset, where)
        return np.frombuffer(content, SEGMENT_DTYPE)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of a packed row, checked against its CRC; raises `UserError` when it is damaged."""
        tokens, segments = self.tokens(index), self.segments(index)
        assert self._index.crcs is not None, "only packed files carry CRCs"
        expected = int(self._index.crcs[index])
        found = zlib.crc32(segments.tobytes(), zlib.crc32(tokens.tobytes()))
        if found != expected:
            raise UserError(
                "a packed row is damaged", where=f"{suffixed(self.prefix, '.bin')}, row {index}",
                expected=f"CRC32 {expected:08x}", got=f"{found:08x}",
                fix="delete the .json of that shard and dataset.json, then run `nextstate pack` again",
            )  # fmt: skip
        return tokens, segments

    @property
    def _unit(self) -> str:
        return "row" if self.manifest["kind"] == "packed" else "document"


class _Index:
    """What a reader keeps of its file: where each document's tokens and segments are; 24 bytes a document."""

    def __init__(self, lengths: np.ndarray, offsets: np.ndarray, crcs: np.ndarray | None):
        self.lengths, self.offsets, self.crcs = lengths, offsets, crcs
        self.segment_offsets = np.zeros(1, np.int64)
        self.segments_at = 0  # bytes of the .npy header

    @classmethod
    def load(cls, prefix: Path, num_documents: int) -> _Index:
        lengths, offsets = read_index(suffixed(prefix, ".idx"))
        if len(lengths) != num_documents:
            raise UserError(
                "an index disagrees with its manifest", where=str(suffixed(prefix, ".idx")),
                expected=f"{num_documents} documents", got=str(len(lengths)), fix=_REWRITE,
            )  # fmt: skip
        crc_path = suffixed(prefix, ".crc.npy")
        index = cls(lengths, offsets, _load_array(crc_path) if crc_path.exists() else None)
        path = suffixed(prefix, ".seg.npy")
        segments = _load_array(path)
        if segments.dtype != SEGMENT_DTYPE:
            raise UserError("a segment file has another record type", where=str(path), fix=_REWRITE)
        index.segments_at = os.path.getsize(path) - segments.nbytes
        counts = np.bincount(segments["row"], minlength=num_documents)
        index.segment_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return index


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError("a file named by its manifest is missing", where=str(path), fix=_REWRITE) from None
    except ValueError as error:
        raise UserError("not a readable .npy file", where=str(path), got=str(error), fix=_REWRITE) from None
