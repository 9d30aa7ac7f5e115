"""Writes the batch script of a job: asks the scheduler, prepares the environment, runs the ranks, restarts them.

Every value that comes from a configuration is quoted by `shlex.quote`; nothing is pasted into the script as it is. Values
with control characters are refused: a line break ends the comment that a directive is, quoted or not. Secrets of the
environment are not in the script, which others may read, but in a file of its own that it sources.
"""

from __future__ import annotations

import shlex
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster.profile import ClusterConfig
from launch.cluster.scheduling import DIRECTIVES
from launch.composition.secrets import SECRET_NAME
from model.errors import Problems

ENDED_NAME = "ended"  # one line "job id, exit code, started, ended" when a job is over; per array task
ATTEMPTS_NAME = "attempts"  # one line a start of the ranks
PROGRESS_NAME = "progress"  # "restarts in a row without progress, progress at the last start"
LOG_NAME = "log.txt"
SECRETS_NAME = "secrets.sh"  # readable by its owner only
SHARE = "task=<number of the array task>"  # the argument that this task's number replaces


@dataclass
class BatchJob:
    """One job, or one job array when there are several calls. All folders are absolute."""

    name: str
    description: str
    key: str  # unique to the job folder; stands in the job's comment, so that a lost job is found again
    folder: Path  # script, log, attempts
    code: Path  # snapshot that the processes import
    work_folder: Path  # relative paths of the configuration start here
    calls: list[list[str]]  # arguments of the interpreter; one array task each when there are several
    shares: int = 1  # tasks of an array that divide one call, which contains `SHARE`
    num_tasks: int = 1  # ranks
    tasks_per_node: int = 1
    num_accelerators_per_node: int = 0
    checkpoints: Path | None = None  # progress is the newest complete checkpoint here
    outputs: list[Path] = field(default_factory=list)  # without checkpoints: the number of files here
    must_exist: list[Path] = field(default_factory=list)  # what a job that ended well has left

    @property
    def num_nodes(self) -> int:
        return -(-self.num_tasks // self.tasks_per_node)

    @property
    def num_parts(self) -> int:
        """Tasks of the job array; 1: no array."""
        return max(len(self.calls), self.shares)


def render(job: BatchJob, cluster: ClusterConfig) -> str:
    """The whole script, for `sbatch` or, where the cluster is this machine, for `bash`.

    Raises `UserError` that names every value with a control character.
    """
    check_values(job, cluster)
    parts = ["#!/bin/bash", f"# {printable(job.description)}"]
    if cluster.kind == "slurm":
        parts += directives(job, cluster)
    parts += ["", "set -u", *places(job, cluster), "", *environment(job, cluster), "", *calls(job)]
    if cluster.kind == "slurm":
        parts += ["", RENDEZVOUS if job.checkpoints else NO_RENDEZVOUS]
        launch = "\n".join(f"  {line}" for line in srun(job, cluster))
        parts += ["", RESTARTS.replace("@LAUNCH@", launch)]
    else:
        parts += ["", 'exec "$python" "${call[@]}"']
    return "\n".join(parts) + "\n"


def printable(text: str) -> str:
    """`text` on one line: a comment must not become a command."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def check_values(job: BatchJob, cluster: ClusterConfig) -> None:
    problems = Problems()
    folders = [job.folder, job.code, job.work_folder, job.checkpoints or "", *job.outputs, *job.must_exist]
    values = {"name": [job.name, job.key], "run_folder or working folder": list(map(str, folders))}
    values |= {"arguments": [word for call in job.calls for word in call], "cluster": cluster.texts()}
    for key, texts in values.items():
        for text in texts:
            is_clean = all(unicodedata.category(letter) not in ("Cc", "Zl", "Zp") for letter in text)
            problems.check(is_clean, key, f"a control character in {text!r}", "remove it")
    problems.raise_if_any()


def directives(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    options: dict[str, str] = {
        "job-name": job.name,
        "comment": job.key,
        "output": file_pattern(job.folder / LOG_NAME, is_array=job.num_parts > 1),
        "open-mode": "append",
        "time": cluster.time_limit,
        "nodes": str(job.num_nodes),
        "ntasks-per-node": str(min(job.num_tasks, job.tasks_per_node)),
        "signal": f"USR1@{cluster.signal_seconds}",
    }
    options |= {name: getattr(cluster, name) for name in DIRECTIVES if getattr(cluster, name)}
    if job.num_parts > 1:
        limit = f"%{cluster.array_limit}" if cluster.array_limit else ""
        options["array"] = f"0-{job.num_parts - 1}{limit}"
    if cluster.cpus_per_task:
        options["cpus-per-task"] = str(cluster.cpus_per_task)
    if cluster.memory:
        options["mem"] = cluster.memory
    if cluster.gres and job.num_accelerators_per_node:
        options["gres"] = f"{cluster.gres}:{job.num_accelerators_per_node}"
    options |= cluster.options
    flags = ["requeue" if cluster.requeue else "no-requeue"]
    if cluster.exclusive and job.num_tasks > 1:
        flags.append("exclusive")
    lines = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in options.items()]
    return lines + [f"#SBATCH --{flag}" for flag in flags]


def file_pattern(path: Path, *, is_array: bool) -> str:
    """A file name as Slurm takes it: a percent sign of the path stands for itself."""
    escaped = str(path).replace("%", "%%")
    return f"{escaped}.%a" if is_array else escaped


def places(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    values = {
        "job_folder": job.folder,
        "code": job.code,
        "work_folder": job.work_folder,
        "python": cluster.python or sys.executable,
        "checkpoints": job.checkpoints or "",
        "max_restarts": cluster.max_restarts,
        "may_requeue": int(cluster.requeue),
        "signal_seconds": cluster.signal_seconds,
    }
    if cluster.kind == "local":
        values = {name: values[name] for name in ("code", "work_folder", "python")}
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    if cluster.kind == "slurm":
        lines.append(f"outputs=({shlex.join(map(str, job.outputs))})")
        lines.append(f"must_exist=({shlex.join(map(str, job.must_exist))})")
    return [*lines, 'cd -- "$work_folder" || exit 1']


def secrets(cluster: ClusterConfig) -> str:
    """What stands in the file `SECRETS_NAME`; empty when the environment has no secrets."""
    found = {name: value for name, value in cluster.environment.items() if SECRET_NAME.search(name)}
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in found.items())


def environment(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    lines = [f"module load {shlex.quote(name)}" for name in cluster.modules]
    variables = {name: value for name, value in cluster.environment.items() if not SECRET_NAME.search(name)}
    if cluster.network_interface:
        variables["GLOO_SOCKET_IFNAME"] = variables["NCCL_SOCKET_IFNAME"] = cluster.network_interface
    if cluster.infiniband_devices:
        variables["NCCL_IB_HCA"] = cluster.infiniband_devices
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if secrets(cluster):
        lines.append(f". {shlex.quote(str(job.folder / SECRETS_NAME))} || exit 1")
    lines.append(
        "# The snapshot comes before anything else that could be imported, the working folder (modules of your own) last."
    )
    lines.append(
        'export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}:$work_folder" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1'
    )
    if "OMP_NUM_THREADS" not in variables:
        lines.append(f"export OMP_NUM_THREADS={cluster.cpus_per_task or 1}")
    return lines


def calls(job: BatchJob) -> list[str]:
    if len(job.calls) == 1:
        return [f"call=({quoted(job.calls[0])})"]
    cases = [f"  {index}) call=({quoted(call)}) ;;" for index, call in enumerate(job.calls)]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def quoted(call: list[str]) -> str:
    share = '"task=$SLURM_ARRAY_TASK_ID"'
    return " ".join(share if word == SHARE else shlex.quote(word) for word in call)


def srun(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """One task a rank. A rank that fails ends the step at once, so the restart does not wait for a timeout."""
    words = ["srun", "--kill-on-bad-exit=1", "--wait=60", f"--ntasks={job.num_tasks}"]
    if job.num_tasks > 1:
        words.append("--label")
    if cluster.cpus_per_task:
        words.append(f"--cpus-per-task={cluster.cpus_per_task}")
    lines = [" ".join(words)]
    mounts = [*cluster.container_mounts, *own_mounts(job)]
    if cluster.container == "pyxis":
        lines.append(f"--container-image={shlex.quote(cluster.container_image)}")
        lines.append(f"--container-mounts={shlex.quote(','.join(mounts))}")
    elif cluster.container == "apptainer":
        nvidia = " --nv" if job.num_accelerators_per_node else ""
        bind = shlex.quote(",".join(mounts))
        lines.append(f"apptainer exec{nvidia} --bind {bind} {shlex.quote(cluster.container_image)}")
    return [*(f"{line} \\" for line in lines), '"$python" "${call[@]}"']


def own_mounts(job: BatchJob) -> list[str]:
    """The folders of the run, at the same place inside a container."""
    folders = dict.fromkeys([job.work_folder, job.folder, job.code, *job.outputs])
    return [f"{folder}:{folder}" for folder in folders]


NO_RENDEZVOUS = "port_of() { :; }  # the processes do not meet"

RENDEZVOUS = """\
# The ranks meet on the first node of the allocation; the port changes with every start.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first_node" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first_node}
port_of() { export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + $1) % 12000)); }"""

RESTARTS = """\
suffix=${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}
started=$(date +%s)
asked_to_end=0
trap 'asked_to_end=1' TERM

