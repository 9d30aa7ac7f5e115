"""Batches of data that lie on a disk: a pure function of the number of samples consumed, read in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from training.contracts.batches import Policy
from training.contracts.run_view import LoopState

SECONDS_BETWEEN_LOOKS = 0.2  # how soon a signal is heard while waiting for data
SECONDS_TO_CLOSE = 5.0


class Rows(Protocol):
    """What is read, e.g. a `data_pipeline.loading.loader.PackedDataSource`."""

    fingerprint: str

    def batch(self, first_sample: int) -> Sequence[Any]:
        """The micro-batches of this data-parallel rank for the global batch that starts at `first_sample`."""
        ...

    def close(self) -> None: ...


class OfflineRows:
    """A `training.contracts.batches.BatchSource` that keeps nothing of its own: the sample to go on with is the loop's.

    Reading happens in a thread, so that the main thread hears signals while the data keep it waiting.
    """

    def __init__(self, rows: Rows):
        self.rows, self.fingerprint = rows, rows.fingerprint
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="batches", daemon=True)
        self._thread.start()

    def next(self, state: LoopState, policy: Policy, interrupted: Callable[[], bool]) -> Sequence[Any]:
        """The batch that starts at `state.next_sample`; empty when interrupted before it came."""
        self._requests.put(state.next_sample)
        while True:
            try:
                batch, error = self._answers.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if interrupted():
                    return ()
                continue
            if error is not None:
                raise error
            result: Sequence[Any] = batch
            return result

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to load: a batch is a function of `LoopState.next_sample`."""

    def close(self) -> None:
        """The thread closes the rows; one that still waits for a disk is left behind."""
        self._requests.put(None)
        self._thread.join(SECONDS_TO_CLOSE)

    def _serve(self) -> None:
        while (first_sample := self._requests.get()) is not None:
            try:
                self._answers.put((self.rows.batch(first_sample), None))
            except BaseException as error:  # handed to the main thread, which raises it
                self._answers.put((None, error))
        self.rows.close()
