"""What a stage needs under engine=deepspeed: memory of a device and of a host, and what travels in a step.

The counts follow what DeepSpeed keeps in each stage under our settings (`training/engines/deepspeed/settings.py`): gradients
are summed and reduced in float32, master weights are kept apart from the model's also where both are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.plan.layout import Layout, divisors, largest_data, violations
from launch.plan.memory import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    StageMemory,
    stage_memory,
    stage_parameters,
    trained_parameters,
)
from launch.plan.search import Plan, Problem, plan_layout
from launch.plan.timing import Machine
from training.contracts.zero import DeepSpeedConfig, host_bytes


@dataclass(frozen=True)
class ZeroChoice:
    """A stage of ZeRO, and what of it lies on the host."""

    stage: int
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def of(cls, options: DeepSpeedConfig) -> ZeroChoice:
        return cls(options.zero_stage, options.offload_optimizer == "cpu", options.offload_weights == "cpu")

    @property
    def overrides(self) -> str:
        parts = [f"engine=deepspeed deepspeed.zero_stage={self.stage}"]
        parts += ["deepspeed.offload_optimizer=cpu"] if self.offload_optimizer else []
        parts += ["deepspeed.offload_weights=cpu"] if self.offload_weights else []
        return " ".join(parts)


CHOICES = (
    ZeroChoice(1),
    ZeroChoice(2),
    ZeroChoice(3),
    ZeroChoice(1, offload_optimizer=True),
    ZeroChoice(2, offload_optimizer=True),
    ZeroChoice(3, offload_optimizer=True),
    ZeroChoice(3, offload_optimizer=True, offload_weights=True),
)


@dataclass(frozen=True)
class ZeroPlan:
    """One choice in one layout."""

    problem: Problem
    layout: Layout
    choice: ZeroChoice
    options: DeepSpeedConfig  # sizes of buckets and of what stays gathered

    @property
    def replicas(self) -> int:
        return self.layout.data * self.layout.context

    @property
    def parameters(self) -> int:
        """Of one tensor rank, before they are cut over the replicas."""
        return stage_parameters(self.problem.shape, self.layout, 0)

    @property
    def trained(self) -> int:
        """Of them those that learn."""
        return trained_parameters(self.problem.shape, self.layout, 0)

    @property
    def memory(self) -> StageMemory:
        """Of one device at the peak of a step."""
        problem, choice, count, cut = self.problem, self.choice, self.parameters, self.replicas
        size = problem.shape.dtype_bytes
        weights = 0.0 if choice.offload_weights else count * size / (cut if choice.stage == 3 else 1)
        gradients = self.trained * GRADIENT_BYTES / (cut if choice.stage > 1 else 1)
        if choice.offload_optimizer and choice.stage > 1:
            gradients = 0.0
        optimizer = 0.0 if choice.offload_optimizer else self.trained * (MASTER_BYTES + MOMENT_BYTES) / cut
        buffers = float(min(self.trained, self.options.bucket_elements) * GRADIENT_BYTES)
        if choice.stage == 3:  # gathered for their use, and what is kept for the next one
            buffers += min(count, max(self.largest_gathered, self.options.live_elements)) * size
        base = stage_memory(problem.shape, self.layout, problem.batch, 0)
        return replace(
            base, weights=weights, gradients=gradients, optimizer=optimizer, communication=base.communication + buffers
        )

    @property
    def largest_gathered(self) -> float:
        """Parameters of the largest module that is used at once: a layer's MLP or the output layer."""
        shape = self.problem.shape
        return max(shape.embedding_parameters(), shape.matrix_parameters()) / self.layout.tensor

    @property
    def rank_host_bytes(self) -> float:
        """Of host memory that one rank holds."""
        offloads = {True: "cpu", False: "none"}
        options = DeepSpeedConfig(
            offload_optimizer=offloads[self.choice.offload_optimizer],
            offload_weights=offloads[self.choice.offload_weights],
        )
        return host_bytes(options, self.parameters, self.trained, self.problem.shape.dtype_bytes) / self.replicas

    @property
    def host_bytes(self) -> float:
        """Of one node, with all its ranks."""
        return self.rank_host_bytes * min(self.layout.world_size, self.problem.cluster.accelerators_per_node)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.problem.usable_bytes

    def _travels(self) -> tuple[float, float]:
        """(bytes gathered, bytes reduced) of one rank in a step, as whole messages."""
        count, trained, size = self.parameters, self.trained, self.problem.shape.dtype_bytes
        micro_batches = self.layout.micro_batches(self.problem.batch)
        if self.choice.stage == 3:
            return 2.0 * count * size * micro_batches, float(trained * GRADIENT_BYTES * micro_batches)
        times = micro_batches if self.choice.stage == 2 else 2  # an all-reduce is a reduce and a gather
        return float(trained * size), float(trained * GRADIENT_BYTES * times)

    @property
    def communication_bytes(self) -> float:
        return sum(self._travels()) if self.replicas > 1 else 0.0

    @property
    def step_seconds(self) -> float | None:
        """None with offload: the host's rates are not known."""
        return None if self.choice.offload_optimizer or self.choice.offload_weights else self.plan.step.total

    @property
    def plan(self) -> Plan:
        """As the plan of a layout under megatron. With offload its time lacks the host's part: it takes longer."""
        machine = Machine(self.problem.device, self.problem.cluster)
        data = sum(machine.collective_seconds(size, self.replicas, self.layout.tensor) for size in self._travels())
        plan = plan_layout(self.problem, self.layout)
        return replace(plan, memory=self.memory, step=replace(plan.step, data=data))

    def to_dict(self) -> dict[str, Any]:
        memory, seconds = self.memory, self.step_seconds
        return {
            "zero_stage": self.choice.stage,
            "offload_optimizer": self.choice.offload_optimizer,
            "offload_weights": self.choice.offload_weights,
            "tensor": self.layout.tensor,
            "data": self.layout.data,
            "micro_batch": self.layout.micro_batch,
            "recompute": self.layout.recompute,
            "memory_bytes": round(memory.total),
            "memory": memory.to_dict(),
            "fits": self.fits,
            "host_bytes_per_node": round(self.host_bytes),
            "communication_bytes": round(self.communication_bytes),
            "step_seconds": None if seconds is None else round(seconds, 4),
            "overrides": f"{self.choice.overrides} {self.layout.overrides()}",
        }


def zero_layouts(problem: Problem, micro_batch: int, recompute: Sequence[str]) -> list[Layout]:
    """Every legal number of tensor ranks, with as many replicas as there is room for."""
    found = []
    for tensor in divisors(problem.shape.groups * problem.shape.heads):
        if tensor > min(problem.cluster.accelerators_per_fast_domain, problem.cluster.num_accelerators):
            continue
        layout = Layout(tensor, 1, 1, 1, micro_batch)
        layout = replace(layout, data=max(1, largest_data(layout, problem.batch, problem.cluster.num_accelerators)))
        if not violations(layout, problem.shape, problem.batch):
            found += [replace(layout, recompute=one) for one in recompute]
    return found


def best_of_each(problem: Problem, layouts: Sequence[Layout], options: DeepSpeedConfig) -> list[ZeroPlan]:
    """For each choice the fastest layout that fits (the one that moves least where the time is not known), else the leanest."""
    best = []
    for choice in CHOICES:
        plans = [ZeroPlan(problem, layout, choice, options) for layout in layouts]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            best.append(min(fitting, key=lambda plan: (plan.step_seconds or 0.0, plan.communication_bytes)))
        elif plans:
            best.append(min(plans, key=lambda plan: plan.memory.total))
    return best
