"""How jobs are submitted to a cluster, and what their processes find there: fields of `conf/cluster/*.yaml`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from model.errors import Problems

KINDS = ("slurm", "local")
CONTAINERS = ("none", "pyxis", "apptainer")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
TIME_LIMIT = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE")
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
# sbatch options that the script writes itself, and the key that decides them.
WRITTEN = {
    "job-name": "name",
    "comment": "",
    "output": "",
    "open-mode": "",
    "array": "shares or calls",
    "time": "cluster.time_limit",
    "nodes": "parallel.* and cluster.tasks_per_node",
    "ntasks": "parallel.*",
    "ntasks-per-node": "cluster.tasks_per_node",
    "signal": "cluster.signal_seconds",
    "mem": "cluster.memory",
    "gres": "cluster.gres",
    "cpus-per-task": "cluster.cpus_per_task",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "exclusive": "cluster.exclusive",
    **{name: f"cluster.{name}" for name in ("partition", "account", "qos", "constraint", "reservation", "exclude")},
}
# Variables that each rank is given: one value for all of them would make every rank the same one.
OF_A_RANK = re.compile(r"(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_\w+)")
DIRECTIVES = ("partition", "account", "qos", "constraint", "reservation", "exclude")


@dataclass
class Scheduling:
    """What a batch script asks the scheduler for, and the environment it prepares."""

    kind: str = "slurm"  # slurm | local: processes of this machine
    partition: str = ""  # empty: the cluster's default; so for the next five
    account: str = ""  # that is charged
    qos: str = ""  # quality of service
    constraint: str = ""  # features that nodes must have, as sbatch takes them
    reservation: str = ""  # nodes held for you, by name
    exclude: str = ""  # nodes not to be used, as sbatch takes them
    time_limit: str = "24:00:00"  # minutes, hours:minutes:seconds, or days-hours
    signal_seconds: int = 300  # before the time limit: save a checkpoint, ask to be queued again
    requeue: bool = True  # after the time limit, a preemption, the loss of a node
    max_restarts: int = 3  # in a row without a newer checkpoint; then the job stops
    exclusive: bool = True  # whole nodes
    tasks_per_node: int = 0  # ranks of a node; 0: one an accelerator
    cpus_per_task: int = 0  # 0: the cluster's default
    memory: str = ""  # of a node, as sbatch takes it; "0" is all, empty the cluster's default
    gres: str = "gpu"  # what accelerators are called here (gpu, gpu:h100); empty: none are asked for
    array_limit: int = 0  # tasks of a job array that run at a time; 0: no limit
    options: dict[str, str] = field(default_factory=dict)  # further sbatch options, without dashes
    modules: list[str] = field(default_factory=list)  # environment modules to load
    environment: dict[str, str] = field(default_factory=dict)  # variables of every process
    network_interface: str = ""  # of gloo's and NCCL's connections; empty: they choose
    infiniband_devices: str = ""  # adapters that NCCL may use; empty: all
    container: str = "none"  # none | pyxis (with enroot) | apptainer
    container_image: str = ""  # a .sqsh file or registry name (pyxis), a .sif file (apptainer)
    container_mounts: list[str] = field(default_factory=list)  # outside:inside, besides the run
    python: str = ""  # interpreter on the nodes or in the container; empty: the one of this call

    def validate_scheduling(self, problems: Problems, key: str = "cluster") -> None:
        problems.check(self.kind in KINDS, f"{key}.kind", f"unknown value {self.kind!r}", f"{key}.kind=slurm")
        problems.check(
            TIME_LIMIT.fullmatch(self.time_limit) is not None,
            f"{key}.time_limit",
            f"{self.time_limit!r} is no time limit",
            f"{key}.time_limit='24:00:00'",
        )
        for name in ("max_restarts", "tasks_per_node", "cpus_per_task", "array_limit"):
            value = getattr(self, name)
            problems.check(value >= 0, f"{key}.{name}", f"must not be negative, got {value}", f"{key}.{name}=0")
        problems.check(
            0 < self.signal_seconds <= 65535,
            f"{key}.signal_seconds",
            f"Slurm takes 1 to 65535 seconds, got {self.signal_seconds}",
            f"{key}.signal_seconds=300",
        )
        problems.check(
            self.signal_seconds < limit_seconds(self.time_limit),
            f"{key}.time_limit",
            f"{self.time_limit} is over before the job may start: it is told to end {self.signal_seconds} seconds earlier",
            f"{key}.time_limit='24:00:00', or a lower {key}.signal_seconds",
        )
        problems.check(
            not self.memory or MEMORY.fullmatch(self.memory) is not None,
            f"{key}.memory",
            f"{self.memory!r} is no amount of memory",
            f"{key}.memory=500G",
        )
        self._validate_container(problems, key)
        self._validate_names(problems, key)
        for text in self.texts():
            problems.check(text.isprintable(), key, f"a control character in {text!r}", "remove it")

    def _validate_names(self, problems: Problems, key: str) -> None:
        """Of variables and of further options: those that could be, and that the job does not set itself."""
        for name in self.environment:
            problems.check(
                re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None,
                f"{key}.environment",
                f"{name!r} cannot name a variable",
            )
            problems.check(
                OF_A_RANK.fullmatch(name) is None,
                f"{key}.environment.{name}",
                "is set by the job, for each rank another value",
                f"leave it out; parallel.* and {key}.tasks_per_node say how many ranks there are",
            )
        for name in self.options:
            problems.check(
                re.fullmatch(r"[a-z][a-z0-9-]*", name) is not None,
                f"{key}.options",
                f"{name!r} is no sbatch option; write it without dashes in front",
            )
            problems.check(
                name not in WRITTEN,
                f"{key}.options.{name}",
                "is written by the script itself",
                f"leave it out; it comes from {WRITTEN.get(name)}" if WRITTEN.get(name) else "leave it out",
            )

    def _validate_container(self, problems: Problems, key: str) -> None:
        problems.check(
            self.container in CONTAINERS,
            f"{key}.container",
            f"unknown value {self.container!r}",
            f"{key}.container={'|'.join(CONTAINERS)}",
        )
        has_image = bool(self.container_image)
        problems.check(
            has_image == (self.container != "none"),
            f"{key}.container_image",
            f"does not fit container={self.container}",
            f"{key}.container=pyxis with an image, or none without",
        )
        for mount in self.container_mounts:
            problems.check(
                ":" in mount and "," not in mount, f"{key}.container_mounts", f"{mount!r} is not outside:inside"
            )

    def texts(self) -> list[str]:
        """Every free text of a profile, as it reaches a batch script."""
        names = (*DIRECTIVES, "memory", "gres", "network_interface", "infiniband_devices", "container_image", "python")
        texts = [getattr(self, name) for name in names]
        texts += [*self.modules, *self.container_mounts]
        for mapping in (self.options, self.environment):
            texts += mapping.values()
        return texts


def limit_seconds(time_limit: str) -> float:
    """Of a time limit as Slurm takes it; infinite for none and for what is no time limit."""
    if TIME_LIMIT.fullmatch(time_limit) is None or not time_limit[0].isdigit():
        return float("inf")
    days, has_days, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if has_days:  # days-hours:minutes:seconds
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes:seconds
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
