"""How long an optimizer step takes: a sum of what the hardware's rates allow, with one set of efficiencies.

Matrix products and attention run at a share of what each of them was measured to reach alone on the device
(`model.parallel.devices`), or at the speed of the memory where they are small; norms and activation functions at the speed
of the memory; collectives at the speed of the slowest link they cross. What is not overlapped adds up.
The efficiencies in `Efficiencies` hold for every configuration; `launch.plan.published` compares the outcome with published
runs, on which four of them were fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Batch, Layout
from launch.plan.memory import MASTER_BYTES, MOMENT_BYTES, stage_parameters
from launch.plan.shape import ModelShape
from model.parallel.devices import Device

# Kernels work on blocks of keys: causality cuts half a block too little (FlashAttention's blocks of 128 keys).
ATTENTION_BLOCK = 128
# A kernel written for the device against large products on it: 1.65 times FlashAttention 2 on an H100, the middle of the 1.5 to
# 1.75 times that FlashAttention 3 (arXiv 2407.08608) gains over a step; 1.65 * 327.9 / 794.5.
OWN_ATTENTION_SHARE = 0.68


@dataclass(frozen=True)
class Efficiencies:
    """Shares of what the hardware could do. One set for all configurations; the first four are fitted."""

    matrix: float = 0.865  # of what large products alone reach, in bf16 and fp8
    attention: float = 0.64  # of what the attention kernel alone reaches, forward and backward
    memory_passes: float = 2.35  # traffic of norms and activation functions over the least possible
    fp8_passes: float = 3.2  # bytes an input element that casts to fp8 move
    fast_links: float = 0.76  # of NVLink's bandwidth: 231 of 300 GB/s (A100), 680 of 900 (GB200), Azure's NCCL tests
    network: float = 0.8  # of the network's bandwidth, an assumption
    overlapped: float = 0.5  # share of communication beside computation that still costs time, an assumption


@dataclass(frozen=True)
class Implementation:
    """What a training program does: what it hides, number formats, what it computes twice."""

    overlaps_tensor: bool = False
    overlaps_data: bool = False
    fp8: bool = False
    gradient_bytes: int = 4  # in which gradients are reduced
    gathered_bytes: int = 2  # in which weights are gathered
    own_attention: bool = False  # an attention kernel written for the device; else FlashAttention 2
    recomputed_products: float = 0.0  # share of the forward pass's matrix products, beside the layout's `recompute`
    recomputed_attention: float = 0.0
    gathers_once: bool = False  # of fully sharded weights: once a step instead of for every micro-batch
    sharding_ranks: int = 0  # that share weights and optimizer state, copies beyond; 0: all data-parallel ranks


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
        traffic = 2.0 * (rows * columns + columns * inner + inner * rows)
        rate, casts = device.matrix_flops_per_second, 0.0
        if fp8 and device.matrix_fp8_flops_per_second:
            rate, casts = device.matrix_fp8_flops_per_second, rates.fp8_passes * rows * inner
        seconds = max(flops / (rate * rates.matrix), traffic / device.memory_bytes_per_second)
        return seconds + casts / device.memory_bytes_per_second

    def _attention_seconds(self, query: float) -> float:
        """Forward of one layer with `query` channels of queries on this rank."""
        device, attended = self.machine.device, self.batch.attended_tokens + ATTENTION_BLOCK / 2
        own = OWN_ATTENTION_SHARE * device.matrix_flops_per_second
        rate = own if self.implementation.own_attention else device.flash_attention_flops_per_second
        return 4.0 * self.tokens * attended * query / (rate * self.rates.attention)

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
        attention = self._attention_seconds(query)
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
        return seconds * (self.rates.overlapped if self.implementation.overlaps_tensor else 1.0)

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
        again = self.implementation
        passes = max(again.recomputed_products, again.recomputed_attention)
        return work + Work(
            again.recomputed_products * forward.matrices,
            again.recomputed_attention * forward.attention,
            passes * forward.memory_bound,
        )

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
        return max(communication - beside, self.rates.overlapped * communication)

    def _gather_and_reduce(self, parameters: int) -> tuple[float, float]:
        """Seconds to gather the weights, and to reduce the gradients, of one rank's pipeline stage once."""
        layout, machine, program = self.layout, self.machine, self.implementation
        ranks, stride = layout.data * layout.context, layout.tensor
        sharing = program.sharding_ranks or ranks
        gather = machine.collective_seconds(program.gathered_bytes * parameters, sharing, stride)
        reduce = machine.collective_seconds(program.gradient_bytes * parameters, sharing, stride)
        if sharing < ranks:  # the shards' gradients are reduced and gathered again between the copies
            shard = program.gradient_bytes * parameters / sharing
            reduce += 2 * machine.collective_seconds(shard, ranks // sharing, stride * sharing)
        return gather, reduce

    def _data_seconds(self, compute: float) -> float:
        """Gradients reduced and weights gathered over the data-parallel ranks, as far as it adds to the step."""
        layout, program = self.layout, self.implementation
        parameters = max(stage_parameters(self.shape, layout, stage) for stage in (0, layout.pipeline - 1))
        gather, reduce = self._gather_and_reduce(parameters)
        one = compute / self.num_micro_batches
        if layout.fully_sharded and not program.gathers_once:  # for the forward and for the backward pass
            each = self._exposed(2 * gather + reduce, one, overlaps=program.overlaps_data)
            return each * self.num_micro_batches
        # Gradients overlap the last backward pass, weights the first forward pass.
        return self._exposed(reduce, one * 2 / 3, overlaps=program.overlaps_data) + self._exposed(
            gather, one / 3, overlaps=program.overlaps_data
        )

    def _pipeline_seconds(self) -> float:
        """One stage's exposed sends of activations and gradients in a step."""
        layout = self.layout
        if layout.pipeline == 1 or layout.virtual_pipeline > 1:  # interleaved stages send beside other chunks' work
            return 0.0
        size = 2.0 * self.tokens * self.shape.hidden / layout.tensor
        stride = layout.tensor * layout.context * layout.data
        fast = stride < self.machine.cluster.accelerators_per_fast_domain
        rate = (
            self.machine.device.fast_bytes_per_second * self.rates.fast_links
            if fast
            else self.machine.network_bytes_per_second
        )
        return 2 * size / rate * self.num_micro_batches

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
