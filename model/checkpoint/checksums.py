"""crc32 of a concatenation from the crc32 of its parts, so that blocks in any order make a file's checksum.

crc32 because it is the fastest that Python has (here four times as fast as blake2b) and because parts can be joined.
"""

from __future__ import annotations

import json
import threading
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from model.durable import crc32_of

BLOCK_BYTES = 1 << 22
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the format's own limit
_POLYNOMIAL = 0xEDB88320  # of crc32, lowest power in the highest bit
_ONE = 1 << 31


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo the crc's polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x to the power of 8 * num_bytes: what appending that many bytes multiplies a crc by."""
    result, power, exponent = _ONE, _ONE >> 1, 8 * num_bytes
    while exponent:
        if exponent & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        exponent >>= 1
    return result


def join_crc32(first: int, second: int, second_bytes: int) -> int:
    """crc32 of A + B from those of A and of B."""
    return _multiply(_shift(second_bytes), first) ^ second if second_bytes else first


class PartSums:
    """The crc32 of the parts of one tensor, noted as they are read in any order from any thread."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, int]] = {}  # first byte -> (bytes, crc32)
        self._lock = threading.Lock()

    def add(self, start: int, num_bytes: int, crc: int) -> None:
        with self._lock:
            self._parts[start] = (num_bytes, crc)

    def whole(self, num_bytes: int) -> int | None:
        """crc32 of bytes [0, num_bytes); None where the parts do not follow each other from end to end."""
        end, total = 0, 0
        for start, (length, crc) in sorted(self._parts.items()):
            if start != end:
                return None
            total, end = join_crc32(total, crc, length), end + length
        return total if end == num_bytes else None


@dataclass(frozen=True)
class FileSums:
    """crc32 of a safetensors file, of its header (with the eight bytes of its length), and of each tensor."""

    file: int
    header: int
    tensors: dict[str, int]


def safetensors_sums(path: Path) -> FileSums:
    """All checksums of a well-formed safetensors file in one pass over it, in blocks."""
    with open(path, "rb") as file:
        start = file.read(8)
        text = file.read(int.from_bytes(start, "little"))
        header = total = zlib.crc32(start + text)
        spans = {name: entry["data_offsets"] for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = {}
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            tensors[name] = _sum_of(file, end - begin)
            total = join_crc32(total, tensors[name], end - begin)
    return FileSums(total, header, tensors)


def header_sum(path: Path) -> str:
    """crc32 (hexadecimal) of a safetensors file's header, with the eight bytes of its length."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        return f"{zlib.crc32(start + file.read(min(length, MAX_HEADER_BYTES))):08x}"


def size_damage(path: Path, num_bytes: int) -> str:
    """What is wrong with a file that should have so many bytes, or ""."""
    if not path.is_file():
        return "it is missing"
    found = path.stat().st_size
    return "" if found == num_bytes else f"{found:,} bytes instead of {num_bytes:,}"


def file_damage(path: Path, recorded: dict[str, Any] | None) -> str:
    """What is wrong with a file of a checkpoint before its tensors are looked at, or "".

    `recorded` is the manifest's entry of it. Size and header are cheap; a file without `header_crc32` is from before
    pieces had checksums and is read whole. Raises OSError.
    """
    if recorded is None:
        return "the manifest does not list it"
    damage = size_damage(path, recorded["bytes"])
    if damage:
        return damage
    if "header_crc32" not in recorded:
        return "" if crc32_of(path) == recorded["crc32"] else "it does not have its checksum"
    return "" if header_sum(path) == recorded["header_crc32"] else "its header does not have its checksum"


def _sum_of(file: BinaryIO, num_bytes: int) -> int:
    value = 0
    while num_bytes:
        block = file.read(min(BLOCK_BYTES, num_bytes))
        if not block:
            break
        value = zlib.crc32(block, value)
        num_bytes -= len(block)
    return value
