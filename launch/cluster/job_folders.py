"""Job folders: `<run folder>/jobs/<name>` holds the script, the resolved configuration, the log, and what became of it.

The state of a job is read from here and from Slurm each time it is asked for; no process keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch.cluster.batch_script import ATTEMPTS_NAME, ENDED_NAME, LOG_NAME, PROGRESS_NAME
from launch.cluster.slurm import QueuedJob, remembered_state
from model.durable import lock, read_json_object, write_json
from model.errors import UserError

JOBS_FOLDER = "jobs"
CODE_FOLDER = "code"
RECORD_NAME = "job.json"
SCRIPT_NAME = "job.sh"
CONFIG_NAME = "config.yaml"
LOCK_NAME = ".submit.lock"


@dataclass
class JobRecord:
    """One submission; `job.json`."""

    job_id: str
    fingerprint: str  # of what the job computes
    num_parts: int = 1  # tasks of the array; 1: no array
    after: list[str] = field(default_factory=list)  # jobs it waits for
    submitted_at: float = 0.0  # seconds since the epoch
    code: str = ""  # folder of the snapshot
    previous_job_ids: list[str] = field(default_factory=list)


@dataclass
class Ending:
    """A line that a finished part of a job left."""

    exit_code: int
    started_at: float
    ended_at: float


class JobFolder:
    """One job's folder and the questions that it answers."""

    def __init__(self, run_folder: Path, name: str):
        self.name = name
        self.path = (run_folder / JOBS_FOLDER / name).absolute()
        self.log = self.path / LOG_NAME
        self.script = self.path / SCRIPT_NAME

    @property
    def key(self) -> str:
        """Marks this folder's jobs in the queue, whatever was or was not recorded."""
        digest = hashlib.blake2b(str(self.path).encode(), digest_size=8).hexdigest()
        return f"nextstate:{digest}"

    def read(self) -> JobRecord | None:
        path = self.path / RECORD_NAME
        if not path.exists():
            return None
        damaged = "the record of a job cannot be read"
        fix = "move the file away; squeue shows whether the job is still queued"
        try:
            return JobRecord(**read_json_object(path, damaged=damaged, fix=fix))
        except TypeError as error:
            raise UserError(damaged, where=str(path), got=str(error), fix=fix) from None

    def write(self, record: JobRecord) -> None:
        write_json(self.path / RECORD_NAME, asdict(record))

    def forget_endings(self) -> None:
        """Before a submission: what an earlier one left decides nothing any more, the restart budget included."""
        for stem in (ENDED_NAME, PROGRESS_NAME):
            for path in self.path.glob(f"{stem}*"):
                path.unlink()

    def endings(self) -> list[Ending]:
        found = []
        for path in sorted(self.path.glob(f"{ENDED_NAME}*")):
            if path.suffix != ".tmp":
                _, code, started, ended = path.read_text().split()
                found.append(Ending(int(code), float(started), float(ended)))
        return found

    def num_restarts(self) -> int:
        """Starts of the ranks beyond the first, of all parts and submissions."""
        starts = [len(path.read_text().splitlines()) for path in self.path.glob(f"{ATTEMPTS_NAME}*")]
        return sum(max(0, number - 1) for number in starts)

    def seconds_since_start(self, record: JobRecord) -> float:
        """Since the first start of the present submission; 0 while it waits for it."""
        starts = [
            float(line.split()[0])
            for path in self.path.glob(f"{ATTEMPTS_NAME}*")
            for line in path.read_text().splitlines()
        ]
        ours = [start for start in starts if start >= int(record.submitted_at)]
        return max(0.0, time.time() - min(ours)) if ours else 0.0

    def logs(self) -> list[Path]:
        return sorted(self.path.glob(f"{LOG_NAME}*"))


def job_state(folder: JobFolder, record: JobRecord | None, jobs: dict[str, QueuedJob]) -> str:
    """none | queued | running | done | failed | stopped | cancelled | vanished."""
    if record is None:
        return "none"
    endings = folder.endings()
    if len(endings) >= record.num_parts:
        codes = {ending.exit_code for ending in endings}
        return "done" if codes == {0} else "stopped" if codes <= {0, 3} else "failed"
    job = jobs.get(record.job_id)
    if job is not None and job.is_active:
        return "queued" if job.is_waiting else "running"
    word = job.state if job is not None else remembered_state(record.job_id)
    if not word:
        return "vanished"
    return "cancelled" if word.startswith(("CANCELLED", "PREEMPTED")) else "failed"


def find_lost(folder: JobFolder, jobs: dict[str, QueuedJob]) -> QueuedJob | None:
    """An active job of this folder that was submitted but, because of a crash, not recorded."""
    return next((job for job in jobs.values() if job.comment == folder.key and job.is_active), None)


@contextlib.contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """One submission at a time in a run folder. The system frees the lock of a process that died."""
    folder = run_folder / JOBS_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "the run folder cannot be written", where=str(folder), got=str(error), fix="choose another run_folder"
        ) from None
    taken = "another submission is at work in this run folder"
    fix = "nothing: it submits the jobs; or choose another run_folder"
    with lock(folder / LOCK_NAME, taken, fix=fix, where=run_folder):
        yield
