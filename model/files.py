"""Files that appear whole or not at all: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY_MARK = ".tmp-"  # a temporary is `<final name>.tmp-<process id>`


def temporary_path(final: Path) -> Path:
    return final.with_name(f"{final.name}{TEMPORARY_MARK}{os.getpid()}")


def flush_to_disk(path: Path) -> None:
    """Of a file its content, of a folder its names (so that a rename in it is durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished temporary file the final one; once this returns it survives a power cut."""
    flush_to_disk(temporary)
    os.replace(temporary, final)
    flush_to_disk(final.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one. Raises OSError; the old file is then untouched."""
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
