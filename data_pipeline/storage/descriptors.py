"""A bounded set of open files for readers of many shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from model.errors import UserError


class DescriptorCache:
    """Read-only file descriptors by path, opened on first use; the least recently used is closed beyond the limit.

    A descriptor is good until the next `get`. Not thread-safe.
    """

    def __init__(self, max_open: int = 128):
        assert max_open >= 1
        self.max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: str) -> int:
        """Raises `UserError` when the file is missing."""
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(
                "a file named by its manifest is missing",
                where=path,
                fix="restore it, or delete its .json and run the command that wrote it again",
            ) from None
        self._open[path] = descriptor
        if len(self._open) > self.max_open:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def read_exactly(descriptor: int, num_bytes: int, offset: int, path: str | Path, part: str = "") -> bytes:
    """`pread` until all bytes are there; raises `UserError` naming the file and `part` ("row 7") when it ends before."""
    content = os.pread(descriptor, num_bytes, offset)
    if len(content) == num_bytes:
        return content
    whole = bytearray(num_bytes)
    read_into(descriptor, memoryview(whole), offset, path, part)
    return bytes(whole)


def read_into(descriptor: int, target: memoryview, offset: int, path: str | Path, part: str = "") -> None:
    """Fill `target` (bytes), as `read_exactly` reads."""
    num_read = os.preadv(descriptor, (target,), offset)
    while num_read < len(target):
        more = os.preadv(descriptor, (target[num_read:],), offset + num_read)
        if not more:
            raise UserError(
                "a file is shorter than its index says",
                where=f"{path}, {part}" if part else str(path),
                expected=f"{len(target)} bytes",
                got=f"{num_read}",
                fix="delete its .json and run the command that wrote it again",
            )
        num_read += more
