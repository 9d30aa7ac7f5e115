"""How fast a step was and what it took: the figures that stand beside its loss in metrics.jsonl and the loggers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from data_pipeline.loading.batch import MicroBatch
from model.config import count_flops
from model.parallel.devices import device_of_driver
from training.config import TrainConfig
from training.contracts.batches import Ranks

GEMM_SIZE = 768  # of the products that a processor's rate is measured with
NUM_GEMMS = 5


class SpeedMeter:
    """Made once a run, on rank 0; asked after each step.

    FLOPs are those of `model.config.count_flops` times three: causal pairs of the documents as they are packed, no
    recomputation. They are counted on this replica's rows and taken for all replicas alike. The peak is the bf16 rate
    of the data sheet (`model/parallel/devices.py`); of a processor it is the rate of matrix products measured here, of which
    each rank has the share that the cores allow. A device that the table lacks has no MFU.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.peak_flops_per_second = _peak_flops_per_second(ranks.world_size)  # of all ranks together

    def figures(self, batches: Sequence[Any], num_tokens: int, seconds: float, data_seconds: float) -> dict[str, float]:
        """Of one step: tokens a second, wait for data, memory of this rank, TFLOP/s a rank and MFU where known."""
        found = {"data_seconds": round(data_seconds, 6), "memory_bytes": float(memory_bytes())}
        if num_tokens and seconds > 0:
            found["tokens_per_second"] = round(num_tokens / seconds, 1)
        flops = self._flops(batches)
        if flops and seconds > 0:
            rate = flops / seconds
            found["tflops_per_second"] = round(rate / 1e12 / self.ranks.world_size, 6)
            if self.peak_flops_per_second:
                found["mfu"] = round(rate / self.peak_flops_per_second, 5)
        return found

    def _flops(self, batches: Sequence[Any]) -> int:
        """Of the global batch; 0 for what is no plain row of documents."""
        if not all(type(batch) is MicroBatch for batch in batches):
            return 0
        forward = sum(count_flops(self.config.model, batch.cu_seqlens.tolist())["total"] for batch in batches)
        return 3 * forward * self.ranks.data_parallel_size


def device_name() -> str:
    """For people: "NVIDIA H100 80GB HBM3", or "CPU (2 cores)"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({psutil.cpu_count()} cores)"


def memory_bytes() -> int:
    """What this rank holds at the most on its accelerator, or now in the memory of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # half a microsecond; psutil takes ten
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return int(psutil.Process().memory_info().rss)


def _peak_flops_per_second(world_size: int) -> float:
    if torch.cuda.is_available():
        device = device_of_driver(torch.cuda.get_device_name())
        return world_size * device.bf16_flops_per_second if device else 0.0
    at_once = min(world_size, max(1, (psutil.cpu_count() or 1) // torch.get_num_threads()))
    return at_once * measured_gemm_flops_per_second()


def measured_gemm_flops_per_second() -> float:
    """The best of a few float32 products on this process's threads; some hundredths of a second."""
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE)
    fastest = float("inf")
    for _ in range(NUM_GEMMS):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * GEMM_SIZE**3 / fastest
