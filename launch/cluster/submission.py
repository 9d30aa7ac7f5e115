"""From a configuration to a queued job: snapshot, script, `sbatch`, record. Importing this module is cheap.

What is done, queued or running is left alone, so every submission may be given again at any time.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launch.cluster import slurm
from launch.cluster.batch_script import SECRETS_NAME, SHARE, BatchJob, render, secrets
from launch.cluster.job_folders import CODE_FOLDER, CONFIG_NAME, JobFolder, JobRecord, find_lost, job_state, locked
from launch.cluster.profile import ClusterConfig
from launch.cluster.snapshot import snapshot
from launch.composition.compose import compose_tree
from launch.composition.registry import check_command
from launch.composition.secrets import without_secrets
from model.durable import fingerprint_of, replace_file
from model.errors import UserError
from training.config import TrainConfig, differences, load_yaml, save_yaml
from training.objectives.checks import fixed_of
from training.stage import CONFIG_NAME as STAGE_CONFIG_NAME
from training.stage import SUMMARY_NAME

# -P: the working folder is not imported from; the snapshot is.
PYTHON_MODULE = ["-P", "-m"]


@dataclass
class Work:
    """What a job computes, before it is known where."""

    name: str  # of the job folder
    title: str  # for people, and the job's name in the queue
    run_folder: Path
    fingerprint: str  # two works with one fingerprint produce the same
    calls: list[list[str]] = field(default_factory=list)  # of a command; empty for training
    shares: int = 1  # tasks of an array that divide one call
    num_accelerators: int = 0  # of a job that is not training
    training: TrainConfig | None = None
    outputs: list[Path] = field(default_factory=list)


def training_work(config: TrainConfig) -> Work:
    return Work(
        name=config.stage.name,
        title=f"{config.name}/{config.stage.name}",
        run_folder=Path(config.run_folder),
        fingerprint=config.fingerprint(),
        training=config,
        outputs=[config.stage_folder],
    )


def command_work(
    command: str,
    overrides: list[str],
    calls: dict[str, list[str]],
    *,
    shares: int,
    num_accelerators: int,
    run_folder: Path,
    name: str,
    title: str,
) -> Work:
    """A nextstate command as one job, or as a job array: a call a task, or a share of the shards a task."""
    check_command(command, "command")
    groups = [[*overrides, *own] for own in calls.values()] or [list(overrides)]
    told = [one.partition("=")[0] for group in groups for one in group if without_secrets([one]) != [one]]
    if told:
        raise UserError(
            "a secret among the arguments of a job would stand in its script, which others may read",
            got=", ".join(sorted(set(told))),
            fix="give it to the job by cluster.environment.NAME=..., or in a file of your own",
        )
    trees = [OmegaConf.to_container(compose_tree(command, group)) for group in groups]
    if shares > 1:
        groups = [[*group, f"num_tasks={shares}", SHARE] for group in groups]
    return Work(
        name=name,
        title=title,
        run_folder=run_folder,
        shares=shares,
        num_accelerators=num_accelerators,
        fingerprint=fingerprint_of([command, trees]),
        calls=[[*PYTHON_MODULE, "launch.command_line.cli", command, *group] for group in groups],
    )


def describe(work: Work, cluster: ClusterConfig, folder: JobFolder, code: Path) -> BatchJob:
    """The batch job of a work. Raises `UserError` where the ranks do not fill the nodes evenly."""
    job = BatchJob(
        name=work.title,
        description=f"{work.title}, written by nextstate",
        key=folder.key,
        folder=folder.path,
        code=code,
        work_folder=Path.cwd(),
        calls=work.calls,
        shares=work.shares,
        outputs=[path.absolute() for path in work.outputs],
        num_accelerators_per_node=work.num_accelerators,
    )
    if job.num_parts == 1:  # a share may have had no shards
        job.must_exist = job.outputs
    config = work.training
    if config is None:
        return job
    per_node = cluster.tasks_per_node or cluster.accelerators_per_node
    world_size = config.parallel.world_size
    if world_size > per_node and world_size % per_node:
        raise UserError(
            "the ranks do not fill whole nodes",
            got=f"{world_size} ranks, {per_node} a node",
            expected=f"a multiple of {per_node}, or fewer than {per_node}",
            fix="change parallel.data or cluster.tasks_per_node",
        )
    job.calls = [[*PYTHON_MODULE, "launch.cluster.rank", "--config", str(folder.path / CONFIG_NAME)]]
    job.num_tasks, job.tasks_per_node = world_size, min(per_node, world_size)
    job.num_accelerators_per_node = job.tasks_per_node
    job.checkpoints = (config.stage_folder / "checkpoints").absolute()
    job.must_exist = [(config.stage_folder / SUMMARY_NAME).absolute()]
    return job


def dry_run(work: Work, cluster: ClusterConfig) -> str:
    """The script as a submission would write it; nothing is written."""
    folder = JobFolder(work.run_folder, work.name)
    code = (work.run_folder / CODE_FOLDER / "snapshot").absolute()
    return render(describe(work, cluster, folder, code), cluster)


def submit(work: Work, cluster: ClusterConfig) -> dict[str, Any]:
    """Submit one job unless it is queued or running; the answer says which job and whether it is new."""
    with locked(work.run_folder):
        folder = JobFolder(work.run_folder, work.name)
        jobs = slurm.queue()
        record = recover(folder, jobs)
        state = job_state(folder, record, jobs)
        if record is not None and state in ("queued", "running"):
            if record.fingerprint != work.fingerprint:
                raise UserError(
                    "this run folder has a job of another configuration in the queue",
                    where=str(folder.path),
                    got=f"job {record.job_id} is {state}",
                    fix=f"scancel {record.job_id}, or choose another run_folder or stage.name",
                )
            return answer(folder, record, state, submitted=False)
        if record is not None and state == "done" and work.training is None and record.fingerprint == work.fingerprint:
            return answer(folder, record, state, submitted=False)
        if state == "vanished" and record is not None:
            print(f"job {record.job_id} is no longer known to Slurm: submitted again", file=sys.stderr)
        check_run_folder(work)
        record = enqueue(work, cluster, folder, [], record)
        return answer(folder, record, "queued", submitted=True)


def recover(folder: JobFolder, jobs: dict[str, slurm.QueuedJob]) -> JobRecord | None:
    """The record; that of a job whose submission crashed before it could be written is made up for."""
    record = folder.read()
    lost = find_lost(folder, jobs)
    if lost is not None and (record is None or record.job_id != lost.job_id):
        fingerprint = (folder.path / "fingerprint").read_text().strip()
        record = JobRecord(lost.job_id, fingerprint, submitted_at=time.time())
        folder.write(record)
    return record


def enqueue(
    work: Work,
    cluster: ClusterConfig,
    folder: JobFolder,
    after: list[str],
    before: JobRecord | None,
    *,
    whatever_happens: bool = False,
) -> JobRecord:
    """Write everything that the job needs, hand it to Slurm, record its id. The caller holds the lock."""
    try:
        code = snapshot((work.run_folder / CODE_FOLDER).absolute())
        job = prepare(work, cluster, folder, code)
    except OSError as error:
        raise UserError(
            "the run folder cannot be written",
            where=str(work.run_folder),
            got=str(error),
            fix="free space or give permission, or choose another run_folder",
        ) from None
    job_id = slurm.submit_script(folder.script, after, whatever_happens=whatever_happens)
    record = JobRecord(
        job_id,
        work.fingerprint,
        job.num_parts,
        after,
        time.time(),
        str(code),
        [*before.previous_job_ids, before.job_id] if before else [],
    )
    folder.write(record)
    return record


def prepare(work: Work, cluster: ClusterConfig, folder: JobFolder, code: Path) -> BatchJob:
    """Script and resolved configuration in the job folder."""
    job = describe(work, cluster, folder, code)
    script = render(job, cluster)  # refuses what must not reach a script before anything is written
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.forget_endings()
    if work.training is not None:
        save_yaml(work.training, folder.path / CONFIG_NAME)
    replace_file(folder.path / "fingerprint", work.fingerprint + "\n")
    write_private(folder.path / SECRETS_NAME, secrets(cluster))
    replace_file(folder.script, script)
    return job


def write_private(path: Path, content: str) -> None:
    """A file that only its owner may read, from its first byte on; none for no content."""
    path.unlink(missing_ok=True)
    if content:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)


def submit_summary(folder: Path, name: str, cluster: ClusterConfig, after: list[str]) -> str:
    """The job that writes the table and the curves of a sweep once its runs have ended, well or not."""
    with locked(folder):
        job_folder = JobFolder(folder, "summary")
        before = job_folder.read()
        if before is not None:
            slurm.cancel([before.job_id])
        work = Work(
            name="summary",
            title=f"{name}/sweep",
            run_folder=folder,
            fingerprint=" ".join(after),
            calls=[[*PYTHON_MODULE, "launch.report.sweep", str(folder)]],
            outputs=[folder / "summary.html"],
        )
        return enqueue(work, cluster, job_folder, after, before, whatever_happens=True).job_id


def run_here(work: Work, cluster: ClusterConfig) -> dict[str, Any]:
    """The same script, started on this machine; signals reach it, and its exit code comes back."""
    from launch.local.subprocesses import run_supervised

    with locked(work.run_folder):
        folder = JobFolder(work.run_folder, work.name)
        check_run_folder(work)
        job = prepare(work, cluster, folder, snapshot((work.run_folder / CODE_FOLDER).absolute()))
        if job.num_parts > 1:
            raise UserError("this machine runs no job arrays", fix="shares=1 and no calls, or cluster=slurm")
        outcome = run_supervised(["bash", str(folder.script)], folder.log)
        state = {0: "done", 3: "stopped"}.get(outcome.exit_code, "failed")
        record = JobRecord("local", work.fingerprint, 1, [], time.time(), str(job.code))
        folder.write(record)
        return answer(folder, record, state, submitted=True) | {"exit_code": outcome.exit_code}


def check_run_folder(work: Work) -> None:
    """Refuse a stage folder of another model, seed or length before the job has waited for its nodes."""
    if work.training is None:
        return
    path = work.training.stage_folder / STAGE_CONFIG_NAME
    if not path.exists():
        return
    changed = differences(fixed_of(load_yaml(path).to_dict()), fixed_of(work.training.to_dict()))
    if changed:
        raise UserError(
            "the run folder holds this stage with another configuration",
            where=str(path.parent),
            got="; ".join(changed),
            fix="set these back, or choose another run_folder or stage.name",
        )


def answer(folder: JobFolder, record: JobRecord, state: str, *, submitted: bool) -> dict[str, Any]:
    return {
        "name": folder.name,
        "job_id": record.job_id,
        "state": state,
        "submitted": submitted,
        "script": str(folder.script),
        "log": str(folder.log),
        "code": record.code,
    }
