"""Writer and reader of token files; the format is described in `data_pipeline.storage.format`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.storage.atomic import atomic_write_json, remove_stale_temporaries
from data_pipeline.storage.descriptors import DescriptorCache, read_exactly
from data_pipeline.storage.format import (
    FORMAT_VERSION,
    REWRITE,
    TOKEN_BYTES,
    TOKEN_DTYPE,
    array_of,
    check_piece,
    check_row,
    checksum,
    checksum_file,
    encode_array,
    encode_header,
    encode_index,
    index_of,
    load_array,
    read_manifest,
    read_piece,
    row_crcs,
    seal,
    suffixed,
    verify_output,
)
from data_pipeline.storage.segments import SEGMENT_DTYPE, tile_exactly
from data_pipeline.storage.signatures import SIGNATURE_DTYPE
from data_pipeline.storage.signatures import SUFFIX as SIGNATURES_SUFFIX
from model.durable import publish, temporary_path, told_no_space
from model.errors import UserError

_SEGMENT_BYTES_AT_ONCE = 4 << 20  # that wait to be written
_INDEX_SUFFIXES = (".idx", ".seg.npy", ".crc.npy")  # of the files that a reader's index is made of


class TokenFileWriter:
    """Writes one token file or packed shard: `add` documents (or rows), then `finish` to publish.

    Used as a context manager: leaving it without `finish` (an error, a stop) removes every trace. Raises `UserError` when the folder has no room.
    """

    def __init__(self, prefix: str | Path, *, with_crc: bool = False):
        self.prefix = Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(self.prefix.parent, f"{self.prefix.name}.")
        self.with_crc = with_crc
        self._lengths: list[int] = []
        self._segments: list[np.ndarray] = []  # that are not written yet
        self._num_segments = self._num_waiting = 0  # of all, of those
        self._crcs: list[int] = []
        self._num_bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._bin, self._seg = suffixed(self.prefix, ".bin"), suffixed(self.prefix, ".seg.npy")
        with told_no_space(self.prefix.parent, 0):
            self._stream = temporary_path(self._bin).open("wb", buffering=1 << 20)
            self._segment_stream = temporary_path(self._seg).open("wb")
            self._segment_stream.write(encode_header(SEGMENT_DTYPE, 0))  # keeps the place of the one that counts them

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
        self.add_all(tokens, segments, [len(tokens)], [len(segments)])

    def add_all(
        self, tokens: np.ndarray, segments: np.ndarray, lengths: Sequence[int], segment_counts: Sequence[int]
    ) -> None:
        """Append documents or rows laid end to end: of each so many of the tokens, int [n], and of the segments, `SEGMENT_DTYPE` [k]."""
        assert segments.dtype == SEGMENT_DTYPE, "segments have another record type"
        assert tile_exactly(segments, lengths, segment_counts), "segments do not tile the tokens"
        assert len(tokens) == sum(lengths), "other tokens than the documents have"
        ordered = np.ascontiguousarray(tokens, TOKEN_DTYPE)
        content = ordered.view(np.uint8).data
        numbered = segments.copy()
        first = len(self._lengths)
        numbered["row"] = np.repeat(np.arange(first, first + len(lengths)), segment_counts)
        self._num_bytes += len(content)
        with told_no_space(self.prefix.parent, self._num_bytes):
            self._stream.write(content)
        self._digest.update(content)
        self._lengths += lengths
        self._segments.append(numbered)
        self._num_waiting += len(numbered)
        if self._num_waiting * SEGMENT_DTYPE.itemsize >= _SEGMENT_BYTES_AT_ONCE:
            with told_no_space(self.prefix.parent, self._num_bytes):
                self._write_segments()
        if self.with_crc:
            self._crcs += row_crcs(ordered, numbered, lengths, segment_counts)

    def finish(self, manifest: dict[str, Any], more: Mapping[str, bytes] | None = None) -> dict[str, Any]:
        """Publish the data, then the manifest; returns the manifest as written.

        `more`: suffix -> content of further files (`data_pipeline.storage.signatures`), which count among the outputs.
        Adds `format_version`, `num_tokens`, `outputs` (file name -> checksum) and `checksum` to the given entries. The caller
        supplies `kind`, `num_documents` or `num_rows` and the rest.
        """
        index = encode_index(np.array(self._lengths, np.int32))
        side_files: dict[str, bytes] = {}
        if self.with_crc:
            side_files[".crc.npy"] = encode_array(np.array(self._crcs, "<u4"))
        side_files |= more or {}
        outputs = {self._bin.name: self._digest.hexdigest()}
        segments_bytes = (self._num_segments + self._num_waiting) * SEGMENT_DTYPE.itemsize
        needed_bytes = self._num_bytes + len(index) + segments_bytes + sum(map(len, side_files.values()))
        with told_no_space(self.prefix.parent, needed_bytes):
            self._stream.close()
            outputs |= self._write_piece(".idx", index)
            outputs |= self._finish_segments()
            for suffix, content in side_files.items():
                outputs |= self._write_piece(suffix, content)
        # A file that is replaced must not be described by its old manifest meanwhile.
        manifest_path = suffixed(self.prefix, ".json")
        manifest_path.unlink(missing_ok=True)
        for name in outputs:
            final = self.prefix.with_name(name)
            publish(temporary_path(final), final)
        complete = manifest | {"format_version": FORMAT_VERSION, "num_tokens": sum(self._lengths), "outputs": outputs}
        complete = seal(complete)
        atomic_write_json(manifest_path, complete)
        return complete

    def _write_piece(self, suffix: str, content: bytes) -> dict[str, str]:
        """Its name and checksum."""
        path = suffixed(self.prefix, suffix)
        temporary_path(path).write_bytes(content)
        return {path.name: checksum(content)}

    def _write_segments(self) -> None:
        """Those that wait: all of a shard's would take much of the memory."""
        self._segment_stream.write(np.concatenate(self._segments).view(np.uint8).data)
        self._num_segments += self._num_waiting
        self._segments, self._num_waiting = [], 0

    def _finish_segments(self) -> dict[str, str]:
        """The name and checksum of their file."""
        if self._segments:
            self._write_segments()
        self._segment_stream.seek(0)
        self._segment_stream.write(encode_header(SEGMENT_DTYPE, self._num_segments))
        self._segment_stream.close()
        return {self._seg.name: checksum_file(temporary_path(self._seg))}

    def discard(self) -> None:
        """Remove the temporaries of an unfinished file; nothing to do after `finish`."""
        # On a full disk the buffered rest cannot be flushed; that is being reported already.
        for stream in (self._stream, self._segment_stream):
            with suppress(OSError):
                stream.close()
        for suffix in (".bin", ".idx", ".seg.npy", ".crc.npy", SIGNATURES_SUFFIX, ".json"):
            temporary_path(suffixed(self.prefix, suffix)).unlink(missing_ok=True)


