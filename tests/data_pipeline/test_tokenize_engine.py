"""The engine: tasks by a hash of the name, executors. Imports little: worker processes import this module."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline import executor as engine
from data_pipeline.executor import ShardJob, choose_executor, group_jobs, run_tasks, task_of
from model.errors import UserError


def test_a_shards_task_depends_on_its_name_only() -> None:
    jobs = [ShardJob(Path(f"in/{number:06d}.tar"), Path(f"out/{number:06d}")) for number in range(64)]
    groups = group_jobs(jobs, 8)
    assert sorted(job.shard.name for group in groups for job in group) == [job.shard.name for job in jobs]
    fewer = group_jobs(jobs[:32], 8)
    assert all(set(small) <= set(large) for small, large in zip(fewer, groups, strict=True))
    assert max(map(len, groups)) < 20
    assert task_of("000000.tar", 8) == task_of("000000.tar", 8)


def copy_jobs(jobs: object) -> None:
    for job in jobs:  # type: ignore[attr-defined]
        if job.shard.name == "bad":
            raise UserError("a bad shard", where=str(job.shard))
        shutil.copy(job.shard, job.prefix)


@pytest.mark.parametrize(("executor", "workers"), [("local", 1), ("local", 2), ("datatrove", 1), ("datatrove", 2)])
def test_executors_run_every_task_and_pass_errors_on(
    tmp_path: Path, executor: str, workers: int, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    jobs = []
    for number in range(5):
        (tmp_path / f"{number}").write_text(str(number))
        jobs.append(ShardJob(tmp_path / f"{number}", tmp_path / "out" / f"{number}"))
    options = {"workers": workers, "executor": executor, "log_folder": tmp_path / "logs"}
    run_tasks(copy_jobs, group_jobs(jobs, 4), **options)  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1", "2", "3", "4"]
    (tmp_path / "bad").write_text("")
    bad = [[ShardJob(tmp_path / "bad", tmp_path / "out" / "bad")]]
    with pytest.raises(UserError, match="a bad shard"):
        run_tasks(copy_jobs, bad, **options)  # type: ignore[arg-type]
    assert "a bad shard" not in capfd.readouterr().err  # it is the command that tells it


def test_the_executor_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_executor("auto", 1) == "local"
    assert choose_executor("auto", 2) == "datatrove"
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert choose_executor("auto", 2) == "local"
    with pytest.raises(UserError, match="datatrove"):
        choose_executor("datatrove", 2)
