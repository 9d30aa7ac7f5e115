"""Where the ranks of a stage will run, as the plan sees it: the accelerators of a cluster, or this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from launch.cluster.profile import ClusterConfig
from launch.plan.memory import usable_bytes
from model.parallel.devices import DEVICES, Device, device_of_driver, find_device

# What a rank's process takes on a CPU before it holds a tensor: Python, torch, megatron-core. Measured on toy stages.
PROCESS_BYTES = 0.5e9
# More than a core of today does: two AVX-512 units of 16 float32 multiply-adds at 4 GHz. A time that comes out of it
# is the least that is possible, which is what a refusal needs.
CORE_FLOPS_PER_SECOND = 256e9
HOST_BYTES_PER_SECOND = 1e12
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Place:
    """Accelerators, or the processor of this machine, whose ranks share one memory."""

    title: str
    device: Device
    cluster: ClusterConfig
    is_host: bool = False
    has_known_speed: bool = True
    fits_with: str = ""  # what would make a larger job possible

    @property
    def usable_bytes(self) -> float:
        """Of one accelerator, or of the whole host."""
        return self.device.memory_bytes if self.is_host else usable_bytes(self.device.memory_bytes)

    def fills_nodes(self, world_size: int) -> bool:
        """A job of several nodes has equally many ranks on each."""
        per_node = self.cluster.tasks_per_node or self.cluster.accelerators_per_node
        return self.is_host or world_size <= per_node or world_size % per_node == 0


def place_of(cluster: ClusterConfig | None) -> Place:
    """Of a job of this cluster; `kind=local` and None mean this machine. Raises `UserError` for an unknown device."""
    if cluster is None or cluster.kind == "local":
        return this_machine()
    device = find_device(cluster.device)
    title = f"{cluster.num_accelerators:,} x {device.title}"
    return Place(title, device, cluster, fits_with="cluster.num_accelerators=N of a larger cluster")


def this_machine() -> Place:
    accelerators = visible_accelerators()
    if not accelerators:
        return host(memory_limit_bytes(), num_cores())
    name, memory_bytes = accelerators[0]
    count = len(accelerators)
    known = device_of_driver(name)
    base = known or replace(DEVICES["h100"], name=name)  # for the shape of it: its speed is told to be unknown
    device = replace(base, title=name, memory_bytes=memory_bytes)
    cluster = ClusterConfig(
        name="local",
        kind="local",
        num_accelerators=count,
        accelerators_per_node=count,
        host_memory_gigabytes=memory_limit_bytes() / 1e9,
    )
    return Place(
        f"{count} x {name} of this machine",
        device,
        replace(cluster, accelerators_per_fast_domain=count),
        has_known_speed=known is not None,
        fits_with="nextstate submit cluster=NAME for a larger machine",
    )


def host(memory_bytes: float, cores: int) -> Place:
    """A machine without accelerators."""
    title = f"this machine ({cores} cores, {memory_bytes / 1e9:.0f} GB, no accelerator)"
    flops, rate = cores * CORE_FLOPS_PER_SECOND, HOST_BYTES_PER_SECOND
    device = Device("host", title, flops, 0, memory_bytes, rate, rate, flops, 0, flops, "bounds from above")
    cluster = ClusterConfig(
        name="local",
        kind="local",
        num_accelerators=cores,
        accelerators_per_node=cores,
        accelerators_per_fast_domain=cores,
        host_memory_gigabytes=memory_bytes / 1e9,
    )
    return Place(
        title,
        device,
        cluster,
        is_host=True,
        fits_with="a smaller model (model=toy), or nextstate submit cluster=NAME for a larger machine",
    )


def visible_accelerators() -> list[tuple[str, float]]:
    """(name, bytes of memory) by NVIDIA's own tool, so that no library has to be imported; none with a CPU build."""
    tool = shutil.which("nvidia-smi")
    if tool is None or is_cpu_build():
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    found = [line.rpartition(",") for line in answer.stdout.splitlines() if "," in line]
    accelerators = [
        (name.strip(), float(mebibytes) * 2**20) for name, _, mebibytes in found if mebibytes.strip().isdigit()
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return accelerators if visible is None else accelerators[: len([one for one in visible.split(",") if one.strip()])]


def is_cpu_build() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return True


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_bytes() -> float:
    """Of the machine, or of the control group that this process lives in."""
    limit = float(psutil.virtual_memory().total)
    for path in CGROUP_LIMITS:
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limit = min(limit, float(text))
    return limit
