"""Plans of layouts, and the search for the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Batch, Layout, candidates, nearest, violations
from launch.plan.memory import StageMemory, peak_memory, usable_bytes
from launch.plan.shape import ModelShape
from launch.plan.timing import OUR_ENGINE, Implementation, Machine, StepModel, StepTime
from model.errors import UserError
from model.parallel.devices import Device


@dataclass(frozen=True)
class Problem:
    """What is to be planned."""

    shape: ModelShape
    batch: Batch
    num_steps: int
    device: Device
    cluster: ClusterConfig
    mfu_attended_tokens: float  # keys a token counts for in the FLOPs of the MFU
    implementation: Implementation = OUR_ENGINE

    @property
    def usable_bytes(self) -> float:
        return usable_bytes(self.device.memory_bytes)


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs and takes."""

    problem: Problem
    layout: Layout
    stage: int  # the pipeline stage that needs most memory
    memory: StageMemory
    step: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.problem.usable_bytes

    @property
    def tokens_per_second(self) -> float:
        return self.problem.batch.tokens / self.step.total

    @property
    def mfu(self) -> float:
        """Of all accelerators of the cluster, whether or not the layout uses them."""
        problem = self.problem
        flops = problem.shape.flops_per_token(problem.mfu_attended_tokens) * self.tokens_per_second
        peak = (
            problem.device.fp8_flops_per_second if problem.implementation.fp8 else problem.device.bf16_flops_per_second
        )
        return flops / peak / problem.cluster.num_accelerators

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.step.total * self.problem.num_steps

    def to_dict(self) -> dict[str, Any]:
        layout, memory = self.layout, self.memory
        return {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            "data": layout.data,
            "micro_batch": layout.micro_batch,
            "recompute": layout.recompute,
            "accelerators": layout.world_size,
            "micro_batches": layout.micro_batches(self.problem.batch),
            "memory_bytes": round(memory.total),
            "fits": self.fits,
            "margin_bytes": round(self.problem.usable_bytes - memory.total),
            "step_seconds": round(self.step.total, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "mfu": round(self.mfu, 4),
            "days": round(self.seconds / 86_400, 2),
            "accelerator_hours": round(self.seconds / 3600 * self.problem.cluster.num_accelerators, 1),
            "overrides": layout.overrides(),
        }


def plan_layout(problem: Problem, layout: Layout) -> Plan:
    """Memory and step time of a legal layout."""
    stage, memory = peak_memory(problem.shape, layout, problem.batch)
    machine = Machine(problem.device, problem.cluster)
    step = StepModel(problem.shape, layout, problem.batch, machine, problem.implementation).step()
    return Plan(problem, layout, stage, memory, step)


def all_plans(problem: Problem, num_accelerators: int, recompute: Sequence[str]) -> list[Plan]:
    """Of every legal layout on that many accelerators, with each choice of recomputation."""
    largest_tensor = problem.cluster.accelerators_per_fast_domain
    layouts = candidates(problem.shape, problem.batch, num_accelerators, largest_tensor=largest_tensor)
    return [plan_layout(problem, replace(layout, recompute=choice)) for layout in layouts for choice in recompute]


def search(problem: Problem, recompute: Sequence[str]) -> list[Plan]:
    """Layouts that fit, fastest first. Raises `UserError` when none does."""
    plans = all_plans(problem, problem.cluster.num_accelerators, recompute)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise nothing_fits(problem, plans, recompute)
    # Of equals the one that needs less memory, then the simpler one.
    return sorted(fitting, key=lambda plan: (plan.step.total, plan.memory.total, plan.layout.overrides()))


def nothing_fits(problem: Problem, plans: Sequence[Plan], recompute: Sequence[str]) -> UserError:
    """Says how much memory is missing and on how many accelerators it would fit."""
    count = problem.cluster.num_accelerators
    if not plans:
        return UserError(
            "no layout of this model and batch is possible",
            where="cluster.num_accelerators",
            got=str(count),
            fix="change stage.global_batch_size or stage.sequence_length: they leave nothing to divide",
        )
    least = min(plans, key=lambda plan: plan.memory.total)
    missing = (least.memory.total - problem.usable_bytes) / 1e9
    enough, found = count, None
    while found is None and enough < 65_536:
        enough *= 2
        fitting = [plan for plan in all_plans(problem, enough, recompute) if plan.fits]
        found = min(fitting, key=lambda plan: plan.step.total, default=None)
    if found is None:
        fix = "a device with more memory, or a smaller model"
    else:
        fix = f"cluster.num_accelerators={enough} fits with {found.layout.overrides()} (recompute {found.layout.recompute})"
    return UserError(
        f"nothing fits on {count} x {problem.device.title}: {missing:.1f} GB an accelerator are missing",
        where="cluster.num_accelerators",
        expected=f"at most {problem.usable_bytes / 1e9:.1f} GB of tensors an accelerator",
        got=f"{least.memory.total / 1e9:.1f} GB in the leanest layout ({least.layout.overrides()}, "
        f"recompute {least.layout.recompute})",
        fix=fix,
    )


def check_layout(problem: Problem, layout: Layout) -> list[str]:
    """What keeps the layout from running on this cluster. An impossible one is a `UserError` with the nearest legal ones."""
    room = problem.cluster.num_accelerators
    of_model = violations(replace(layout, data=1, micro_batch=layout.micro_batch), problem.shape, problem.batch)
    if of_model:
        largest = problem.cluster.accelerators_per_fast_domain
        legal = candidates(problem.shape, problem.batch, room, largest_tensor=largest)
        offered = "; ".join(one.overrides() for one in nearest(layout, legal))
        raise UserError(
            "the layout is impossible: " + "; ".join(of_model),
            where="parallel",
            got=layout.overrides(),
            fix=f"the nearest that are possible: {offered or 'none on this cluster'}",
        )
    found = violations(layout, problem.shape, problem.batch)
    if layout.world_size > room:
        found.append(f"it needs {layout.world_size} accelerators, the cluster has {room}")
    return found