class TokenFileReader:
    """Random access to one published token file or packed shard by `pread`; opens nothing before the first read.

    `descriptors` bounds the open files of all readers that share it. Not thread-safe.
    """

    def __init__(
        self, prefix: str | Path, descriptors: DescriptorCache | None = None, manifest: dict[str, Any] | None = None
    ):
        """manifest: where it was read already."""
        self.prefix = Path(prefix)
        self.manifest = read_manifest(self.prefix) if manifest is None else manifest
        self._descriptors = descriptors if descriptors is not None else DescriptorCache()
        self._loaded: _Index | None = None
        self._verified = False

    @cached_property
    def _bin(self) -> str:  # many readers are opened of which few are read
        return os.fspath(suffixed(self.prefix, ".bin"))

    @cached_property
    def _seg(self) -> str:
        return os.fspath(suffixed(self.prefix, ".seg.npy"))

    def verify(self) -> None:
        """Read every piece, once, and compare it with the manifest's checksums; raises `UserError` naming the damaged one."""
        if not self._verified:
            self._load(verify=True)

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
            self._load()
            assert self._loaded is not None
        return self._loaded

    def _load(self, verify: bool = False) -> np.ndarray:
        """Returns the segments of the whole file, which the index is made of and which are not kept.

        Compares what is read whole with the manifest; the CRCs speak for the rest, which `verify` reads too.
        """
        outputs, base = self.manifest["outputs"], os.fspath(self.prefix)
        contents = {}
        for suffix in _INDEX_SUFFIXES:
            path = f"{base}{suffix}"
            if suffix != ".crc.npy" or os.path.basename(path) in outputs:
                contents[suffix] = content = read_piece(path)
                if not self._verified and (verify or suffix != ".seg.npy"):
                    check_piece(path, checksum(content), self.manifest)
        for name in outputs if verify else ():
            if not name.endswith(_INDEX_SUFFIXES):
                verify_output(self.prefix.with_name(name), self.manifest)
        self._verified |= verify
        segments, self._loaded = _Index.of(self.prefix, len(self), contents)
        return segments

    def tokens(self, index: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of a document or row, int32; a part of them with `start` and `length`.

        A whole one is checked against its CRC, a file of an older version without CRCs is read whole and checked at the
        first call; raises `UserError` when it is damaged. Parts are not checked: see `verify`.
        """
        total = int(self._index.lengths[index])
        if length is None:
            length = total - start
        if start == 0 and length == total:
            return self.document(index)[0]
        if self._index.crcs is None:
            self.verify()
        assert 0 <= start <= start + length <= total, "outside the document"
        return self._read_tokens(index, start, length)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """All tokens (int32 [n]) and segments of a document or row, both read once; checked as `tokens` says."""
        crcs = self._index.crcs
        if crcs is None:
            self.verify()
        tokens = self._read_tokens(index, 0, int(self._index.lengths[index]))
        segments = self.segments(index)
        if crcs is not None:
            check_row(self.prefix, index, tokens, segments, int(crcs[index]))
        return tokens, segments

    def _read_tokens(self, index: int, start: int, length: int) -> np.ndarray:
        offset = int(self._index.offsets[index]) + start * TOKEN_BYTES
        return np.frombuffer(self._read(self._bin, length * TOKEN_BYTES, offset, index), TOKEN_DTYPE)

    def segments(self, index: int) -> np.ndarray:
        """Segments of a document or row, `SEGMENT_DTYPE` [k]."""
        first, end = self._index.segment_offsets[index : index + 2].tolist()
        size = SEGMENT_DTYPE.itemsize
        content = self._read(self._seg, (end - first) * size, self._index.segments_at + first * size, index)
        return np.frombuffer(content, SEGMENT_DTYPE)

    def _read(self, path: str, num_bytes: int, offset: int, index: int) -> bytes:
        return read_exactly(self._descriptors.get(path), num_bytes, offset, path, f"{self._unit} {index}")

    def all_segments(self, *, verify: bool = False) -> np.ndarray:
        """The segments of the whole file, `SEGMENT_DTYPE` [k]; not kept. The first call makes the index of them as well.

        `verify`: as the method does, in the same reading.
        """
        verify = verify and not self._verified
        return self._load(verify) if verify or self._loaded is None else load_array(Path(self._seg))

    def all_signatures(self) -> np.ndarray | None:
        """What each document is like, `SIGNATURE_DTYPE` [n]; not kept. None where none were noted."""
        path = suffixed(self.prefix, SIGNATURES_SUFFIX)
        if path.name not in self.manifest["outputs"]:
            return None
        signatures = load_array(path)
        if signatures.dtype != SIGNATURE_DTYPE or len(signatures) != len(self):
            raise UserError("a file of signatures is not of its token file", where=str(path), fix=REWRITE)
        return signatures

    def signature(self, index: int) -> np.ndarray:
        """What one document is like, `SIGNATURE_DTYPE` [1], of a file that has signatures."""
        path = os.fspath(suffixed(self.prefix, SIGNATURES_SUFFIX))
        descriptor, size = self._descriptors.get(path), SIGNATURE_DTYPE.itemsize
        offset = os.fstat(descriptor).st_size - (len(self) - index) * size
        return np.frombuffer(read_exactly(descriptor, size, offset, path, f"document {index}"), SIGNATURE_DTYPE)

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
    def of(cls, prefix: Path, num_documents: int, contents: Mapping[str, bytes]) -> tuple[np.ndarray, _Index]:
        """The segments and the index. `contents`: what the files hold, by their suffixes; CRCs may be missing.

        Raises `UserError` where the pieces of the file do not belong together.
        """
        lengths, offsets = index_of(contents[".idx"], f"{prefix}.idx")
        if len(lengths) != num_documents:
            raise UserError(
                "an index disagrees with its manifest",
                where=f"{prefix}.idx",
                expected=f"{num_documents} documents",
                got=str(len(lengths)),
                fix=REWRITE,
            )
        crcs = array_of(contents[".crc.npy"], f"{prefix}.crc.npy") if ".crc.npy" in contents else None
        index = cls(lengths, offsets, crcs)
        path = f"{prefix}.seg.npy"
        segments = array_of(contents[".seg.npy"], path)
        if segments.dtype != SEGMENT_DTYPE:
            raise UserError("a segment file has another record type", where=path, fix=REWRITE)
        if segments["row"].max(initial=0) >= max(1, num_documents):  # counting them would take memory for all between
            raise UserError("a segment file is damaged: a segment of no document", where=path, fix=REWRITE)
        index.segments_at = len(contents[".seg.npy"]) - segments.nbytes
        counts = np.bincount(segments["row"], minlength=num_documents)
        index.segment_offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=index.segment_offsets[1:])
        return segments, index
