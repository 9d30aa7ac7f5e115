"""Tokens per second of one training step on the CPU, by layout.

    python benchmarks/cpu_step.py [--rows 8] [--steps 5] [--layouts one tensor pipeline data]

The toy model (the defaults of ModelConfig), rows of 512 tokens packed with documents of 30 to 70 tokens, float32,
AdamW. `one` is one process with two threads, the others two processes with one thread each. Also printed: CPU
seconds per step summed over processes, which say more than wall seconds on a machine that is shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "data": {"data": 2},
}
ROW_TOKENS = 512


def synthetic_batch(num_rows: int, seed: int) -> Any:
    """A micro-batch of full rows with 8 to 15 documents each."""
    from data_pipeline.loading.batch import MicroBatch

    rng = np.random.default_rng(seed)
    bounds = [0]
    for row in range(num_rows):
        start, end = row * ROW_TOKENS, (row + 1) * ROW_TOKENS
        while start < end:
            start = min(end, start + int(rng.integers(30, 70)))
            bounds.append(start)
    cu_seqlens = np.array(bounds, dtype=np.int32)
    shape = (num_rows, ROW_TOKENS)
    tokens = rng.integers(0, 1500, shape)
    lengths = np.diff(cu_seqlens)
    positions = np.arange(num_rows * ROW_TOKENS) - np.repeat(cu_seqlens[:-1], lengths)
    return MicroBatch(
        tokens=tokens,
        labels=np.roll(tokens, -1, axis=1),
        loss_weights=np.ones(shape, np.float32),
        loss_classes=rng.integers(0, 3, shape).astype(np.uint8),
        sources=np.zeros(shape, np.uint16),
        position_ids=positions.reshape(shape),
        cu_seqlens=cu_seqlens,
    )


def measure(
    rank: int, world_size: int, store: str, layout: dict[str, int], options: argparse.Namespace, answers: Any
) -> None:
    import torch

    torch.set_num_threads(2 if world_size == 1 else 1)
    from model.config import ModelConfig
    from model.parallel import groups
    from training.config import ParallelConfig, StageConfig, TrainConfig
    from training.engines.megatron.engine import MegatronEngine
    from training.objectives.next_token import NextToken

    stage = StageConfig(
        sequence_length=ROW_TOKENS, micro_batch_size=options.micro_batch, global_batch_size=options.rows
    )
    model = ModelConfig(dtype=options.dtype)
    config = TrainConfig(model=model, stage=stage, parallel=ParallelConfig(**layout))
    groups.initialize(
        tensor=layout.get("tensor", 1),
        pipeline=layout.get("pipeline", 1),
        rank=rank,
        world_size=world_size,
        init_method=store,
    )
    objective = NextToken(config, NextToken.Options())
    objective.source_names = ["synthetic"]
    engine = MegatronEngine(config, objective)
    rows_here = options.rows // engine.ranks.data_parallel_size
    size = min(options.micro_batch, rows_here)
    batches = [synthetic_batch(size, seed) for seed in range(rows_here // size)]

    def step() -> None:
        _, _, gradient_norm = engine.forward_backward(batches, objective).read()
        engine.optimizer_step(1e-4, gradient_norm)

    for _ in range(2):
        step()
    wall, cpu = [], time.process_time()
    for _ in range(options.steps):
        engine.ranks.barrier()
        start = time.perf_counter()
        step()
        wall.append(time.perf_counter() - start)
    answers.put((rank, float(np.median(wall)), (time.process_time() - cpu) / options.steps))
    if options.profile and rank == 0:
        profile(step)
    engine.close()


def collect(workers: list[Any], answers: Any) -> list[tuple[int, float, float]]:
    """One answer from each worker; stops when one of them fails."""
    results = []
    while len(results) < len(workers):
        try:
            results.append(answers.get(timeout=1))
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                for worker in workers:
                    worker.terminate()
                raise SystemExit("a worker failed") from None
    for worker in workers:
        worker.join()
    return results


def profile(step: Callable[[], None]) -> None:
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="rows of the global batch")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of one forward pass")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--profile", action="store_true", help="print a profile of one step (single process)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in options.layouts:
        world_size = int(np.prod(list(LAYOUTS[name].values()) or [1]))
        answers = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world_size, f"file://{folder}/store", LAYOUTS[name], options, answers)
            workers = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(world_size)]
            for worker in workers:
                worker.start()
            results = collect(workers, answers)
        wall = max(result[1] for result in results)
        cpu = sum(result[2] for result in results)
        tokens = options.rows * ROW_TOKENS
        print(
            f"{name:<10} {tokens / wall:10.0f} tokens/s  {wall:7.3f} s/step  {cpu:7.3f} CPU s/step  "
            f"{tokens / cpu:8.0f} tokens per CPU second",
            flush=True,
        )


if __name__ == "__main__":
    main()
