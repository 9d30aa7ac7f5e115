"""Submission to a real Slurm: what is refused, what is recovered, and what is never submitted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from slurm_runs import SEARCH_PATH, fake_submission, log_of, use_test_cluster

from launch.cluster import snapshot
from launch.cluster.job_folders import JobFolder
from launch.command_line import cli
from launch.commands import curriculum, submit
from launch.curriculum.entries import CurriculumConfig, EntryConfig
from launch.doctor import cluster as doctor_cluster
from model.errors import UserError

# A snippet that a chain's entries run: writes its file, unless the file FAIL stands beside it.
STEP = """
import pathlib, sys
target = pathlib.Path(sys.argv[1])
sys.exit(7) if (target.parent / "FAIL").exists() else target.write_text("made")
"""
LATER = {"begin": "now+1hour"}  # the job stays in the queue


def waiting(run_folder: Path) -> submit.Config:
    config = fake_submission(run_folder)
    config.cluster.options = dict(LATER)
    return config


def jobs_in_queue(slurm: SlurmCluster) -> set[str]:
    return set(slurm.call("squeue", "-h", "-o", "%i").split())


def record_of(run_folder: Path):
    record = JobFolder(run_folder, "fake").read()
    assert record is not None
    return record


def test_what_is_queued_is_not_submitted_again(slurm, tmp_path):
    config = waiting(tmp_path)
    first = submit.run(config)
    assert (first["submitted"], first["state"]) == (True, "queued")
    again = submit.run(config)
    assert (again["submitted"], again["job_id"]) == (False, first["job_id"])
    assert "queued already, as job" in submit.render(again)
    config.seed = 5
    with pytest.raises(UserError, match="job of another configuration in the queue"):
        submit.run(config)
    slurm.call("scancel", first["job_id"])
    assert submit.run(config)["submitted"]
    assert record_of(tmp_path).previous_job_ids == [first["job_id"]]
    slurm.call("scancel", record_of(tmp_path).job_id)


def test_of_two_submissions_at_once_one_wins(slurm, tmp_path):
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            outcomes.append("submitted" if submit.run(waiting(tmp_path))["submitted"] else "found it queued")
        except UserError as error:
            outcomes.append(error.what)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    before = jobs_in_queue(slurm)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("submitted") == 1
    assert set(outcomes) <= {"submitted", "found it queued", "another submission is at work in this run folder"}
    assert jobs_in_queue(slurm) - before == {record_of(tmp_path).job_id}
    slurm.call("scancel", record_of(tmp_path).job_id)


def test_a_submission_that_crashed_before_its_record_is_found_again(slurm, tmp_path):
    first = submit.run(waiting(tmp_path))
    (tmp_path / "jobs" / "fake" / "job.json").unlink()
    again = submit.run(waiting(tmp_path))
    assert (again["submitted"], again["job_id"]) == (False, first["job_id"])
    slurm.call("scancel", first["job_id"])


def test_a_job_that_slurm_has_forgotten_is_submitted_again(slurm, tmp_path, capsys):
    config = waiting(tmp_path)
    submit.run(config)
    record = record_of(tmp_path)
    slurm.call("scancel", record.job_id)
    record.job_id = "1"
    JobFolder(tmp_path, "fake").write(record)
    assert submit.run(config)["submitted"]
    assert "job 1 is no longer known to Slurm" in capsys.readouterr().err
    slurm.call("scancel", record_of(tmp_path).job_id)


def test_refusals_are_shown_with_a_cure(slurm, tmp_path):
    config = fake_submission(tmp_path)
    config.cluster.partition = "no such"
    with pytest.raises(UserError, match=r"(?s)invalid partition.*one of: main"):
        submit.run(config)
    for changes in ({"cpus_per_task": 1000}, {"constraint": "no_such_feature"}):
        config = fake_submission(tmp_path)
        vars(config.cluster).update(changes)
        with pytest.raises(UserError, match=r"(?s)Slurm refused.*(processors requested|feature).*cluster\."):
            submit.run(config)
    assert not (tmp_path / "jobs" / "fake" / "job.json").exists()


def test_nasty_names_run_and_do_nothing_else(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nasty = """a'b "c" $(touch pwned) `touch pwned` %j ; touch pwned #"""
    (tmp_path / nasty).mkdir()
    config = fake_submission(tmp_path / nasty)
    config.name, config.command = nasty, "report"
    quoted = nasty.replace("'", "\\'")
    config.arguments = [f"run_folder='{tmp_path}/{quoted}'"]
    answer = submit.run(config)
    assert slurm.wait_for_end(answer["job_id"]) == "COMPLETED", log_of(tmp_path / nasty, "report")
    assert (tmp_path / nasty / "report.json").exists()
    assert "ended with 0" in log_of(tmp_path / nasty, "report")
    assert not list(tmp_path.rglob("pwned"))
    assert submit.run(config)["state"] == "done"


