"""Small files of the data pipeline: the same values give the same bytes, and a full folder is told.

A process that dies leaves its temporaries (`model.durable`) behind; the next writer of the same files removes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from model.durable import TEMPORARY_MARK, replace_file, told_no_space


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Raises `UserError` when the folder has no room; the previous file, if any, is then untouched."""
    with told_no_space(path.parent, len(content)):
        replace_file(path, content)


def encode_json(value: Any) -> bytes:
    """The same value always gives the same bytes (keys are sorted)."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def atomic_write_json(path: Path, value: Any) -> None:
    atomic_write_bytes(path, encode_json(value))


def remove_stale_temporaries(folder: Path, name_prefix: str) -> int:
    """Remove what dead processes of this host left behind; returns the number of files removed.

    Only files whose name starts with `name_prefix`: others may belong to a live process of another host.
    """
    num_removed = 0
    # Every writer looks here, in folders of any size: names first, and no path but of what is to go.
    for name in [name for name in os.listdir(folder) if TEMPORARY_MARK in name and name.startswith(name_prefix)]:
        process_id = name.rpartition(TEMPORARY_MARK)[2]
        if process_id.isdigit() and not _is_another_live_process(int(process_id)):
            (folder / name).unlink(missing_ok=True)
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
