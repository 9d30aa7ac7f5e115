"""The safetensors container: 8 bytes of header length, a JSON header, then the tensors' bytes without holes.

Own reader and writer, because conversion knows every size before it has a value: it writes the header first and then
rows in any order from many threads, and it reads rows without mapping whole files into memory.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.checksums import BLOCK_BYTES, MAX_HEADER_BYTES, PartSums
from model.checkpoint.small_files import open_regular
from model.conversion.tensors import ITEM_BYTES, TensorInfo
from model.errors import UserError

DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the position of its first byte in its file."""

    info: TensorInfo
    position: int


class SafetensorsFile:
    """An open file; its header is checked whole. Reads from any thread."""

    def __init__(self, path: Path):
        self.path = path
        self._expected: dict[str, str] = {}
        self._sums: dict[str, PartSums] = defaultdict(PartSums)
        self._descriptor = open_regular(path, "a file of the checkpoint")
        try:
            self.num_bytes = os.fstat(self._descriptor).st_size
            self.tensors = self._read_header()
        except OSError as error:
            self.close()
            raise UserError(
                "a file of the checkpoint cannot be read", where=str(path), got=str(error.strerror)
            ) from None
        except BaseException:
            self.close()
            raise

    def expect(self, sums: dict[str, str]) -> None:
        """What the tensors' crc32 must be (eight hexadecimal digits by stored name); `verify` compares."""
        self._expected |= sums

    def read_into(self, name: str, offset: int, out: np.ndarray) -> int:
        """Fill the contiguous array `out` with a tensor's bytes from `offset` on; their crc32."""
        whole = view = out.reshape(-1).view(np.uint8).data
        position = self.tensors[name].position + offset
        while len(view):
            num_read = os.preadv(self._descriptor, [view], position)
            if num_read == 0:
                raise UserError("the file became shorter while it was read", where=str(self.path))
            view, position = view[num_read:], position + num_read
        crc = zlib.crc32(whole)
        self._sums[name].add(offset, len(whole), crc)
        return crc

    def verify(self) -> list[str]:
        """The tensors that were read, in part at least, and do not have their checksum.

        Those that were read once from end to end cost nothing more; the others are read again.
        """
        return [
            f"{name} has crc32 {got}, not {self._expected[name]}"
            for name in sorted(self._sums.keys() & self._expected.keys())
            if (got := f"{self._sum_of(name):08x}") != self._expected[name]
        ]

    def _sum_of(self, name: str) -> int:
        num_bytes = self.tensors[name].info.num_bytes
        whole = self._sums[name].whole(num_bytes)
        if whole is not None:
            return whole
        crc, block = 0, np.empty(BLOCK_BYTES, np.uint8)
        for start in range(0, num_bytes, BLOCK_BYTES):
            part = block[: min(BLOCK_BYTES, num_bytes - start)]
            self.read_into(name, start, part)
            crc = zlib.crc32(part.data, crc)
        return crc

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read_header(self) -> dict[str, StoredTensor]:
        start = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, self.num_bytes - 8):
            raise self._damaged("a header that fits the file", f"{self.num_bytes:,} bytes in all")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            entries = {name: value for name, value in header.items() if name != "__metadata__"}
            found = {
                name: StoredTensor(
                    TensorInfo(tuple(map(_size, value["shape"])), DTYPE_NAMES[value["dtype"]]),
                    8 + length + _span(value)[0],
                )
                for name, value in entries.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged("a safetensors header of known dtypes", f"{type(error).__name__}: {error}") from None
        end = 8 + length
        for name, stored in sorted(found.items(), key=lambda item: (item[1].position, item[0])):
            first, last = _span(entries[name])
            if stored.position != end or stored.info.num_bytes != last - first:
                raise self._damaged("tensors behind each other without holes", name)
            end += stored.info.num_bytes
        if end != self.num_bytes:
            raise self._damaged(f"{end:,} bytes", f"{self.num_bytes:,} bytes")
        return found

    def _damaged(self, expected: str, got: str) -> UserError:
        return UserError(
            "a safetensors file is damaged or truncated",
            where=str(self.path),
            expected=expected,
            got=got,
            fix="fetch the file again",
        )


def _size(value: Any) -> int:
    """A count of the header: a whole number, not negative, of a size that a file can have."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no size")
    return value


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    return _size(begin), _size(end)


@dataclass(frozen=True)
class FileLayout:
    """A file that is to be written: its header's bytes and where each tensor goes."""

    name: str
    header: bytes
    positions: dict[str, int]
    num_bytes: int


def lay_out_file(name: str, tensors: dict[str, tuple[tuple[int, ...], str]]) -> FileLayout:
    """The layout of a file of tensors (shape, dtype), in the order given."""
    offsets, end = {}, 0
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for key, (shape, dtype) in tensors.items():
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        entries[key] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        offsets[key] = end
        end += num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    header = len(text).to_bytes(8, "little") + text
    positions = {key: len(header) + offset for key, offset in offsets.items()}
    return FileLayout(name, header, positions, len(header) + end)
