"""A curriculum as jobs of a cluster that wait for each other.

The state stands in the run folder and in Slurm's queue. Every call looks at both, brings the records up to date, and
submits what is neither done nor queued, so that it may be given at any time and mends what was broken.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cluster import job_folders as jobs
from launch.cluster import slurm
from launch.cluster.batch_script import SHARE
from launch.cluster.job_folders import JobFolder, JobRecord, job_state
from launch.cluster.submission import PYTHON_MODULE, Work, check_run_folder, dry_run, enqueue, recover
from launch.composition.compose import compose_config
from launch.curriculum.entries import (
    Composed,
    Curriculum,
    CurriculumConfig,
    EntryConfig,
    figures,
    locked,
    measure,
    module_call,
    new_result,
    supersede,
)
from model.errors import UserError


@dataclass
class Chain:
    """A curriculum, its job folders, and what Slurm says now."""

    curriculum: Curriculum
    queue: dict[str, slurm.QueuedJob]
    jobs: dict[str, JobFolder] = field(default_factory=dict)  # by entry
    records: dict[str, JobRecord | None] = field(default_factory=dict)  # the last submission
    states: dict[str, str] = field(default_factory=dict)  # of that submission

    @property
    def config(self) -> CurriculumConfig:
        return self.curriculum.config

    def is_active(self, name: str) -> bool:
        return self.states[name] in ("queued", "running")


def read_chain(config: CurriculumConfig, queue: dict[str, slurm.QueuedJob], composed: Composed | None = None) -> Chain:
    """Nothing is written."""
    chain = Chain(Curriculum(config, composed), queue)
    for name in chain.curriculum.order:
        folder = JobFolder(chain.curriculum.folder, name)
        chain.jobs[name], chain.records[name] = folder, recover(folder, queue)
        chain.states[name] = job_state(folder, chain.records[name], queue)
        settle(chain, name)
    return chain


def settle(chain: Chain, name: str) -> None:
    """Put what became of a submitted entry into its record; jobs that are still active change nothing."""
    record, folder = chain.curriculum.records[name], chain.jobs[name]
    if record.state != "submitted" or chain.is_active(name):
        return
    endings = folder.endings()
    record.state = "vanished" if chain.states[name] == "none" else chain.states[name]
    record.exit_code = max((ending.exit_code for ending in endings), default=None)
    record.wall_seconds = sum(max(0.0, ending.ended_at - ending.started_at) for ending in endings)
    if record.state == "done":
        outputs = chain.config.entries[name].outputs
        record.outputs = {output: list(measure(chain.curriculum.folder / output)) for output in outputs}


def run_chain(config: CurriculumConfig, composed: Composed | None = None) -> dict[str, Any]:
    """Submit every entry that is neither up to date nor queued, in order, each after those it needs."""
    folder = Path(config.run_folder)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        stack.enter_context(jobs.locked(folder))
        chain = read_chain(config, slurm.queue(), composed)
        submitted: dict[str, str] = {}
        for name in chain.curriculum.order:
            if is_due(chain, name, submitted):
                submitted[name] = submit_entry(chain, name)
                print(f"{name}: submitted as job {submitted[name]}", file=sys.stderr)
            if name == config.until:
                break
        chain.curriculum.save()
        return report(chain) | {"submitted": submitted}


def scripts_of(config: CurriculumConfig) -> dict[str, str]:
    """By entry, as they would be submitted if nothing were done yet; needs no Slurm."""
    curriculum = Curriculum(config)
    return {name: dry_run(entry_work(curriculum, name), config.cluster) for name in curriculum.order}


def is_due(chain: Chain, name: str, submitted: dict[str, str]) -> bool:
    curriculum, needs = chain.curriculum, chain.config.entries[name].needs
    is_rebuilt = any(needed in submitted for needed in needs)
    is_forced = name in chain.config.force
    if chain.is_active(name):
        is_current = curriculum.records[name].fingerprint == curriculum.fingerprint(name)
        if is_current and not is_rebuilt and not is_forced:
            return False
        give_way(chain, name)
        return True
    return is_rebuilt or is_forced or not curriculum.is_done(name)


def give_way(chain: Chain, name: str) -> None:
    """A queued job that waits for what is no longer to come is cancelled; a running one is left to its owner."""
    record = chain.records[name]
    assert record is not None
    if chain.states[name] == "running":
        raise UserError(
            f"{name} is running with another configuration, or with inputs that are to be made again",
            got=f"job {record.job_id}",
            fix=f"wait for it, or scancel {record.job_id} and give the same command again",
        )
    slurm.cancel([record.job_id])


def submit_entry(chain: Chain, name: str) -> str:
    """The job id. The record is saved at once: a crash after this submits nothing twice."""
    curriculum, entry = chain.curriculum, chain.config.entries[name]
    record, fingerprint = curriculum.records[name], curriculum.fingerprint(name)
    work = entry_work(curriculum, name)
    check_run_folder_of_entry(work, fingerprint == record.fingerprint)
    if fingerprint != record.fingerprint or name in chain.config.force:
        supersede(curriculum.folder, name, entry.outputs)
    # What an unfinished entry will have made keeps its name, so that those who wait for it stay up to date.
    if fingerprint != record.fingerprint or record.state == "done" or not record.result:
        record.result = new_result(fingerprint)
    needed = [chain.records[other] for other in entry.needs if chain.is_active(other)]
    after = [one.job_id for one in needed if one is not None]
    submission = enqueue(work, chain.config.cluster, chain.jobs[name], after, chain.records[name])
    record.fingerprint, record.state, record.exit_code = fingerprint, "submitted", None
    record.started_at, record.arguments = submission.submitted_at, module_call(entry)
    chain.records[name], chain.states[name] = submission, "queued"
    curriculum.save()
    return submission.job_id


def check_run_folder_of_entry(work: Work, is_same: bool) -> None:
    """Outputs of another configuration are moved aside; those of the same one must really be so."""
    if is_same:
        check_run_folder(work)


def entry_work(curriculum: Curriculum, name: str) -> Work:
    entry, folder = curriculum.config.entries[name], curriculum.folder
    work = Work(
        name=name,
        title=f"{curriculum.config.name}/{name}",
        run_folder=folder,
        fingerprint=curriculum.fingerprint(name),
        outputs=[folder / output for output in entry.outputs],
        num_accelerators=entry.accelerators,
    )
    if entry.command == "train" and not entry.each:
        work.training = compose_config("train", entry.overrides)
    else:
        work.calls, work.shares = entry_calls(entry), entry.shares
    return work


def entry_calls(entry: EntryConfig) -> list[list[str]]:
    """Arguments of the interpreter, for each task of a job array when the calls are parallel."""
    if entry.parallel_calls:
        groups = [["launch.command_line.cli", entry.command, *entry.overrides, *own] for own in entry.each.values()]
    else:
        module, *rest = module_call(entry)
        share = [f"num_tasks={entry.shares}", SHARE] if entry.shares > 1 else []
        groups = [[module, rest[0], *share, *rest[1:]]] if share else [[module, *rest]]
    return [[*PYTHON_MODULE, *group] for group in groups]


def report(chain: Chain) -> dict[str, Any]:
    """One item an entry, in order."""
    entries = []
    for name in chain.curriculum.order:
        record = chain.records[name]
        state = chain.states[name] if chain.is_active(name) else chain.curriculum.state(name)
        job_ids = [*record.previous_job_ids, record.job_id] if record else []
        entry = {"name": name, "state": state, **figures(chain.curriculum, name)}
        entry |= {"job_ids": job_ids, "restarts": chain.jobs[name].num_restarts()}
        if record is not None and chain.is_active(name):
            job = chain.queue.get(record.job_id)
            entry["reason"] = job.reason if job and state == "queued" else ""
            entry["wall_seconds"] = round(chain.jobs[name].seconds_since_start(record), 1)
        entries.append(entry)
    return {"name": chain.config.name, "run_folder": str(chain.curriculum.folder), "entries": entries}


def cancel_chain(config: CurriculumConfig) -> dict[str, Any]:
    """Cancel what is queued or running; what was saved stays, and `resume` goes on from it."""
    with jobs.locked(Path(config.run_folder)):
        chain = read_chain(config, slurm.queue())
        active = [name for name in reversed(chain.curriculum.order) if chain.is_active(name)]
        slurm.cancel([record.job_id for name in active if (record := chain.records[name]) is not None])
        for name in active:
            chain.states[name] = chain.curriculum.records[name].state = "cancelled"
        chain.curriculum.save()
        return report(chain) | {"cancelled": active}
