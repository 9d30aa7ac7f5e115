"""Small text files from outside (configurations, indexes, tables), read with a limit and without surprises."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from model.errors import UserError

MAX_BYTES = 256 << 20  # an index of a million tensors has 100 MB


def open_regular(path: Path, what: str) -> int:
    """A descriptor of a regular file. A folder, a pipe, a device or a link to itself is a `UserError`, never a wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{what} cannot be read", where=str(path), got=str(error.strerror)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"{what} cannot be read", where=str(path), expected="a file", got=kind)
    return descriptor


def read_text(path: Path, what: str) -> str:
    with os.fdopen(open_regular(path, what), "rb") as file:
        try:
            content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise UserError(f"{what} is too large", where=str(path), expected=f"at most {MAX_BYTES:,} bytes")
            return content.decode()
        except OSError as error:
            raise UserError(f"{what} cannot be read", where=str(path), got=str(error.strerror)) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{what} is damaged", where=str(path), got=str(error)) from None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Anything else, and nesting without end, is a `UserError`."""
    try:
        values = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged", where=str(path), got=f"{type(error).__name__}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} is damaged", where=str(path), expected="an object", got=type(values).__name__)
    return values
