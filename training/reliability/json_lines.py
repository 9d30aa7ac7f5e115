"""Append-only logs that survive a full disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """An append-only file of one JSON object a line, each handed to the system at once.

    A line that could not be written whole (full disk) is cut away before the next one, so the file stays valid.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the object)
        self.num_bytes = self._file.seek(0, os.SEEK_END)
        self._cut_unfinished_line()

    def append(self, record: dict[str, Any]) -> None:
        """Raises OSError when the line could not be written."""
        line = json.dumps(record, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        if os.fstat(self._file.fileno()).st_size > self.num_bytes:
            self.truncate(self.num_bytes)
        num_written = self._file.write(line)
        if num_written != len(line):
            raise OSError(f"only {num_written} of {len(line)} bytes could be written to {self.path}")
        self.num_bytes += len(line)

    def _cut_unfinished_line(self) -> None:
        """A kill in the middle of a write leaves half a line."""
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self.truncate(content.rfind(b"\n") + 1)

    def truncate(self, num_bytes: int) -> None:
        self._file.truncate(num_bytes)
        self.num_bytes = num_bytes

    def close(self) -> None:
        self._file.close()


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None where the line is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; damaged ones, and a last one cut short by a kill, are left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [value for line in lines if (value := parse_line(line)) is not None]
