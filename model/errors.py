"""Errors that are the user's to mend, the collector that gathers all of them, and how text reaches the terminal."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

# Control characters but tab and line feed (ESC starts a command to the terminal, U+009B does in one character), line and
# paragraph separators, marks that turn the direction of what follows, and halves of surrogate pairs, which file names
# that are not UTF-8 have and no stream can write.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake in configuration or input: the command prints it without a traceback and exits 2.

    The message says what is wrong, where, what was expected and what was found, and how to mend it.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", fix: str = ""):
        parts = [what]
        for label, text in (("where", where), ("expected", expected), ("got", got), ("fix", fix)):
            if text:
                parts.append(f"  {label + ':':<10}{text}")
        super().__init__("\n".join(parts))
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix


@dataclass
class Problems:
    """Collects every problem of a configuration before anything starts.

    `add` takes the dotted key, what is wrong with it and the override that mends it; `raise_if_any` raises one
    `UserError` that lists them all.
    """

    found: list[str] = field(default_factory=list)

    def add(self, key: str, message: str, fix: str = "") -> None:
        self.found.append(f"{key}: {message}" + (f" (fix: {fix})" if fix else ""))

    def check(self, holds: bool, key: str, message: str, fix: str = "") -> None:
        if not holds:
            self.add(key, message, fix)

    def raise_if_any(self) -> None:
        if self.found:
            count = len(self.found)
            noun = "problem" if count == 1 else "problems"
            lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(self.found, 1))
            raise UserError(f"the configuration has {count} {noun}:\n{lines}")


def visible(text: str) -> str:
    r"""`text` with `\u001b` for an escape and so on, as JSON writes it: an answer in JSON stays what it was."""
    return STEERING.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


class VisibleStream:
    """A text stream that writes `visible` text; all else is the stream's own.

    A carriage return at the start of what is written stays: a line of progress goes over the one before.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""
        self._stream.write(start + visible(text[len(start) :]))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escapes_shown() -> Iterator[None]:
    """While the block runs, nothing that Python prints steers the terminal; nor does a traceback that ends the process."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = VisibleStream(sys.stdout), VisibleStream(sys.stderr)
    sys.excepthook = _print_visibly
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept


def _print_visibly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Stays behind: the interpreter calls it when an exception has left the block."""
    lines = traceback.format_exception(kind, error, trace)
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        sys.stderr.write(visible("".join(lines)))
