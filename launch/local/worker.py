"""One rank of a local run: `python -m launch.local.worker --task TASK --config FILE`, started by `launch/local/ranks.py`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import of_file_error
from model.errors import UserError, escapes_shown

REPORT_VARIABLE = "NEXTSTATE_REPORT_FILE"
PARENT_VARIABLE = "NEXTSTATE_PARENT_PIPE"
MEETING_PREFIX = "nextstate-ranks-"  # of the temporary folder of reports and rendezvous
ANSWER_NAME = "answer.json"  # rank 0's, in the folder of the reports


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a defect, 2 the user's mistake, 3 stopped after a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="train", choices=sorted(TASKS))
    parser.add_argument("--config", required=True, type=Path)
    options = parser.parse_args(arguments)
    with escapes_shown():
        return run(options.task, options.config)


def run(task: str, config: Path) -> int:
    end_with_parent()
    hear_signals()
    try:
        answer = TASKS[task](config)
        if os.environ["RANK"] == "0":
            folder = Path(os.environ[REPORT_VARIABLE]).parent
            (folder / ANSWER_NAME).write_text(json.dumps(answer), encoding="utf-8")
    except UserError as error:
        return report("user_error", str(error), 2)
    except Exception as error:  # the boundary of the process: told whole, with its rank
        told = of_file_error(error)
        return report("user_error", str(told), 2) if told else report("defect", traceback.format_exc(), 1)
    return 0


def train(config_path: Path) -> dict[str, Any]:
    from training.config import load_yaml
    from training.stage import run_stage

    return run_stage(load_yaml(config_path))


def score(config_path: Path) -> dict[str, Any] | None:
    from training.inference.scorer import score
    from training.inference.scoring import load_config

    return score(load_config(config_path))


TASKS = {"train": train, "score": score}


def report(kind: str, message: str, exit_code: int) -> int:
    """Leave the message for the launcher, which prints one of all ranks' messages."""
    entry = {"kind": kind, "message": message, "time": time.time()}
    Path(os.environ[REPORT_VARIABLE]).write_text(json.dumps(entry))
    return exit_code


def hear_signals() -> None:
    """Let the signals in that the launcher held back. Until training listens, a Ctrl-C ends without a traceback."""
    from training.reliability.signals import STOP_SIGNALS

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_parent() -> None:
    """End this process when the launcher is gone: its end of the pipe closes however it died.

    The temporary folder that the launcher can no longer remove goes too.
    """
    descriptor = int(os.environ[PARENT_VARIABLE])
    folder = Path(os.environ[REPORT_VARIABLE]).parent

    def wait_for_end() -> None:
        os.read(descriptor, 1)
        if folder.name.startswith(MEETING_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)  # without waiting for libraries' threads, which may hang after an error
