"""How far a conversion is, on stderr."""

from __future__ import annotations

import sys
import threading
import time

PROGRESS_SECONDS = 2.0


class Progress:
    """Bytes done, bytes a second and the time left, on stderr now and then."""

    def __init__(self, label: str, total_bytes: int, num_bytes: int):
        self.label, self.total_bytes, self.num_bytes = label, total_bytes, num_bytes
        self._first_bytes, self._started = num_bytes, time.monotonic()
        self._shown, self._lock = self._started, threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            if time.monotonic() - self._shown >= PROGRESS_SECONDS:
                self._shown = time.monotonic()
                self._show()

    def finish(self) -> None:
        if time.monotonic() - self._started >= PROGRESS_SECONDS:
            self._show()

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.num_bytes - self._first_bytes) / seconds
        left = (self.total_bytes - self.num_bytes) / rate if rate else float("inf")
        share = self.num_bytes / self.total_bytes if self.total_bytes else 1.0
        print(
            f"{self.label}: {share:6.1%} of {self.total_bytes / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, "
            f"{left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )
