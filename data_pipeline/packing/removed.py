"""Tombstones: documents that must not be packed, listed one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.documents.builder import document_id
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.errors import UserError

FORMS = '{"document": 8405…}, as `nextstate inspect` shows it, or {"source": "photos", "shard": "000000.tar", "key": "0001"}'


def read_removed(path: str | Path) -> frozenset[int]:
    """The ids of the documents that the file lists. Other keys of a line are passed over, and so are empty lines.

    Raises `UserError` for a missing file and for a line that names no document.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("the list of removed documents does not exist", where=str(path), expected=f"lines like {FORMS}")
    ids = set()
    with file_errors_are_user_errors(path):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                ids.add(_id_in(line, f"{path}:{number}"))
    return frozenset(ids)


def _id_in(line: bytes, where: str) -> int:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict):
        identity = entry.get("document")
        if isinstance(identity, int) and 0 <= identity < 1 << 64:
            return identity
        names = [name for name in map(entry.get, ("source", "key", "shard")) if isinstance(name, str)]
        if identity is None and len(names) == 3:
            return document_id(*names)
    raise UserError("a line names no document", where=where, expected=FORMS, got=line.decode("utf-8", "replace")[:200])
