"""A limit on what would take hours or for ever; it measures nothing."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class NoEndError(BaseException):
    """No error of a file or of a library: nothing catches it."""


@contextlib.contextmanager
def ends_within(seconds: int) -> Iterator[None]:
    """Raises `NoEndError` inside the block, in the main thread, also where a regular expression does not return."""

    def too_long(*_: object) -> None:
        raise NoEndError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
