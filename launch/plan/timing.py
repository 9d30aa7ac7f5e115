"""How long an optimizer step takes: a sum of what the hardware's rates allow, with one set of efficiencies.

Matrix products run at a share of the peak, or at the speed of the memory where they are small; attention at a share of its own; norms and
activation functions at the speed of the memory; collectives at the speed of the slowest link they cross. What is not
overlapped adds up. The efficiencies in `Efficiencies` hold for every configuration; `launch.plan.published` compares
the outcome with published runs, on which they were fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Batch, Layout
from launch.plan.memory import MASTER_BYTES, MOMENT_BYTES, stage_parameters
from launch.plan.shape import ModelShape
from model.parallel.devices import Device


@dataclass(frozen=True)
class Efficiencies:
    """Shares of what the hardware could do. One set for all configurations."""

    matrix: float = 0.565  # of the bf16 peak, large products
    matrix_fp8: float = 0.71  # of the fp8 peak, large products
    attention: float = 0.225  # of the bf16 peak, forward and backward
    memory_passes: float = 1.8  # traffic of norms and activation functions over the least possible
    fast_links: float = 0.67  # of the NVLink bandwidth, in collectives
    network: float = 0.95  # of the network's bandwidth, in collectives
    tensor_exposed: float = 0.6  # share of tensor-parallel communication that overlapping leaves


@dataclass(frozen=True)
class Implementation:
    """What a training program does to hide communication, and the number format of its matrix products."""

    overlaps_tensor: bool = False
    overlaps_data: bool = False
    fp8: bool = False
    gradient_bytes: int = 4  # in which gradients are reduced


# Ours as it is (see training/engines/megatron/engine.py): nothing is overlapped, gradients are reduced in float32.
OUR_ENGINE = Implementation()


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on. The parts add up to `total`."""

    matrices: float
    attention: float
    memory_bound: float
    tensor: float  # exposed communication, here and below
    context: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def to_dict(self) -> dict[str, float]:
        parts = {field.name: round(getattr(self, field.name), 6) for field in fields(self)}
        return {**parts, "total": round(self.total, 6)}


