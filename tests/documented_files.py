"""Files that a page of the documentation shows: blocks whose first line names one, ```python my_lab/tasks.py."""

from __future__ import annotations

import re
from pathlib import Path

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown_files(text: str) -> dict[str, str]:
    """Content by relative path."""
    return {marks.strip(): body for _, marks, body in FENCE.findall(text) if "/" in marks}


def write_shown_files(page: Path, folder: Path) -> list[Path]:
    """The page's files below `folder`; what it tells the reader to have, and nothing else."""
    written = []
    for name, content in shown_files(page.read_text(encoding="utf-8")).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        written.append(path)
    return written
