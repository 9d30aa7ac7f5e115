"""Which layouts of ranks are possible: the one home of that question for `plan`, `submit`, `train` and `score`.

The rules of an engine are data. A command that asks before anything starts gets the answer that the ranks would give.
Imports no torch, and nothing of training: its configuration asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from model.parallel.layout_rules import LayoutProblem, division_problems, positive_problems

RECOMPUTE = ("none", "selective", "full")
SECTION = "parallel."


class HasLayout(Protocol):
    """`training.config.ParallelConfig`, or the layout of a plan."""

    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def data(self) -> int: ...
    @property
    def recompute(self) -> str: ...


@dataclass(frozen=True)
class Rows:
    """What one optimizer step works on: rows of `sequence_length` tokens."""

    sequence_length: int
    micro_batch_size: int
    global_batch_size: int

    @property
    def are_positive(self) -> bool:
        return min(self.sequence_length, self.micro_batch_size, self.global_batch_size) > 0


@dataclass(frozen=True)
class ParallelLayout:
    """tensor * pipeline * context * data ranks."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    recompute: str = "none"

    @classmethod
    def of(cls, layout: HasLayout) -> ParallelLayout:
        return cls(layout.tensor, layout.pipeline, layout.context, layout.data, layout.recompute)

    @property
    def ranks(self) -> dict[str, int]:
        return {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}

    def own_problems(self) -> list[LayoutProblem]:
        """What is wrong whatever the model is."""
        found = positive_problems(self.ranks, SECTION)
        if self.recompute not in RECOMPUTE:
            message = f"choices are {', '.join(RECOMPUTE)}, got {self.recompute!r}"
            found.append(LayoutProblem(f"{SECTION}recompute", message, f"{SECTION}recompute=none"))
        return found

    def problems(
        self, sizes: Mapping[str, int], rows: Rows | None = None, *, engine: str = "megatron", of: str = "model."
    ) -> list[LayoutProblem]:
        """Every reason why this layout cannot run; empty when it can.

        `sizes` are those of `model.parallel.layout_rules.divided_sizes`, `of` the section in which the user sets them
        (empty where a checkpoint fixes them). Without `rows`, batches are made to fit: `score` does that. Rows that
        are not positive are their own section's problem and are not judged here.
        """
        found = self.own_problems()
        if positive_problems(self.ranks, SECTION):
            return found
        found += division_problems(sizes, self.ranks, section=SECTION, of=of)
        if rows is not None and rows.are_positive:
            found += [problem for rule in ENGINE_RULES.get(engine, ()) if (problem := rule(self, rows)) is not None]
        return found


Rule = Callable[[ParallelLayout, Rows], LayoutProblem | None]


def rows_divide_among_ranks(layout: ParallelLayout, rows: Rows) -> LayoutProblem | None:
    """Tensor ranks share the tokens of a row under sequence parallelism, context ranks always."""
    parts = layout.tensor * layout.context
    if rows.sequence_length % parts == 0:
        return None
    return LayoutProblem(
        "stage.sequence_length",
        f"{rows.sequence_length} is not a multiple of parallel.tensor * parallel.context = {parts}",
        f"stage.sequence_length={fitting_length(layout, rows)}",
    )


def micro_batch_divides_into_chunks(layout: ParallelLayout, rows: Rows) -> LayoutProblem | None:
    """A context rank holds two chunks of a micro-batch's tokens, one early and one late (`context_token_ids`)."""
    parts, tokens = chunk_parts(layout), rows.micro_batch_size * rows.sequence_length
    if tokens % parts == 0 or rows_divide_among_ranks(layout, rows) is not None:
        return None
    return LayoutProblem(
        "stage.micro_batch_size",
        f"its {tokens} tokens are not a multiple of {parts} (tensor * context, twice with context > 1)",
        f"stage.sequence_length={fitting_length(layout, rows)}",
    )


def batch_divides_among_replicas(layout: ParallelLayout, rows: Rows) -> LayoutProblem | None:
    """Every data-parallel rank works on equally many micro-batches."""
    at_once = rows.micro_batch_size * layout.data
    if rows.global_batch_size % at_once == 0:
        return None
    return LayoutProblem(
        "stage.global_batch_size",
        f"{rows.global_batch_size} is not a multiple of micro_batch_size * parallel.data = {at_once}",
        f"stage.global_batch_size={rounded_up(rows.global_batch_size, at_once)}",
    )


def has_no_pipeline(layout: ParallelLayout, rows: Rows) -> LayoutProblem | None:
    """ZeRO cuts what a replica holds; stages of a pipeline would each need gradients that have not come yet."""
    if layout.pipeline == 1:
        return None
    return LayoutProblem(
        f"{SECTION}pipeline",
        f"the deepspeed engine has no pipeline, got {layout.pipeline}",
        f"{SECTION}pipeline=1 or engine=megatron",
    )


def holds_the_whole_module(layout: ParallelLayout, rows: Rows | None = None) -> LayoutProblem | None:
    """The engine `replicated` has no other ranks than replicas."""
    cut = [f"{name} {size}" for name, size in layout.ranks.items() if name != "data" and size != 1]
    if not cut:
        return None
    return LayoutProblem(
        SECTION.rstrip("."),
        f"this objective trains whole replicas: its ranks are parallel.data alone, got {', '.join(cut)}",
        " ".join(f"{SECTION}{name}=1" for name, size in layout.ranks.items() if name != "data" and size != 1),
    )


def chunk_parts(layout: ParallelLayout) -> int:
    return layout.tensor * layout.context * (2 if layout.context > 1 else 1)


def fitting_length(layout: ParallelLayout, rows: Rows) -> int:
    """The next length of a row that divides both ways."""
    step = layout.tensor * layout.context
    length = rounded_up(rows.sequence_length, step)
    return length if rows.micro_batch_size * length % chunk_parts(layout) == 0 else length + step


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


# What each engine asks beyond what the model's sizes say.
ROW_RULES: tuple[Rule, ...] = (rows_divide_among_ranks, micro_batch_divides_into_chunks, batch_divides_among_replicas)
ENGINE_RULES: dict[str, tuple[Rule, ...]] = {
    "megatron": ROW_RULES,
    "deepspeed": (has_no_pipeline, *ROW_RULES),
    "replicated": (holds_the_whole_module, batch_divides_among_replicas),
}
