"""A layout of ranks and the batch it works on: is it possible, and if not, what is nearest?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launch.plan.shape import ModelShape
from training.contracts.layout import SECTION, ParallelLayout, Rows


@dataclass(frozen=True)
class Batch:
    """What one optimizer step works on."""

    sequence_length: int
    global_batch_size: int  # rows
    attended_tokens: float  # keys that a token attends to on average

    @property
    def tokens(self) -> int:
        return self.sequence_length * self.global_batch_size


@dataclass(frozen=True)
class Layout:
    """How ranks are laid out: tensor * pipeline * context * data of them."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    micro_batch: int = 1  # rows
    recompute: str = "none"
    distributed_optimizer: bool = True
    sequence_parallel: bool = True
    virtual_pipeline: int = 1  # chunks of layers a stage is made of; our engine has one
    fully_sharded: bool = False  # weights too are sharded over data ranks (FSDP); our engine does not

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def micro_batches(self, batch: Batch) -> int:
        """Of one data-parallel rank in one step."""
        return batch.global_batch_size // (self.data * self.micro_batch)

    def local_tokens(self, batch: Batch) -> int:
        """Of one micro-batch on one context rank."""
        return self.micro_batch * batch.sequence_length // self.context

    def overrides(self) -> str:
        """As they are written on the command line."""
        return (
            f"parallel.tensor={self.tensor} parallel.pipeline={self.pipeline} parallel.context={self.context} "
            f"parallel.data={self.data} parallel.recompute={self.recompute} "
            f"stage.micro_batch_size={self.micro_batch}"
        )


def violations(layout: Layout, shape: ModelShape, batch: Batch) -> list[str]:
    """Every reason why the layout cannot run this model and batch; empty when it can."""
    if layout.micro_batch < 1:
        return [f"micro_batch must be positive, got {layout.micro_batch}"]
    rows = Rows(batch.sequence_length, layout.micro_batch, batch.global_batch_size)
    found = [told(*problem) for problem in ParallelLayout.of(layout).problems(shape.divided_sizes(), rows)]
    if not found and shape.num_layers % (layout.pipeline * layout.virtual_pipeline):
        found.append(f"virtual_pipeline {layout.virtual_pipeline} does not divide the layers of a stage")
    return found


def told(key: str, message: str, fix: str) -> str:
    """One problem in a line of its own; the fixes are the nearest legal layouts."""
    name = key.removeprefix(SECTION)
    return f"{name} {message}" if key.startswith(SECTION) else f"{name}: {message}"


def divisors(number: int) -> list[int]:
    small = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)})


def largest_data(layout: Layout, batch: Batch, num_accelerators: int) -> int:
    """Most data-parallel ranks that the accelerators and the batch allow; 0 when not even one fits."""
    room = num_accelerators // (layout.tensor * layout.pipeline * layout.context)
    if batch.global_batch_size % layout.micro_batch:
        return 0
    fitting = [value for value in divisors(batch.global_batch_size // layout.micro_batch) if value <= room]
    return max(fitting, default=0)


def candidates(shape: ModelShape, batch: Batch, num_accelerators: int, *, largest_tensor: int) -> list[Layout]:
    """Every legal combination of tensor, pipeline, context and micro-batch, with as many data ranks as there is room for."""
    found = []
    for tensor in divisors(shape.groups * shape.heads):
        if tensor > min(largest_tensor, num_accelerators):
            continue
        for pipeline in divisors(shape.num_layers):
            for context in (1, 2, 4, 8, 16, 32, 64):
                for micro_batch in (1, 2, 4, 8):
                    layout = Layout(tensor, pipeline, context, 1, micro_batch)
                    data = largest_data(layout, batch, num_accelerators)
                    layout = replace(layout, data=max(data, 1))
                    if data and not violations(layout, shape, batch):
                        found.append(layout)
    return found


def nearest(layout: Layout, legal: list[Layout], count: int = 3) -> list[Layout]:
    """Of the legal layouts those whose sizes differ by the smallest factors."""

    def distance(other: Layout) -> float:
        total = 0.0
        for name, weight in (("tensor", 2.0), ("pipeline", 2.0), ("context", 2.0), ("micro_batch", 1.0), ("data", 0.5)):
            mine, theirs = max(1, getattr(layout, name)), getattr(other, name)
            total += weight * (max(mine, theirs) / min(mine, theirs) - 1)
        return total

    return sorted(legal, key=distance)[:count]
