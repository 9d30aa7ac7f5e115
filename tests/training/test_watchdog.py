"""The watchdog names the rank that hangs, and heartbeats are there to be read."""

from __future__ import annotations

import json
import threading

from training.reliability.events import EventLog
from training.reliability.json_lines import read_json_lines
from training.reliability.watchdog import Heartbeat, Watchdog, read_heartbeats


def test_heartbeat_of_each_rank(tmp_path):
    for rank in range(2):
        heartbeat = Heartbeat(tmp_path, rank)
        heartbeat.enter("forward and backward", 3 + rank)
        heartbeat.write()
    beats = read_heartbeats(tmp_path, 2)
    assert [(beat["rank"], beat["step"]) for beat in beats] == [(0, 3), (1, 4)]
    assert all(beat["peak_memory_bytes"] > 1 << 20 for beat in beats)
    assert beats[0].keys() >= {"rank", "step", "phase", "time"}


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
        assert all(event.wait(30) for event in ended)
    for rank in range(2):
        assert "test_a_hang_is_named" in (tmp_path / f"stacks_rank_{rank}.txt").read_text()
    hang = read_json_lines(tmp_path / "events.jsonl")[0]
    assert (hang["event"], hang["rank_behind"], hang["phase_behind"]) == ("hang", 1, "wait for data")
    assert "rank behind all others is 1 in phase 'wait for data'" in capfd.readouterr().err
    json.dumps(hang)


def test_progress_keeps_it_quiet(tmp_path):
    ended = threading.Event()
    beat = Heartbeat(tmp_path, 0)
    with Watchdog(beat, EventLog(tmp_path, 0), 1, 2.0, end_process=lambda code: ended.set()) as dog:
        for step in range(10):
            beat.enter("forward and backward", step)
            dog._closed.wait(0.05)
    assert not ended.is_set()
    assert not (tmp_path / "stacks_rank_0.txt").exists()
    assert read_heartbeats(tmp_path, 1)[0]["step"] == 9
