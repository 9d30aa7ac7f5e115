"""What a cluster's node has to offer: fabric, scheduler, storage, clocks, limits, and whether processes can talk."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

from launch.doctor.findings import Finding, gibibytes
from model.errors import UserError

STORAGE_BYTES = 64 * 2**20
MIN_STORAGE_MEGABYTES_PER_SECOND = 50.0
MAX_CLOCK_SKEW_SECONDS = 2.0  # Slurm tells its time in whole seconds
MIN_SHARED_MEMORY_BYTES = 2**30
MIN_OPEN_FILES = 4096
COLLECTIVE_TIMEOUT_SECONDS = 30.0
COLLECTIVE_BYTES = 4 * 2**20


def examine_cluster(folder: Path, collective_seconds: float) -> list[Finding]:
    """All findings of this module; `folder` is where runs are written. Nothing stays behind."""
    findings = [fabric(), *slurm_findings(), storage_speed(folder), clock_against_storage(folder)]
    findings += [shared_memory(), open_files(), locked_memory()]
    if collective_seconds > 0:
        findings.append(collectives(collective_seconds))
    return findings


def fabric() -> Finding:
    """InfiniBand or RoCE adapters with their rates, else the network interfaces that are up."""
    adapters = []
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        rate, state = ((port / name).read_text().strip() for name in ("rate", "state"))
        adapters.append((f"{port.parent.parent.name}:{port.name} {rate}", "ACTIVE" in state))
    if adapters:
        down = [text for text, is_active in adapters if not is_active]
        return Finding(
            "fabric",
            not down,
            ", ".join(text for text, _ in adapters) + (f"; down: {', '.join(down)}" if down else ""),
            "bring the port up (ibstat), or name the others in cluster.infiniband_devices",
        )
    interfaces = [
        f"{name} {status.speed or '?'} Mb/s"
        for name, status in psutil.net_if_stats().items()
        if status.isup and name != "lo"
    ]
    return Finding("fabric", True, f"no InfiniBand; {', '.join(sorted(interfaces)) or 'no interface but the loopback'}")


def slurm_findings() -> list[Finding]:
    """Whether jobs can be submitted from here, where to, and whether the controller's clock agrees."""
    if shutil.which("sbatch") is None:
        cure = "needed on a cluster only: log in to a submit host"
        return [Finding("slurm", False, "no sbatch on PATH", cure)]
    from launch.cluster import slurm

    try:
        answer = slurm.run_tool(["sinfo", "--noheader", "--format=%R %a %D %T"])
        config = slurm.run_tool(["scontrol", "show", "config"])
    except UserError as error:
        return [Finding("slurm", False, error.what, error.fix)]
    if answer.returncode != 0:
        cure = "scontrol ping; check SLURM_CONF, munge and the network to the controller"
        return [Finding("slurm", False, slurm.explain(answer.stderr), cure)]
    partitions = "; ".join(" ".join(line.split()) for line in answer.stdout.splitlines())
    found = [Finding("slurm", True, f"partitions (name, up, nodes, state): {partitions}")]
    told = re.search(r"Configuration data as of (\S+)", config.stdout)
    if told:
        skew = datetime.fromisoformat(told.group(1)).timestamp() - time.time()
        found.append(clock_finding("slurm clock", skew, "the controller"))
    return found


def clock_finding(name: str, skew_seconds: float, other: str) -> Finding:
    return Finding(
        name,
        abs(skew_seconds) <= MAX_CLOCK_SKEW_SECONDS,
        f"{skew_seconds:+.1f} s against {other}",
        "start chrony or ntpd on this host: munge refuses jobs, and logs lie, when clocks differ",
    )


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the lowest one above it that there is."""
    whole = folder.absolute()  # not `resolve`, which raises for links in a circle
    return next(place for place in (whole, *whole.parents) if place.is_dir())


def storage_speed(folder: Path) -> Finding:
    """Writes 64 MiB to where runs go, to the disk and not only to memory, and reads them back."""
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_existing(folder), prefix=".doctor-") as file:
            started = time.perf_counter()
            for _ in range(STORAGE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            write_seconds = time.perf_counter() - started
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(len(block)):
                pass
            read_seconds = time.perf_counter() - started
    except OSError as error:
        return Finding("storage", False, str(error), "free space, give permission, or choose another run_folder")
    write, read = (STORAGE_BYTES / 1e6 / seconds for seconds in (write_seconds, read_seconds))
    return Finding(
        "storage",
        write >= MIN_STORAGE_MEGABYTES_PER_SECOND,
        f"{write:,.0f} MB/s written, {read:,.0f} MB/s read",
        "checkpoints will be slow: choose a run_folder on the parallel file system",
    )


def clock_against_storage(folder: Path) -> Finding:
    """A file server stamps files with its own clock."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_existing(folder), prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError as error:
        return Finding("storage clock", False, str(error), "choose another run_folder")
    return clock_finding("storage clock", skew, "the file system of the runs")


def shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", False, "no /dev/shm", "mount a tmpfs there; in a container --shm-size=8g")
    size = shutil.disk_usage("/dev/shm")
    return Finding(
        "shared memory",
        size.free >= MIN_SHARED_MEMORY_BYTES,
        f"{gibibytes(size.free)} free of {gibibytes(size.total)} in /dev/shm",
        "in a container: --shm-size=8g",
    )


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    within = hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES
    return Finding(
        "open files",
        soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES,
        f"{soft} (at most {hard})",
        f"{f'ulimit -n {MIN_OPEN_FILES}, ' if within else ''}LimitNOFILE={MIN_OPEN_FILES} of slurmd's unit, or --ulimit nofile of a container",
    )


def locked_memory() -> Finding:
    """InfiniBand registers memory, which must not be limited; without adapters the limit does not matter."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_unlimited = soft == resource.RLIM_INFINITY
    needs = Path("/sys/class/infiniband").exists()
    return Finding(
        "locked memory",
        is_unlimited or not needs,
        "unlimited" if is_unlimited else gibibytes(soft),
        "ulimit -l unlimited, or LimitMEMLOCK=infinity of slurmd's unit",
    )


def collectives(seconds: float) -> Finding:
    """All-reduces between processes of this node: one an accelerator over NCCL, or two over gloo."""
    with tempfile.TemporaryDirectory(prefix="nextstate-doctor-") as name:
        cure = "the loopback interface must be up; GLOO_SOCKET_IFNAME=lo, or NCCL_DEBUG=INFO tells more"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        command = [sys.executable, "-m", "launch.doctor.collective_test", str(Path(name) / "store"), str(seconds)]
        try:
            answer = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=COLLECTIVE_TIMEOUT_SECONDS + seconds,
            )
        except subprocess.TimeoutExpired:
            return Finding("collectives", False, f"no answer within {COLLECTIVE_TIMEOUT_SECONDS:.0f} s", cure)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("collectives", False, last, cure)
    told = json.loads(answer.stdout.strip().splitlines()[-1])
    return Finding(
        "collectives",
        True,
        "{backend}: {processes} processes, {megabytes_per_second:,.0f} MB/s".format(**told)
        + ", {small_microseconds:,.0f} us a small one".format(**told),
    )