def test_the_shell_command_answers_with_the_job_id(slurm, tmp_path):
    options = [
        "cluster.gres=''",
        "cluster.exclusive=false",
        "cluster.tasks_per_node=1",
        "+cluster.options.begin=now+1hour",
    ]
    (tmp_path / "a.tar").touch()
    stage = ["stage=toy_text_tokenizer", f"stage.objective.corpora=[{tmp_path}/a.tar]"]
    arguments = ["submit", "cluster=slurm", *stage, f"run_folder={tmp_path}", "json=true", *options]
    answer = subprocess.run(
        [sys.executable, "-m", "launch.command_line.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(snapshot.ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert slurm.job(told["job_id"])["JobState"] == "PENDING"
    assert Path(told["code"], "launch", "command_line", "cli.py").exists()
    assert Path(told["script"]).read_text().startswith("#!/bin/bash")
    slurm.call("scancel", told["job_id"])


# --- chains that break -----------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path, slurm) -> CurriculumConfig:
    """a -> b -> c; b fails while the file FAIL exists."""
    run = tmp_path / "run"
    (tmp_path / "chain_step.py").write_text(STEP)
    entries = {
        name: EntryConfig(
            module="chain_step", overrides=[str(run / name / "made")], needs=needs, outputs=[f"{name}/made"]
        )
        for name, needs in {"a": [], "b": ["a"], "c": ["b"]}.items()
    }
    for name in entries:
        (run / name).mkdir(parents=True)
    config = CurriculumConfig(name="chain", run_folder=str(run), entries=entries)
    use_test_cluster(config.cluster)
    config.cluster.max_restarts = 0
    config.cluster.environment["PYTHONPATH"] = ":".join(map(str, [tmp_path, *SEARCH_PATH]))
    config.validate()
    return config


def act(config: CurriculumConfig, action: str) -> dict:
    config.action = action
    return curriculum.run(config)


def states(config: CurriculumConfig) -> list[str]:
    return [entry["state"] for entry in act(config, "status")["entries"]]


def wait_for_last(slurm: SlurmCluster, config: CurriculumConfig, name: str) -> None:
    record = JobFolder(Path(config.run_folder), name).read()
    assert record is not None
    slurm.wait_for_end(record.job_id)


def test_a_broken_chain_is_mended_by_resume(slurm, chain):
    fail = Path(chain.run_folder) / "b" / "FAIL"
    fail.touch()
    assert list(act(chain, "run")["submitted"]) == ["a", "b", "c"]
    wait_for_last(slurm, chain, "c")
    assert states(chain) == ["done", "failed", "cancelled"]
    fail.unlink()
    assert list(act(chain, "resume")["submitted"]) == ["b", "c"]
    wait_for_last(slurm, chain, "c")
    assert states(chain) == ["done", "done", "done"]
    assert act(chain, "run")["submitted"] == {}
    assert "made" not in capture_logs(chain)
    (Path(chain.run_folder) / "a" / "made").unlink()
    assert states(chain) == ["changed", "done", "done"]


def capture_logs(config: CurriculumConfig) -> str:
    answer = act(config, "logs")
    text = curriculum.render(answer)
    assert "ended with 7" in text
    return text


def test_cancel_and_resume(slurm, chain):
    chain.cluster.options = dict(LATER)
    act(chain, "run")
    assert states(chain) == ["queued"] * 3
    entries = act(chain, "status")["entries"]
    assert [entry["reason"] for entry in entries] == ["BeginTime", "Dependency", "Dependency"]
    assert act(chain, "cancel")["cancelled"] == ["c", "b", "a"]
    assert states(chain) == ["cancelled"] * 3
    assert act(chain, "cancel")["cancelled"] == []
    chain.cluster.options = {}
    act(chain, "resume")
    wait_for_last(slurm, chain, "c")
    assert states(chain) == ["done"] * 3


def test_a_changed_entry_takes_the_place_of_the_queued_one(slurm, chain):
    chain.cluster.options = dict(LATER)
    first = act(chain, "run")["submitted"]
    chain.entries["b"].outputs = ["b"]
    second = act(chain, "run")["submitted"]
    assert list(second) == ["b", "c"]
    assert slurm.job(first["b"])["JobState"] == slurm.job(first["c"])["JobState"] == "CANCELLED"
    assert slurm.job(second["b"])["Dependency"].startswith(f"afterok:{first['a']}")
    chain.cluster.kind = "local"
    with pytest.raises(UserError, match="are jobs of a cluster"):
        act(chain, "run")
    act(chain, "cancel")


def test_resume_needs_a_beginning(chain):
    with pytest.raises(UserError, match="no curriculum to resume"):
        act(chain, "resume")


# --- sweeps and the doctor -------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_table_and_a_plot(slurm, tmp_path, capsys):
    cluster = fake_submission(tmp_path).cluster
    arguments = [
        "submit",
        "-m",
        "cluster=slurm",
        f"run_folder={tmp_path}",
        "stage.objective=slurm_objective.SlurmObjective",
        "stage.name=fake",
        "stage.steps=6",
        "stage.optimizer.learning_rate=0.01,0.02",
        "stage.optimizer.warmup_steps=0",
        "stage.global_batch_size=4",
        "parallel.tensor=1",
        "logging.wandb_mode=disabled",
        "cluster.gres=''",
        "cluster.exclusive=false",
        "cluster.tasks_per_node=1",
        "cluster.time_limit='10'",
        "cluster.network_interface=lo",
        f"cluster.environment.PYTHONPATH='{cluster.environment['PYTHONPATH']}'",
        "json=true",
    ]
    assert cli.main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [len(job["job_ids"]) for job in answer["jobs"]] == [1, 1]
    assert {row["state"] for row in answer["sweep"]} <= {"not begun", "unfinished", "done"}  # jobs are quick
    assert slurm.wait_for_end(answer["summary_job_id"]) == "COMPLETED"
    page = Path(answer["page"])
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert sorted(row["overrides"] for row in rows) == [
        ["stage.optimizer.learning_rate=0.01"],
        ["stage.optimizer.learning_rate=0.02"],
    ]
    assert [row["state"] for row in rows] == ["done"] * 2
    assert rows[0]["loss"] <= rows[1]["loss"]
    assert page.read_text().count("<polyline") == 3  # two runs, and their losses by learning rate
    assert cli.main(arguments) == 0  # nothing is left to submit
    again = json.loads(capsys.readouterr().out)
    assert "summary_job_id" not in again
    assert [row["loss"] for row in again["sweep"]] == [row["loss"] for row in rows]


def test_the_doctor_reaches_slurm_and_compares_clocks(slurm):
    found = {finding.name: finding for finding in doctor_cluster.slurm_findings()}
    assert "main up" in found["slurm"].detail
    assert found["slurm clock"].ok
