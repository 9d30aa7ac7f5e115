"""A fake stage in a process of its own that hangs: `python hang_host.py RUN_FOLDER build|steps`."""

from __future__ import annotations

import sys
import threading

from fake_objective import FakeEngine, fake_config

from training import stage


def hang(*arguments: object) -> None:
    threading.Event().wait()


def main(run_folder: str, where: str) -> None:
    config = fake_config(run_folder)
    config.reliability.hang_timeout_seconds = 1.0
    if where == "build":
        FakeEngine.of = hang  # type: ignore[method-assign, assignment]
    else:
        FakeEngine.forward_backward = hang  # type: ignore[method-assign, assignment]
    stage.run_stage(config)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