note() { echo "nextstate $(date '+%F %T'): $*"; }

finish() {  # exit code; nothing starts this job again
  echo "$SLURM_JOB_ID $1 $started $(date +%s)" >"$job_folder/ended$suffix.tmp"
  mv -- "$job_folder/ended$suffix.tmp" "$job_folder/ended$suffix"
  exit "$1"
}

progress() {  # the step of the newest complete checkpoint, or the number of files made so far
  local newest=0 manifest step
  if [ -z "$checkpoints" ]; then
    [ ${#outputs[@]} = 0 ] && echo 0 || find "${outputs[@]}" -type f 2>/dev/null | wc -l
    return
  fi
  for manifest in "$checkpoints"/step_*/manifest.json; do
    [ -e "$manifest" ] || continue
    step=${manifest%/manifest.json}
    newest=$((10#${step##*/step_}))
  done
  echo "$newest"
}

give_up() {  # exit code
  note "stops: no progress beyond $now_at in $((tries + 1)) starts in a row; see the messages above"
  finish "$1"
}

queue_again() {
  [ "$may_requeue" = 1 ] || finish "$1"
  note "asks to be queued again"
  # Slurm ends this script; `exec` makes sure that nothing of it runs after that.
  scontrol requeue "$SLURM_JOB_ID" && exec sleep 300
  note "Slurm refused to queue it again"
  finish "$1"
}

is_near_time_limit() {
  local end
  end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e | head -n 1)" +%s 2>/dev/null) || return 1
  [ $((end - $(date +%s))) -lt $((2 * signal_seconds)) ]
}

while true; do
  now_at=$(progress) tries=0 last=-1
  [ -f "$job_folder/progress$suffix" ] && read -r tries last <"$job_folder/progress$suffix"
  if [ "$now_at" -gt "$last" ]; then tries=0; else tries=$((tries + 1)); fi
  echo "$tries $now_at" >"$job_folder/progress$suffix"
  [ "$tries" -gt "$max_restarts" ] && give_up 1
  echo "$(date +%s) job $SLURM_JOB_ID progress $now_at nodes $SLURM_JOB_NODELIST" >>"$job_folder/attempts$suffix"
  port_of "$(wc -l <"$job_folder/attempts$suffix")"
  note "starts at $now_at on $SLURM_JOB_NODELIST"
  export NEXTSTATE_STOPPED_FILE="$job_folder/stopped$suffix"
  rm -f -- "$NEXTSTATE_STOPPED_FILE"
@LAUNCH@
  code=$?
  # The first rank to leave with 3 makes srun end the others, and srun then reports how they ended.
  [ "$code" -gt 2 ] && [ -e "$NEXTSTATE_STOPPED_FILE" ] && code=3
  note "ended with $code at $(progress)"
  # Of a TERM only Slurm knows whether it is a cancellation or a preemption: it queues again by itself.
  [ "$asked_to_end" = 1 ] && exit 143
  case $code in
    0)
      for output in "${must_exist[@]}"; do
        [ -e "$output" ] && continue
        note "ended well, but did not write $output"
        finish 1
      done
      finish 0
      ;;
    2) finish 2 ;;  # the configuration's fault: trying again does not help
    3 | 138) queue_again 3 ;;  # saved on a signal; 138: SIGUSR1 before there was anything to save
  esac
  # A crash: here again if it had got on, on other nodes (perhaps) if not.
  if [ "$(progress)" -le "$now_at" ]; then
    [ "$tries" -ge "$max_restarts" ] && give_up "$code"
    queue_again "$code"
  elif is_near_time_limit; then
    queue_again "$code"
  fi
done"""
