"""JSON and other small files that appear whole or not at all, with errors a user can act on.

A process that dies leaves its temporaries (`model.files`) behind; the next writer of the same files removes them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.files import TEMPORARY_MARK, replace_file

# The disk is full, the user's quota is, or the file would pass the limit on file sizes.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Raises `UserError` when the folder has no room; the previous file, if any, is then untouched."""
    with no_space_is_a_user_error(path.parent, len(content)):
        replace_file(path, content)


def encode_json(value: Any) -> bytes:
    """The same value always gives the same bytes (keys are sorted)."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def atomic_write_json(path: Path, value: Any) -> None:
    atomic_write_bytes(path, encode_json(value))


def read_json(path: Path) -> Any:
    """Raises `UserError` when the file is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("a file is missing", where=str(path), fix="run the command that writes it again") from None
    except ValueError as error:
        raise UserError(
            "a file is not valid JSON",
            where=str(path),
            got=str(error),
            fix="delete it and run the command that writes it again",
        ) from None


@contextmanager
def no_space_is_a_user_error(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk, quota or file-size limit into a `UserError` naming the folder and the bytes needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"cannot write: {os.strerror(error.errno)}",
            where=str(folder),
            expected=f"room for {needed_bytes:,} bytes",
            got=f"{shutil.disk_usage(folder).free:,} bytes free",
            fix="free space there (or raise the limit) and run the same command again: finished files are kept",
        ) from error


def remove_stale_temporaries(folder: Path, name_prefix: str) -> int:
    """Remove what dead processes of this host left behind; returns the number of files removed.

    Only files whose name starts with `name_prefix`: others may belong to a live process of another host.
    """
    num_removed = 0
    for path in sorted(folder.glob(f"{name_prefix}*{TEMPORARY_MARK}*")):
        process_id = path.name.rpartition(TEMPORARY_MARK)[2]
        if process_id.isdigit() and not _is_another_live_process(int(process_id)):
            path.unlink(missing_ok=True)
            num_removed += 1
    return num_removed


def _is_another_live_process(process_id: int) -> bool:
    if process_id == os.getpid():
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
