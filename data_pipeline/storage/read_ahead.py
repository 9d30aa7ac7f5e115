"""Background threads that read, and that a process need not wait for when it ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

Item = TypeVar("Item")


class Readers:
    """Runs calls in daemon threads, in the order in which they were submitted.

    `concurrent.futures` joins its threads when the interpreter ends: a read that hangs in a dead file system would keep
    a run that was told to stop, and has saved, from ending.
    """

    def __init__(self, num_threads: int, name: str):
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}_{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Wait for the threads to end: for all calls that were submitted and not cancelled."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # raised in the caller, by `Future.result`
                future.set_exception(error)


def one_ahead(items: Generator[Item, None, None], name: str) -> Generator[Item, None, None]:
    """The same items in order, each made in a thread while the one before is used: never more than one is waiting.

    What `items` raises is raised here. When this is closed, the item that is being made is waited for, and `items` is closed.
    """
    nothing = object()
    thread = Readers(1, name)
    coming: Future[Any] = thread.submit(next, items, nothing)
    try:
        while (item := coming.result()) is not nothing:
            coming = thread.submit(next, items, nothing)
            yield item
    finally:
        coming.cancel()
        thread.close()
        items.close()
