"""Signals that ask the run to stop after a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP: the terminal is gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


COMMAND_VARIABLE = "NEXTSTATE_COMMAND"  # what the user typed, in words of a shell


def heard_signals() -> list[signal.Signals]:
    """The signals to listen to here: `nohup` asks that SIGHUP goes unheard."""
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (is_deaf and number == signal.SIGHUP)]


HEARD = "\nnextstate: {}: stopping after this step, with a checkpoint; Ctrl-C once more ends at once, without one\n"


class StopSignals:
    """Remembers that SIGTERM, SIGUSR1, SIGINT or SIGHUP came; the loop asks `received` and stops at a safe point.

    The handler only notes the name, so it may run at any moment: while waiting for data, between micro-batches, in
    the middle of a checkpoint. After the first SIGINT the next one has its ordinary effect: it ends at once.
    Outside the main thread, where Python takes no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in heard_signals():
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first = self.received is None
        self.received = self.received or signal.Signals(number).name
        if is_first:
            with contextlib.suppress(OSError):  # the terminal may be gone; print() might be in the middle of a line
                os.write(2, HEARD.format(self.received).encode())
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
