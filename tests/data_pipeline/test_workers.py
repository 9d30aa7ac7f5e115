"""Workers that are killed, and parents that are: nothing hangs, nothing is lost, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.executor import ShardJob, run_tasks
from launch.commands.tokenize import is_poisonous, note_poison
from model.errors import UserError

PATIENCE_SECONDS = 60.0  # on a loaded machine


def copy_and_die(jobs: object) -> None:
    """Copies; over a shard named "unlucky" the first worker that comes dies, over "deadly" every one."""
    for job in jobs:  # type: ignore[attr-defined]
        if job.prefix.exists():
            continue
        mark = job.prefix.with_name(f"{job.prefix.name}.died")
        if job.shard.name == "deadly" or (job.shard.name == "unlucky" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        job.prefix.write_bytes(job.shard.read_bytes())


def make_jobs(folder: Path, names: list[str]) -> list[ShardJob]:
    (folder / "out").mkdir()
    for name in names:
        (folder / name).write_text(name)
    return [ShardJob(folder / name, folder / "out" / name) for name in names]


@pytest.mark.parametrize("executor", ["local", "datatrove"])
def test_a_killed_workers_shards_are_done_again(tmp_path: Path, executor: str) -> None:
    names = ["a", "unlucky", "b", "c"]
    jobs = make_jobs(tmp_path, names)
    run_tasks(copy_and_die, [jobs[:3], jobs[3:]], workers=2, executor=executor, log_folder=tmp_path / "logs")
    assert {job.shard.name: job.prefix.read_text() for job in jobs} == {name: name for name in names}
    assert (tmp_path / "out" / "unlucky.died").exists()


def test_a_shard_that_kills_every_worker_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, ["deadly", "a", "b"])
    given_up = run_tasks(copy_and_die, [jobs[:2], jobs[2:]], workers=2, executor="local", log_folder=tmp_path / "logs")
    assert given_up == [(jobs[0], "signal 9")]
    assert [job.prefix.exists() for job in jobs] == [False, True, True]
    for _ in range(2):  # told once, then passed over until it is another shard
        assert not is_poisonous(jobs[0])
        with pytest.raises(UserError, match=r"3 worker processes died[\s\S]*deadly[\s\S]*signal 9[\s\S]*repair"):
            note_poison(given_up)
        assert is_poisonous(jobs[0])
        jobs[0].shard.write_text(jobs[0].shard.read_text() + "!")


PARENT = """
import ctypes, os, sys, time
from pathlib import Path

from data_pipeline.workers import run_supervised

FOLDER = Path(sys.argv[1])


def work(task):
    (FOLDER / f"{task[0]}.{os.getpid()}").touch()
    if task[0]:
        time.sleep(600)
    ctypes.PyDLL(None).sleep(600)  # holds the interpreter, as a decoder of a library may: no thread of ours runs


if __name__ == "__main__":
    run_supervised(work, [[0], [1]], 2)
"""


def wait_until(condition: object) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def is_running(process_id: int) -> bool:
    """A zombie whose parent is gone does not count: pid 1 here may not reap."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    marks = tmp_path / "marks"
    marks.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(marks)], env=environment)
    try:
        assert wait_until(lambda: len(list(marks.iterdir())) == 2)
        workers = [int(mark.suffix[1:]) for mark in marks.iterdir()]
        assert all(map(is_running, workers))
        parent.send_signal(number)
        assert parent.wait(PATIENCE_SECONDS) == -number
        assert wait_until(lambda: not any(map(is_running, workers)))
    finally:
        parent.kill()


def fail_or_wait(jobs: object) -> None:
    for job in jobs:  # type: ignore[attr-defined]
        if job.shard.name == "bad":
            raise ZeroDivisionError("of a worker")
        time.sleep(600)


def test_the_first_error_ends_the_others(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, ["bad", "slow"])
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="ZeroDivisionError: of a worker"):
        run_tasks(fail_or_wait, [[job] for job in jobs], workers=2, executor="local", log_folder=tmp_path / "logs")
    assert time.monotonic() - started < 300
