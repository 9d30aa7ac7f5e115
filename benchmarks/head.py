"""The loss behind the last layer: full logits and `token_losses` (before) beside the chunked head (after).

    python -m benchmarks.head [--tokens 2048] [--rounds 3] [--hidden 64] [--whole 32768] [--whole-hidden 5120]

Over the 282,926 ids of Emu3.5, forward and backward, from hidden states to their gradient and the weight's, in float32 and
bfloat16, on one and two tensor-parallel ranks. Three figures:

- counted: peak bytes of one rank at the size of the published model. Every operation runs on the meta device over torch's
  fake process group, so nothing is computed; the sizes of living storages are added up. What a kernel uses inside is
  not seen.
- measured: growth of the resident size's peak (VmHWM of /proc/self/status) at `--tokens` x `--hidden`, with the count of
  the same case beside it, which shows what the counting is worth.
- time: CPU seconds (of the process, kernel included) of each way / before, of runs that take turns in the same processes,
  median of `--rounds`. "recomputed": a loss whose weights are not known beforehand, which computes the logits twice.

Before, the float32 logits of 32,768 tokens take 37 GB, which most machines for tests have not; hence the counting. Both
ways end with the weight's gradient added to the float32 one of megatron-core's data-parallel wrapper; that one is no part of
the figures. bfloat16 products are emulated on most CPUs, so that their time says little: `--dtypes` leaves them out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_step import collect

GIB = 2**30


class Case(NamedTuple):
    dtype: str
    tensor: int
    chunk_tokens: int | None = None  # the head's own choice

    @property
    def name(self) -> str:
        return f"{self.dtype} tensor={self.tensor}"


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


class LivingBytes(TorchDispatchMode):
    """Adds up the storages that operations make while it is entered, and remembers the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage not in self.storages:
                self.storages.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, torch.Tensor))


def counted_gib(case: Case, num_tokens: int, hidden_size: int) -> dict[str, float]:
    """Peak GiB of one rank by way, from shapes alone; this process takes the place of the first rank."""
    from model.parallel import groups

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.tensor)
    try:
        groups.initialize(tensor=case.tensor)
        peaks = {}
        with torch.device("meta"):
            for name, way in prepare(case, num_tokens, hidden_size).items():
                with LivingBytes() as living:
                    way()
                peaks[name] = living.peak / GIB
        return peaks
    finally:
        groups.destroy()


def prepare(case: Case, num_tokens: int, hidden_size: int) -> dict[str, Callable[[], None]]:
    """The ways, by name, on this rank's inputs: the last is that of losses whose weights are not known beforehand."""
    from benchmarks.full_logits import token_losses
    from model.backbone.head import TokenScores, gathered_hidden
    from model.backbone.transformer import DTYPES
    from model.vocabulary import Vocabulary, VocabularyConfig

    vocabulary = Vocabulary.from_config(VocabularyConfig(preset="emu35"))
    dtype = DTYPES[case.dtype]
    hidden = torch.randn(num_tokens, 1, hidden_size).to(dtype).requires_grad_()
    weight: Any = torch.randn(vocabulary.padded_size // case.tensor, hidden_size).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # as megatron-core's data-parallel wrapper does
    ids = torch.zeros(num_tokens, dtype=torch.int64) + 200_000
    ones = torch.ones(num_tokens)

    def before() -> None:
        logits = torch.matmul(gathered_hidden(hidden, sequence_parallel=False), weight.t())
        losses = token_losses(logits, ids[:, None], vocabulary)
        del logits
        losses.sum().backward()
        weight.main_grad.add_(weight.grad)

    def after() -> None:
        TokenScores(hidden, weight, vocabulary, chunk_tokens=case.chunk_tokens).weighted_losses(ids, ones)[0].backward()

    def recomputed() -> None:
        (-TokenScores(hidden, weight, vocabulary, chunk_tokens=case.chunk_tokens).log_probs(ids)).sum().backward()

    def clean(way: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            way()
            hidden.grad = weight.grad = None  # what is resident afterwards is what was before

        return run

    return {"before": clean(before), "after": clean(after), "recomputed": clean(recomputed)}


def measured_gib(way: Callable[[], None]) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    resident = resident_bytes("VmRSS")
    way()
    return (resident_bytes("VmHWM") - resident) / GIB


def time_ratios(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    ratios: dict[str, list[float]] = {name: [] for name in ways if name != "before"}
    for turn in range(rounds):
        seconds = {}
        for name in sorted(ways, reverse=turn % 2 == 0):  # who goes first changes
            torch.distributed.barrier()
            started = time.process_time()
            ways[name]()
            torch.distributed.barrier()
            seconds[name] = time.process_time() - started
        for name, found in ratios.items():
            found.append(seconds[name] / seconds["before"])
    return {f"time of {name}": statistics.median(found) for name, found in ratios.items()}


def work(rank: int, case: Case, store: str, options: argparse.Namespace, answers: Any) -> None:
    """Measurements of one rank: (rank, {what: figure})."""
    torch.set_num_threads(1)
    from model.parallel import groups

    groups.initialize(tensor=case.tensor, rank=rank, world_size=case.tensor, init_method=store)
    ways = prepare(case, options.tokens, options.hidden)
    figures = {name: measured_gib(way) for name, way in ways.items()}
    if options.rounds:
        figures |= time_ratios(ways, options.rounds)
    answers.put((rank, figures))
    groups.destroy()


def measure(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """The worst rank's figures, of fresh processes."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=work, args=(rank, case, f"file://{folder}/store", options, answers))
            for rank in range(case.tensor)
        ]
        for worker in workers:
            worker.start()
        results: list[Any] = collect(workers, answers)
    by_rank = [figures for _, figures in results]
    return {name: max(figures[name] for figures in by_rank) for name in by_rank[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk-tokens", type=int, help="of what is measured; default: the head's own")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of the times; 0: none")
    parser.add_argument("--whole", type=int, default=32_768, help="tokens of the counted case")
    parser.add_argument("--whole-hidden", type=int, default=5120)
    parser.add_argument("--only-counted", action="store_true", help="measure nothing")
    options = parser.parse_args()
    cases = [Case(dtype, tensor) for dtype in options.dtypes for tensor in options.tensor]
    print(f"{'':<20}{'tokens x hidden':>16}{'before':>11}{'after':>11}")
    for case in cases:
        print_row(case, "counted", options.whole, options.whole_hidden, counted_gib)
    for one in cases if not options.only_counted else []:
        case = one._replace(chunk_tokens=options.chunk_tokens)
        print_row(case, "counted", options.tokens, options.hidden, counted_gib)
        figures = measure(case, options)
        print_row(case, "measured", options.tokens, options.hidden, lambda *_: figures)  # noqa: B023
        if options.rounds:
            told = ", ".join(f"{name} {figures[f'time of {name}']:.3f}" for name in ("after", "recomputed"))
            print(f"{case.name:<20}CPU seconds / those of before: {told}", flush=True)


def print_row(case: Case, how: str, num_tokens: int, hidden_size: int, figures_of: Any) -> None:
    figures = figures_of(case, num_tokens, hidden_size)
    size = f"{num_tokens} x {hidden_size}"
    ratio = figures["before"] / figures["after"]
    print(
        f"{case.name:<20}{size:>16}{figures['before']:>7.2f} GiB{figures['after']:>7.2f} GiB  1/{ratio:.1f} {how}",
        flush=True,
    )


if __name__ == "__main__":
    main()
