"""Files that a page of the documentation shows: blocks whose first line names one, ```python my_lab/tasks.py."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

USERS_PACKAGE = "my_lab"  # in all pages
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


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """As a process of its own in this folder: it knows no package of another page's reader, and leaves none behind."""
    path = list(sys.path)
    sys.path[:] = [place for place in path if not (Path(place) / USERS_PACKAGE).is_dir()]
    forget_users_modules()
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path[:] = path
        forget_users_modules()


def forget_users_modules() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == USERS_PACKAGE]:
        del sys.modules[name]