@dataclass(frozen=True)
class Machine:
    """A device in its cluster, with the efficiencies that hold for all."""

    device: Device
    cluster: ClusterConfig
    efficiencies: Efficiencies = Efficiencies()

    @property
    def network_bytes_per_second(self) -> float:
        return self.cluster.network_gigabits_per_second * 1e9 / 8 * self.efficiencies.network

    def collective_seconds(self, size_bytes: float, ranks: int, stride: int) -> float:
        """An all-gather to (or reduce-scatter from) `size_bytes` on each of `ranks` ranks that stand `stride` apart.

        Within a fast domain it runs at NVLink's speed. Across domains every rank of a domain carries its share of
        what must come in from outside; inside, NVLink passes it on meanwhile.
        """
        if ranks <= 1 or size_bytes == 0:
            return 0.0
        fast = self.device.fast_bytes_per_second * self.efficiencies.fast_links
        inside = max(1, min(ranks, self.cluster.accelerators_per_fast_domain // stride))
        seconds = size_bytes * (inside - 1) / inside / fast
        if inside < ranks:
            outside = size_bytes * (1 - inside / ranks) / inside
            seconds = max(seconds, outside / self.network_bytes_per_second)
        return seconds


@dataclass(frozen=True)
class Work:
    """Seconds of one layer (or the output layer) for one micro-batch: forward, then backward without recomputation."""

    matrices: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


class StepModel:
    """Times of one model in one layout on one machine."""

    def __init__(
        self,
        shape: ModelShape,
        layout: Layout,
        batch: Batch,
        machine: Machine,
        implementation: Implementation = OUR_ENGINE,
    ):
        self.shape, self.layout, self.batch = shape, layout, batch
        self.machine, self.implementation = machine, implementation
        self.rates = machine.efficiencies
        self.tokens = layout.local_tokens(batch)
        self.num_micro_batches = layout.micro_batches(batch)

    def _product(self, columns: float, inner: float, *, fp8: bool) -> float:
        """Seconds of [tokens, inner] x [inner, columns]."""
        device, rates, rows = self.machine.device, self.rates, self.tokens
        flops = 2.0 * rows * columns * inner
        peak = device.bf16_flops_per_second * rates.matrix
        traffic = 2.0 * (rows * columns + columns * inner + inner * rows)
        if fp8 and device.fp8_flops_per_second:
            peak = device.fp8_flops_per_second * rates.matrix_fp8
            traffic += 3.0 * rows * inner  # read once more and written in fp8
        return max(flops / peak, traffic / device.memory_bytes_per_second)

    def _layer_forward(self) -> Work:
        shape, layout, tokens = self.shape, self.layout, self.tokens
        tensor, fp8 = layout.tensor, self.implementation.fp8
        query, key = shape.query_width / tensor, shape.key_width / tensor
        matrices = (
            self._product(query + 2 * key, shape.hidden, fp8=fp8)
            + self._product(shape.hidden, query, fp8=fp8)
            + self._product(shape.ffn_inputs / tensor, shape.hidden, fp8=fp8)
            + self._product(shape.hidden, shape.ffn / tensor, fp8=fp8)
        )
        flops = 4.0 * tokens * self.batch.attended_tokens * query
        attention = flops / (self.machine.device.bf16_flops_per_second * self.rates.attention)
        # Read and written at least: two norms and two sums over the residual, rotation, activation function.
        split = tensor if layout.sequence_parallel else 1
        elements = 10 * shape.hidden / split + 4 * (query + key) + (shape.ffn_inputs + shape.ffn) / tensor
        traffic = 2.0 * tokens * elements * self.rates.memory_passes
        memory_bound = traffic / self.machine.device.memory_bytes_per_second
        return Work(matrices, attention, memory_bound, self._tensor_seconds(), self._context_seconds())

    def _tensor_seconds(self) -> float:
        """Forward of a layer: two gathers and two reduce-scatters (or two all-reduces) of the hidden states."""
        size = 2.0 * self.tokens * self.shape.hidden
        seconds = 4 * self.machine.collective_seconds(size, self.layout.tensor, 1)
        return seconds * (self.rates.tensor_exposed if self.implementation.overlaps_tensor else 1.0)

    def _context_seconds(self) -> float:
        """Forward of a layer: keys and values of all context ranks are gathered."""
        layout = self.layout
        size = 2.0 * self.tokens * layout.context * 2 * self.shape.key_width / layout.tensor
        return self.machine.collective_seconds(size, layout.context, layout.tensor)

    def layer(self) -> Work:
        """Forward and backward of one layer and micro-batch, with what is recomputed."""
        forward = self._layer_forward()
        backward = Work(
            2 * forward.matrices, 2.5 * forward.attention, 2 * forward.memory_bound, forward.tensor, forward.context
        )
        work = forward + backward
        if self.layout.recompute == "full":
            work += forward
        elif self.layout.recompute == "selective":
            work += Work(attention=forward.attention, context=forward.context)
        return work

    def output_layer(self) -> Work:
        """Forward and backward of logits and loss."""
        columns = self.shape.vocabulary_rows / self.layout.tensor
        matrices = 3 * self._product(columns, self.shape.hidden, fp8=False)
        traffic = 20.0 * self.tokens * columns  # bf16 and float32 logits, their gradients
        return Work(matrices, memory_bound=traffic / self.machine.device.memory_bytes_per_second)

    def _exposed(self, communication: float, beside: float, *, overlaps: bool) -> float:
        """Seconds that communication adds to the work beside it."""
        if not overlaps:
            return communication
        return max(0.0, communication - beside)

    def _data_seconds(self, compute: float) -> float:
        """Gradients reduced and weights gathered over the data-parallel ranks, as far as it adds to the step."""
        layout, machine = self.layout, self.machine
        parameters = max(stage_parameters(self.shape, layout, stage) for stage in (0, layout.pipeline - 1))
        ranks, stride = layout.data * layout.context, layout.tensor
        gather = machine.collective_seconds(2.0 * parameters, ranks, stride)
        reduce = machine.collective_seconds(self.implementation.gradient_bytes * parameters, ranks, stride)
        overlaps = self.implementation.overlaps_data
        if layout.fully_sharded:  # weights are gathered for the forward and for the backward pass
            each = self._exposed(2 * gather + reduce, compute / self.num_micro_batches, overlaps=overlaps)
            return each * self.num_micro_batches
        # Gradients overlap the last backward pass, weights the first forward pass.
        one = compute / self.num_micro_batches
        return self._exposed(reduce, one * 2 / 3, overlaps=overlaps) + self._exposed(gather, one / 3, overlaps=overlaps)

    def _pipeline_seconds(self) -> float:
        """One stage's exposed sends of activations and gradients in a step."""
        layout = self.layout
        if layout.pipeline == 1:
            return 0.0
        size = 2.0 * self.tokens * self.shape.hidden / layout.tensor
        stride = layout.tensor * layout.context * layout.data
        fast = stride < self.machine.cluster.accelerators_per_fast_domain
        rate = (
            self.machine.device.fast_bytes_per_second * self.rates.fast_links
            if fast
            else self.machine.network_bytes_per_second
        )
        seconds = 2 * size / rate * layout.virtual_pipeline * self.num_micro_batches
        return self._exposed(seconds, seconds, overlaps=layout.virtual_pipeline > 1)

    def _optimizer_seconds(self) -> float:
        layout = self.layout
        parameters = max(stage_parameters(self.shape, layout, stage) for stage in (0, layout.pipeline - 1))
        shards = layout.data * layout.context if layout.distributed_optimizer or layout.fully_sharded else 1
        traffic = parameters / shards * 2 * (MOMENT_BYTES + MASTER_BYTES + 4)
        return traffic / self.machine.device.memory_bytes_per_second

    def step(self) -> StepTime:
        """Of the slowest path through the pipeline."""
        layout, micro_batches = self.layout, self.num_micro_batches
        stage = self.layer() * (self.shape.num_layers / layout.pipeline)
        slowest = stage + self.output_layer()
        busy = slowest * micro_batches
        bubble = (layout.pipeline - 1) / layout.virtual_pipeline * stage.total
        pipeline = self._pipeline_seconds()
        data = self._data_seconds(busy.matrices + busy.attention + busy.memory_bound)
        optimizer = self._optimizer_seconds()
        return StepTime(
            busy.matrices,
            busy.attention,
            busy.memory_bound,
            busy.tensor,
            busy.context,
            pipeline,
            bubble,
            data,
            optimizer,
        )
