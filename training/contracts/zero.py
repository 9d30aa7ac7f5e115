"""What a run may ask of the deepspeed engine, and which of it is refused: rules as data. Imports no torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import Problems

KEY = "deepspeed"
STAGES = (1, 2, 3)
DEVICES = ("none", "cpu")
# Of an offloaded optimizer, a parameter: master weights, two moments and the gradient that it steps with, in float32.
HOST_STATE_BYTES = 16


@dataclass
class DeepSpeedConfig:
    """ZeRO: what of the training state is cut over the data-parallel ranks. Read with engine=deepspeed only."""

    zero_stage: int = 3  # 1: optimizer state | 2: and gradients | 3: and weights
    offload_optimizer: str = "none"  # none | cpu: master weights and moments in host memory, the step computed there
    offload_weights: str = "none"  # none | cpu: this rank's part of the weights in host memory; stage 3
    compiled_adam: bool = False  # DeepSpeed's own Adam for the step on the host, compiled at the first start
    bucket_elements: int = 500_000_000  # gradients that are reduced at once
    live_elements: int = 1_000_000_000  # most weights that stay gathered for their next use; stage 3
    persistent_elements: int = 100_000  # smaller parameters are never cut; stage 3
    extra: dict[str, Any] = field(default_factory=dict)  # keys of DeepSpeed's own configuration, those of `EXTRA_KEYS`


# Keys of DeepSpeed's own configuration that change how fast something runs and what it reports, never the result.
EXTRA_KEYS = (
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.zero_hpz_partition_size",
)
# Why some others are refused; all that are in neither list are set by the engine.
REFUSED_KEYS = {
    "optimizer": "the engine brings AdamW (stage.optimizer); DeepSpeed's Muon clips the orthogonalised update in place of "
    "the gradient under ZeRO, without an error",
    "scheduler": "the rate is stage.optimizer's; DeepSpeed's WarmupCosineLR takes its first step with rate 0",
    "sequence_parallel_size": "DeepSpeed's Ulysses multiplies the gradient by its size under ZeRO-1 and ZeRO-2, without "
    "an error",
    "fp16": "model.dtype says in which numbers the model computes",
    "bf16": "model.dtype says in which numbers the model computes",
    "data_types": "gradients are summed in float32; DeepSpeed's default under bfloat16 is bfloat16",
    "pipeline": "this engine has no pipeline",
    "tensor_parallel": "parallel.tensor cuts the layers",
}


BUILD_TOOLS = ("c++", "ninja")


def can_compile() -> bool:
    """What torch needs to build an extension is there: a compiler on the path, ninja there or beside this Python."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return all(shutil.which(tool, path=beside) for tool in BUILD_TOOLS)


@dataclass(frozen=True)
class Refusal:
    """`holds(options)` is a problem of `key`."""

    holds: Callable[[DeepSpeedConfig], bool]
    key: str
    message: str
    fix: str


REFUSALS = (
    Refusal(
        lambda options: options.zero_stage == 0,
        "zero_stage",
        "stage 0 is no ZeRO: in bfloat16 its optimizer starts one step late in the bias correction, and it reports no norm",
        f"{KEY}.zero_stage=1",
    ),
    Refusal(
        lambda options: options.zero_stage not in (0, *STAGES),
        "zero_stage",
        "choices are 1, 2, 3",
        f"{KEY}.zero_stage=3",
    ),
    Refusal(
        lambda options: "nvme" in (options.offload_optimizer, options.offload_weights),
        "offload_optimizer",
        "NVMe needs DeepSpeed's async_io, which is compiled against libaio at the start; this engine compiles nothing",
        f"{KEY}.offload_optimizer=cpu",
    ),
    Refusal(
        lambda options: options.offload_optimizer not in (*DEVICES, "nvme"),
        "offload_optimizer",
        f"choices are {', '.join(DEVICES)}",
        f"{KEY}.offload_optimizer=cpu",
    ),
    Refusal(
        lambda options: options.offload_weights not in (*DEVICES, "nvme"),
        "offload_weights",
        f"choices are {', '.join(DEVICES)}",
        f"{KEY}.offload_weights=none",
    ),
    Refusal(
        lambda options: options.offload_weights == "cpu" and options.zero_stage in (1, 2),
        "offload_weights",
        "weights that are not cut stay on the device; stage 3 cuts them",
        f"{KEY}.zero_stage=3",
    ),
    Refusal(
        lambda options: options.compiled_adam and options.offload_optimizer != "cpu",
        "compiled_adam",
        "it steps what is in host memory, and the optimizer is not there",
        f"{KEY}.offload_optimizer=cpu, or {KEY}.compiled_adam=false",
    ),
    Refusal(
        lambda options: options.compiled_adam and not can_compile(),
        "compiled_adam",
        f"{' and '.join(BUILD_TOOLS)} compile it, and not all of them are on this machine",
        f"pip install 'nextstate[deepspeed-compiled]' and a C++ compiler (Debian: g++), or {KEY}.compiled_adam=false",
    ),
    Refusal(
        lambda options: options.bucket_elements < 1,
        "bucket_elements",
        "must be positive",
        f"{KEY}.bucket_elements=500000000",
    ),
    Refusal(
        lambda options: min(options.live_elements, options.persistent_elements) < 0,
        "live_elements",
        "must not be negative, nor must persistent_elements",
        f"{KEY}.live_elements=1000000000",
    ),
)


def check(options: DeepSpeedConfig, problems: Problems) -> None:
    """Of a run with engine=deepspeed."""
    for refusal in REFUSALS:
        if refusal.holds(options):
            problems.add(f"{KEY}.{refusal.key}", refusal.message, refusal.fix)
    for name in dotted(options.extra):
        if name not in EXTRA_KEYS:
            reason = REFUSED_KEYS.get(name.partition(".")[0], "the engine sets it, or its effect is not tested")
            problems.add(f"{KEY}.extra.{name}", reason, f"leave it out; these are passed on: {', '.join(EXTRA_KEYS)}")


def dotted(values: dict[str, Any]) -> list[str]:
    """Names of the settings: sections of `zero_optimization` are looked into, others are one setting."""
    names = []
    for name, value in values.items():
        if name == "zero_optimization" and isinstance(value, dict):
            names += [f"{name}.{inner}" for inner in value]
        else:
            names.append(str(name))
    return names


def host_bytes(options: DeepSpeedConfig, parameters: int, trained: int, dtype_bytes: int) -> float:
    """Of host memory, over all ranks, for a model with `parameters`, of which `trained` learn; 0 without offload."""
    optimizer = trained * HOST_STATE_BYTES if options.offload_optimizer == "cpu" else 0
    weights = parameters * dtype_bytes if options.offload_weights == "cpu" else 0
    return float(optimizer + weights)
