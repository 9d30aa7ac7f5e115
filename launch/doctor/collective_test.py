"""`python -m launch.doctor.collective_test STORE SECONDS`: all-reduces between local processes; one JSON object on stdout."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

LARGE_VALUES = 2**20  # 4 MiB of float32
SMALL_CALLS = 100


def measure(rank: int, num_processes: int, store: str, seconds: float, target: str) -> None:
    """One process. Rank 0 writes megabytes reduced a second and microseconds of a small all-reduce to `target`."""
    import torch
    import torch.distributed as distributed

    has_accelerator = torch.cuda.is_available()
    device = torch.device("cuda", rank) if has_accelerator else torch.device("cpu")
    if has_accelerator:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if has_accelerator else "gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes
    )
    small, large = torch.ones(1, device=device), torch.ones(LARGE_VALUES, device=device)
    distributed.all_reduce(small)
    assert small.item() == num_processes
    started = time.perf_counter()
    for _ in range(SMALL_CALLS):
        distributed.all_reduce(small)
    small_seconds = (time.perf_counter() - started) / SMALL_CALLS
    num_calls, go_on = 0, torch.ones(1, device=device)
    started = time.perf_counter()
    while go_on.item():
        distributed.all_reduce(large)
        num_calls += 1
        # Rank 0's clock decides for all.
        go_on.fill_(float(time.perf_counter() - started < seconds))
        distributed.broadcast(go_on, 0)
    passed = time.perf_counter() - started
    if rank == 0:
        answer = {
            "backend": distributed.get_backend(),
            "processes": num_processes,
            "megabytes_per_second": num_calls * LARGE_VALUES * 4 / 1e6 / passed,
            "small_microseconds": small_seconds * 1e6,
        }
        Path(target).write_text(json.dumps(answer))
    distributed.destroy_process_group()


def main(store: str, seconds: float) -> dict[str, Any]:
    import torch
    import torch.multiprocessing as multiprocessing

    num_processes = max(2, torch.cuda.device_count())
    if torch.cuda.is_available():
        num_processes = torch.cuda.device_count()
    target = f"{store}.json"
    multiprocessing.spawn(measure, (num_processes, store, seconds, target), nprocs=num_processes)
    answer: dict[str, Any] = json.loads(Path(target).read_text())
    return answer


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]))))
