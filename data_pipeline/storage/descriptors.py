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
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path) -> int:
        """Raises `UserError` when the file is missing."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(
                "a file named by its manifest is missing",
                where=str(path),
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


def read_exactly(descriptor: int, num_bytes: int, offset: int, path: Path, part: str = "") -> bytes:
    """`pread` until all bytes are there; raises `UserError` naming the file and `part` ("row 7") when it ends before."""
    content = os.pread(descriptor, num_bytes, offset)
    while len(content) < num_bytes:
        more = os.pread(descriptor, num_bytes - len(content), offset + len(content))
        if not more:
            raise UserError(
                "a file is shorter than its index says",
                where=f"{path}, {part}" if part else str(path),
                expected=f"{num_bytes} bytes",
                got=f"{len(content)}",
                fix="delete its .json and run the command that wrote it again",
            )
        content += more
    return content
