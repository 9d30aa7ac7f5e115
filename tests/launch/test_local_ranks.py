"""Starting ranks as processes: whose failure is told, which exit code, and nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.composition.compose import compose_config
from launch.local import ranks
from launch.local.ranks import Worker, judge_exits, meeting_folder, run_local
from launch.local.worker import MEETING_PREFIX, PARENT_VARIABLE, REPORT_VARIABLE
from model.errors import UserError
from training import stage
from training.config import TrainConfig
from training.stage import StoppedEarly

REPOSITORY = Path(__file__).resolve().parents[2]


def workers_with(folder: Path, *reports) -> list[Worker]:
    workers = []
    for rank, report in enumerate(reports):
        path = folder / f"report_{rank}.json"
        if report:
            path.write_text(json.dumps(report))
        workers.append(Worker(rank, SimpleNamespace(), folder / "log", path))  # type: ignore[arg-type]
    return workers


def defect(message: str, time: float) -> dict:
    return {"kind": "defect", "message": message, "time": time}


def test_all_well(tmp_path):
    judge_exits(workers_with(tmp_path, None, None), [0, 0], set())


def test_the_users_mistake_comes_before_what_it_caused(tmp_path):
    mistake = {"kind": "user_error", "message": "no such data", "time": 5.0}
    workers = workers_with(tmp_path, defect("connection closed", 4.0), mistake)
    with pytest.raises(UserError, match="no such data"):
        judge_exits(workers, [1, 2], set())


def test_stopping_passes_through(tmp_path):
    with pytest.raises(StoppedEarly) as stopped:
        judge_exits(workers_with(tmp_path, None, None), [3, 3], {signal.SIGTERM})
    assert stopped.value.code == 3
    with pytest.raises(StoppedEarly):  # the signal came before the handlers were there
        judge_exits(workers_with(tmp_path, None, None), [-15, -9], {signal.SIGTERM})


def test_the_first_defect_is_told(tmp_path, capsys):
    workers = workers_with(tmp_path, defect("connection closed", 9.0), defect("the cause", 8.0))
    with pytest.raises(SystemExit) as ended:
        judge_exits(workers, [1, 1], set())
    assert ended.value.code == 1
    assert capsys.readouterr().err == "rank 1 failed:\nthe cause\n"


def test_a_killed_rank_is_the_cause_of_the_others_complaints(tmp_path, capsys):
    workers = workers_with(tmp_path, defect("connection closed", 9.0), None, None)
    workers[2].was_killed = True
    with pytest.raises(SystemExit):
        judge_exits(workers, [1, -9, -9], set())
    told = capsys.readouterr().err
    assert told.startswith("rank 1: ended by SIGKILL")
    assert "rank 2" not in told


def test_no_rank_starts_beside_a_run_that_holds_the_stage(tmp_path, monkeypatch):
    """A second run's ranks would write their heartbeats and events over those of the first."""
    config = TrainConfig(run_folder=str(tmp_path))
    config.parallel.data = 2
    monkeypatch.setattr(stage, "LOCK_PATIENCE_SECONDS", 0.1)
    config.stage_folder.mkdir(parents=True)
    with stage.lock_stage(config.stage_folder):
        before = sorted(config.stage_folder.iterdir())
        with pytest.raises(UserError, match="another run is working on this stage") as refused:
            run_local(config)
        assert f"process {os.getpid()}" in refused.value.got
        assert sorted(config.stage_folder.iterdir()) == before
    stage.refuse_taken(config.stage_folder)  # nobody holds it any more


def test_a_mistake_of_two_ranks_is_raised_once(tmp_path, capfd):
    """Real processes; both find the unknown option."""
    config = TrainConfig(run_folder=str(tmp_path))
    config.stage.objective = {"name": "vision_tokenizer", "colour": "blue"}
    config.parallel.data = 2
    with pytest.raises(UserError, match="colour"):
        run_local(config)
    output = capfd.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


def test_the_command_validates_before_it_starts_anything(tmp_path):
    with pytest.raises(UserError, match=r"stage\.steps"):
        compose_config("train", [f"run_folder={tmp_path}/run", "stage.steps=0"])
    assert not (tmp_path / "run").exists()


HANGS = """
import sys, time
from launch.local import worker
worker.TASKS["train"] = lambda config: time.sleep(600)
sys.exit(worker.main())
"""


def start_worker(folder: Path, parent: int) -> subprocess.Popen:
    """A rank whose task never ends."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        PARENT_VARIABLE: str(parent),
        REPORT_VARIABLE: str(folder / "report.json"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", HANGS, "--config", folder / "config.yaml"],
        env=environment,
        pass_fds=(parent,),
        stderr=subprocess.PIPE,
    )


def test_a_worker_ends_with_its_parent_and_removes_their_folder(tmp_path):
    """The other end of the pipe is closed, as by a kill -9."""
    folder = tmp_path / f"{MEETING_PREFIX}x"
    folder.mkdir()
    read_end, write_end = os.pipe()
    process = start_worker(folder, read_end)
    os.close(read_end)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    os.close(write_end)
    assert process.wait(30) == 1
    assert not folder.exists()
    assert tmp_path.exists()


def test_a_ctrl_c_during_the_start_of_a_rank_prints_no_traceback(tmp_path):
    """The launcher starts ranks with their signals held back: not even Python's own start can be hit."""
    read_end, write_end = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process = start_worker(tmp_path, read_end)
        process.send_signal(signal.SIGINT)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, told = process.communicate(timeout=60)
    os.close(read_end)
    os.close(write_end)
    assert process.returncode == -signal.SIGINT
    assert told == b""


def test_meeting_folders_go_with_their_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ranks, "SECONDS_TO_LOCK", -1.0)
    killed = tmp_path / f"{MEETING_PREFIX}killed"
    killed.mkdir()
    (killed / ranks.LAUNCHER_LOCK).touch()
    with meeting_folder() as one, meeting_folder() as other:
        assert one.exists()
        assert other.exists()
        assert not killed.exists()
    assert list(tmp_path.iterdir()) == []
