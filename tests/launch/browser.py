"""Debian's chromium without a window, driven over its debugging pipe."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

BINARIES = ("chromium-headless-shell", "chromium")


class Browser:
    """One page. `run` evaluates JavaScript in it, `until` waits for some to be true."""

    def __init__(self, folder: Path) -> None:
        found = [path for name in BINARIES if (path := shutil.which(name))]
        assert found, f"no browser: apt-get install {BINARIES[0]} (.ci/setup does)"
        to_read, to_write = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        arguments = [found[0], *flags, f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
        # The pipe's ends are its file descriptors 3 and 4.
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
        actions = [
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_DUP2, (reading := fcntl.fcntl(to_write[0], fcntl.F_DUPFD, 10)), 3),  # not 3 or 4 themselves
            (os.POSIX_SPAWN_DUP2, (writing := fcntl.fcntl(to_read[1], fcntl.F_DUPFD, 10)), 4),
        ]
        self.pid = os.posix_spawn(found[0], arguments, os.environ, file_actions=actions, setpgroup=0)
        for end in (to_write[0], to_read[1], reading, writing, log):
            os.close(end)
        self._out, self._in = to_write[1], to_read[0]
        self._buffer, self._number, self._session = b"", 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, *, seconds: float = 60, **parameters: Any) -> Any:
        """The result of one command of the debugging protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            head, separator, rest = self._buffer.partition(b"\0")
            if separator:
                self._buffer = rest
                answer = json.loads(head)
                if answer.get("id") == self._number:
                    assert "error" not in answer, answer
                    return answer["result"]
                continue
            left = deadline - time.monotonic()
            assert left > 0, f"the browser does not answer {method}"
            assert select.select([self._in], [], [], left)[0], f"the browser does not answer {method}"
            self._buffer += os.read(self._in, 1 << 20)

    def open(self, address: str) -> None:
        self.ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.05)

    def close(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._out)
        os.close(self._in)
