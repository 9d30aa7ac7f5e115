"""Slurm's own commands, called without a shell: submit, look, cancel. Nothing here keeps state."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

TIMEOUT_SECONDS = 60
ACTIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "STOPPED",
    "SIGNALING",
    "SPECIAL_EXIT",
    "STAGE_OUT",
    "REQUEUE_FED",
    "RESV_DEL_HOLD",
)
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")


@dataclass
class QueuedJob:
    """What Slurm says of a job, all tasks of an array together."""

    job_id: str
    state: str  # Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...
    reason: str = ""  # why it waits or ended
    comment: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING


def run_tool(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands. What an enclosing job put into the environment does not leak into it."""
    if shutil.which(arguments[0]) is None:
        raise UserError(
            "there is no Slurm on this machine",
            where=f"command {arguments[0]}",
            fix="log in to a host of the cluster from which jobs are submitted, or use cluster=local",
        )
    inherited = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SCANCEL)_")
    environment = {
        name: value for name, value in os.environ.items() if not inherited.match(name) or name == "SLURM_CONF"
    }
    try:
        return subprocess.run(
            arguments,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            "Slurm does not answer",
            where=arguments[0],
            got=f"nothing within {TIMEOUT_SECONDS} seconds",
            fix="scontrol ping shows whether the controller is up; give the same command again later",
        ) from None


def submit_script(script: Path, after: list[str], *, whatever_happens: bool = False) -> str:
    """The job id. The job waits for `after`, and is cancelled when one of them fails, or starts all the same."""
    arguments = ["sbatch", "--parsable"]
    if after and whatever_happens:
        arguments.append(f"--dependency=afterany:{':'.join(after)}")
    elif after:
        arguments += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    answer = run_tool([*arguments, str(script)])
    if answer.returncode != 0:
        raise UserError("Slurm refused the job", where=str(script), got=explain(answer.stderr), fix=cure(answer.stderr))
    return answer.stdout.strip().splitlines()[-1].partition(";")[0]


def explain(messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return "; ".join(lines) or "no message"


def cure(messages: str) -> str:
    """What to set, for the refusals that users meet most."""
    text = messages.lower()
    if "partition" in text:
        return f"cluster.partition= one of: {', '.join(partitions()) or 'none is visible to you'}"
    if "account" in text:
        return "cluster.account=NAME; sacctmgr show associations user=$USER lists yours"
    if "qos" in text:
        return "cluster.qos=NAME, or leave it empty"
    if any(words in text for words in ("node configuration", "node count", "more processors")):
        return "ask for what a node has: cluster.tasks_per_node, cluster.gres, cluster.memory; sinfo -N -l"
    return "mend what Slurm names under cluster.*, then give the same command again"


def partitions() -> list[str]:
    answer = run_tool(["sinfo", "--noheader", "--format=%R"])
    return sorted(set(answer.stdout.split())) if answer.returncode == 0 else []


def queue() -> dict[str, QueuedJob]:
    """This user's jobs by id, those included that ended as long as Slurm remembers them."""
    answer = run_tool(["squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%F|%T|%r|%k"])
    if answer.returncode != 0:
        raise UserError(
            "Slurm's queue cannot be read",
            got=explain(answer.stderr),
            fix="scontrol ping shows whether the controller is up; give the same command again later",
        )
    tasks: dict[str, list[QueuedJob]] = {}
    for line in answer.stdout.splitlines():
        job_id, state, reason, comment = (line.split("|", 3) + ["", "", ""])[:4]
        tasks.setdefault(job_id, []).append(QueuedJob(job_id, state, reason, comment))
    return {job_id: most_telling(members) for job_id, members in tasks.items()}


def most_telling(tasks: list[QueuedJob]) -> QueuedJob:
    """Of an array: a running task, else a waiting one, else one that did not end well, else any."""

    def weight(task: QueuedJob) -> int:
        if task.is_active:
            return 2 if task.is_waiting else 3
        return int(task.state != "COMPLETED")

    return max(tasks, key=weight)


def remembered_state(job_id: str) -> str:
    """The state of a job that has left the queue, where the cluster keeps accounts; empty where it does not."""
    if shutil.which("sacct") is None:
        return ""
    answer = run_tool(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State"])
    states = [line.split()[0] for line in answer.stdout.splitlines() if line.split()]
    return states[-1] if answer.returncode == 0 and states else ""


def cancel(job_ids: list[str]) -> None:
    """Cancel jobs; those that are over already are no error."""
    if not job_ids:
        return
    answer = run_tool(["scancel", *job_ids])
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise UserError("Slurm did not cancel the jobs", where=" ".join(job_ids), got=explain(answer.stderr))
