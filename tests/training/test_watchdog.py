"""The watchdog names the rank that hangs, and heartbeats are there to be read."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_stage import make_config, write_packed

from model.parallel import groups
from training.reliability import watchdog
from training.reliability.events import EventLog
from training.reliability.json_lines import read_json_lines
from training.reliability.watchdog import (
    LONGEST_TICK_SECONDS,
    Heartbeat,
    Watchdog,
    collective_timeout_seconds,
    rank_behind,
    read_heartbeats,
)

HERE = Path(__file__).resolve().parent


@pytest.fixture
def no_timer_of_the_process(monkeypatch):
    """The timer that needs no lock ends the process that it is in, which is the tests' own: a slow machine is enough."""
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)


def test_heartbeat_of_each_rank(tmp_path):
    for rank in range(2):
        heartbeat = Heartbeat(tmp_path, rank)
        heartbeat.enter("forward and backward", 3 + rank)
        heartbeat.write()
    beats = read_heartbeats(tmp_path, 2)
    assert [(beat["rank"], beat["step"]) for beat in beats] == [(0, 3), (1, 4)]
    assert all(beat["peak_memory_bytes"] > 1 << 20 for beat in beats)
    assert beats[0].keys() >= {"rank", "step", "phase", "time"}


@pytest.mark.usefixtures("no_timer_of_the_process")
def test_a_hang_is_named_and_every_rank_leaves_its_stacks(tmp_path, capfd):
    """Rank 1 waits for data for ever; rank 0 waits for rank 1."""
    ended = [threading.Event(), threading.Event()]
    beats = [Heartbeat(tmp_path, rank) for rank in range(2)]
    dogs = [
        Watchdog(
            beat, EventLog(tmp_path, beat.rank), 2, 0.4, end_process=lambda code, rank=beat.rank: ended[rank].set()
        )
        for beat in beats
    ]
    beats[0].enter("agree on stopping", 7)
    beats[1].enter("wait for data", 6)
    with dogs[0], dogs[1]:
        assert all(event.wait(300) for event in ended)
    for rank in range(2):
        assert "test_a_hang_is_named" in (tmp_path / f"stacks_rank_{rank}.txt").read_text()
    hang = read_json_lines(tmp_path / "events.jsonl")[0]
    assert (hang["event"], hang["rank_behind"], hang["phase_behind"]) == ("hang", 1, "wait for data")
    assert "rank behind all others is 1 in phase 'wait for data'" in capfd.readouterr().err
    json.dumps(hang)


@pytest.mark.usefixtures("no_timer_of_the_process")
def test_progress_keeps_it_quiet(tmp_path, monkeypatch):
    """Phases of 200 seconds under a limit of 300, by a clock of the test's own; then one of 400."""
    now, codes = 0.0, []
    clock = SimpleNamespace(monotonic=lambda: now, time=time.time, sleep=lambda seconds: None)
    monkeypatch.setattr(watchdog, "time", clock)
    beat = Heartbeat(tmp_path, 0)
    beat.is_starting = False
    dog = Watchdog(beat, EventLog(tmp_path, 0), 1, 300.0, end_process=codes.append)
    with dog, (tmp_path / "stacks").open("w") as stacks:
        for step in range(10):
            beat.enter("forward and backward", step)
            now += 200.0
            dog._check(stacks)
    assert codes == []
    assert not (tmp_path / "stacks_rank_0.txt").exists()
    assert read_heartbeats(tmp_path, 1)[0]["step"] == 9
    now += 200.0
    with (tmp_path / "stacks").open("w") as stacks:
        dog._check(stacks)
    assert codes == [1]


@pytest.mark.parametrize(
    ("where", "phase"), [("build", "build the engine and open the data"), ("steps", "forward and backward")]
)
def test_a_real_process_that_hangs_is_ended_and_named(tmp_path, where, phase):
    answer = subprocess.run(
        [sys.executable, HERE / "hang_host.py", tmp_path, where],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # most of it is the import of torch
    )
    assert answer.returncode == 1
    assert f"rank behind all others is 0 in phase '{phase}'" in answer.stderr
    assert "hang_host.py" in (tmp_path / "fake/stacks_rank_0.txt").read_text()
    hangs = [event for event in read_json_lines(tmp_path / "fake/events.jsonl") if event["event"] == "hang"]
    assert [hang["phase"] for hang in hangs] == [phase]


def beat(rank: int, step: int, phase: str, seconds_in_phase: float, written_at: float) -> dict:
    return {"rank": rank, "step": step, "phase": phase, "seconds_in_phase": seconds_in_phase, "time": written_at}


def test_the_rank_behind_may_be_one_that_writes_no_heartbeat():
    now = 1000.0
    waiting = beat(0, 3, "agree on stopping", 60.0, now - 1)
    stopped = beat(1, 3, "wait for data", 0.5, now - 62)  # its last sign of life; 62 seconds more have passed
    assert rank_behind([waiting, stopped], 2, 0.0, now) == (1, "wait for data")
    assert rank_behind([waiting], 2, 0.0, now) == (1, "not started")
    of_an_earlier_run = beat(1, 900, "close", 0.0, 10.0)
    assert rank_behind([waiting, of_an_earlier_run], 2, now - 500, now) == (1, "not started")
    ahead = beat(1, 4, "wait for data", 90.0, now)
    assert rank_behind([waiting, ahead], 2, 0.0, now) == (0, "agree on stopping")


def test_a_damaged_heartbeat_is_left_out(tmp_path):
    for rank in range(2):
        Heartbeat(tmp_path, rank).write()
    (tmp_path / "heartbeats/rank_00000.json").write_bytes(b"\x00\xff{")
    assert [beat["rank"] for beat in read_heartbeats(tmp_path, 2)] == [1]


@pytest.mark.parametrize("seconds", [1.0, 10.0, 600.0])
def test_the_watchdog_speaks_before_the_process_group(tmp_path, monkeypatch, seconds):
    """A collective must not give up while the watchdog still lets the other ranks write their stacks."""
    from training.engines.megatron.engine import MegatronEngine

    class AskedError(Exception):
        pass

    def initialize(**options):
        raise AskedError(options["timeout_seconds"])

    monkeypatch.setattr(groups, "initialize", initialize)
    config = make_config(tmp_path, tmp_path)
    config.reliability.hang_timeout_seconds = seconds
    with pytest.raises(AskedError) as asked:
        MegatronEngine(config)
    assert asked.value.args[0] == collective_timeout_seconds(seconds) > seconds + 3 * LONGEST_TICK_SECONDS


READ_THAT_HANGS = """
import sys, time
from data_pipeline.storage.packed_files import PackedDataset
from training.contracts.run_view import LoopState
from training.objectives.registry import make_objective
from training.config import load_yaml
PackedDataset.row_into = lambda self, row, tokens: time.sleep(900)

class Ranks:
    rank, world_size, data_parallel_rank, data_parallel_size = 0, 1, 0, 1

    def gather(self, payload):
        return [payload]

batches = make_objective(load_yaml(sys.argv[1])).batches(Ranks())
assert list(batches.next(LoopState(), None, lambda: True)) == []
batches.close()
print("closed", time.time())
"""


def test_a_process_that_was_told_to_stop_waits_for_no_read(tmp_path):
    """A file system that no longer answers: the run has saved, and must end."""
    from training.config import save_yaml

    save_yaml(make_config(tmp_path, write_packed(tmp_path)), tmp_path / "config.yaml")
    answer = subprocess.run(
        [sys.executable, "-c", READ_THAT_HANGS, tmp_path / "config.yaml"],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent.parent}"},
        capture_output=True,
        text=True,
        timeout=300,  # most of it is the import of torch
    )
    assert answer.returncode == 0, answer.stderr
    assert time.time() - float(answer.stdout.split()[1]) < 30
