"""Bytes of memory on each pipeline stage, as our engine allocates them.

The counts of saved activations are those of `model.backbone.transformer` with its own layer specification in float32 or with
fused norms; `tests/launch/test_plan_memory.py` holds them against what real runs keep.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from launch.plan.layout import Batch, Layout
from launch.plan.shape import ModelShape
from model.config import LOGIT_CHUNK_BYTES

GRADIENT_BYTES = 4  # gradients are kept and reduced in float32
MOMENT_BYTES = 8  # two float32 moments
MASTER_BYTES = 4  # float32 weights, where the model's are not
# The driver's context, the communication library and the allocator's holes. Assumptions, not measurements.
RESERVED_BYTES, RESERVED_SHARE = 3 * 2**30, 0.03


@dataclass(frozen=True)
class StageMemory:
    """Of one rank of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept between forward and backward, of all micro-batches in flight
    logits: float
    working: float  # what one layer's backward pass needs beside them
    communication: float

    @property
    def kept(self) -> float:
        """What the engine's own tensors amount to at their peak, without passing buffers."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    @property
    def total(self) -> float:
        return self.kept + self.working + self.communication

    def to_dict(self) -> dict[str, int]:
        return {**{name: round(value) for name, value in asdict(self).items()}, "total": round(self.total)}


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters on one rank of a pipeline stage; norms are held whole by every tensor rank."""
    layers = shape.num_layers // layout.pipeline
    count = layers * (shape.matrix_parameters() // layout.tensor + shape.norm_parameters())
    if stage == 0:
        count += shape.embedding_parameters() // layout.tensor
    if stage == layout.pipeline - 1:
        count += shape.embedding_parameters() // layout.tensor + shape.hidden
    return count


def trained_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """On one rank of a pipeline stage. Half of an adapter is held whole by every tensor rank; here all of it is."""
    return shape.num_layers // layout.pipeline * shape.adapters or stage_parameters(shape, layout, stage)


def mask_elements(layout: Layout, batch: Batch) -> int:
    """Of the attention masks of one layer and micro-batch, on the context rank that has most.

    A span that began in an earlier chunk of the context-parallel order has more keys than queries; the engine gives
    such a piece a mask of queries x keys.
    """
    if layout.context == 1:
        return 0
    chunks, row = 2 * layout.context, batch.sequence_length
    length = layout.micro_batch * row // chunks
    span = min(row, round(2 * batch.attended_tokens))
    if span <= length < row or (span < row and length >= row):
        return span * span  # two chunks, each begins in the middle of a document: span / 2 x span
    before = [chunk * length % row for chunk in range(chunks)]  # of the row, ahead of each chunk
    cut = [length * (min(ahead, span) + length) if ahead else 0 for ahead in before]
    return max(cut[rank] + cut[chunks - 1 - rank] for rank in range(layout.context))


def layer_activation_bytes(shape: ModelShape, layout: Layout, batch: Batch, *, moves_rows: bool) -> float:
    """Kept by one layer of one micro-batch on one rank, with the layout's recomputation.

    `moves_rows`: attention copies tokens into padded rows (documents of several lengths, or context parallelism).
    """
    sequence_split = layout.tensor if layout.sequence_parallel else 1
    tokens, size = layout.local_tokens(batch), shape.dtype_bytes
    hidden = shape.hidden / sequence_split
    if layout.recompute == "full":
        return tokens * hidden * size
    query, key = shape.query_width / layout.tensor, shape.key_width / layout.tensor
    heads, groups = shape.heads / layout.tensor, shape.groups / layout.tensor
    attended_query, attended_keys = query, key  # as the attention kernel keeps them
    if moves_rows:  # rows of keys and of values, and the outputs before they are moved back
        attended_query = 2 * query
        attended_keys = 2 * key * (layout.context + 0.5 if layout.context > 1 else 1)
    # With one group a rank its queries lie side by side already; with several they are copied out.
    kept = 6 * hidden + (4 if groups > 1 else 3) * query + 3 * key
    kept += (shape.ffn_inputs + (3 if shape.gated else 1) * shape.ffn) / layout.tensor
    masks = 0
    if layout.recompute == "none":
        kept += attended_query + attended_keys
        masks = mask_elements(layout, batch)
    statistics = 2 / sequence_split + 2 * heads + groups
    dropped = 2 * hidden if shape.dropout > 0 else 0  # one byte each: the masks of both residual branches
    return tokens * (kept * size + 4 * statistics + dropped) + masks * size


def stage_memory(
    shape: ModelShape, layout: Layout, batch: Batch, stage: int, *, moves_rows: bool = True
) -> StageMemory:
    """Memory of one rank of `stage` at the peak of a step."""
    parameters, trained = stage_parameters(shape, layout, stage), trained_parameters(shape, layout, stage)
    replicas = layout.data * layout.context
    sharded_weights = replicas if layout.fully_sharded else 1
    optimizer_shards = replicas if layout.distributed_optimizer or layout.fully_sharded else 1
    state_bytes = MOMENT_BYTES + (MASTER_BYTES if shape.dtype_bytes != 4 else 0)
    tokens, size = layout.local_tokens(batch), shape.dtype_bytes
    in_flight = min(layout.pipeline - stage, layout.micro_batches(batch))
    layers = shape.num_layers // layout.pipeline
    hidden = shape.hidden / (layout.tensor if layout.sequence_parallel else 1)
    kept = layers * layer_activation_bytes(shape, layout, batch, moves_rows=moves_rows)
    kept += tokens * 2 * shape.head_dim * size  # cosines and sines
    working = tokens * size * (shape.ffn_inputs + shape.ffn + 2 * shape.query_width) / layout.tensor
    if layout.recompute == "full":
        plain = replace(layout, recompute="none")
        working += layer_activation_bytes(shape, plain, batch, moves_rows=moves_rows)
    if stage == 0:
        kept += tokens * 8  # ids
    logits = 0.0
    if stage == layout.pipeline - 1:
        kept += tokens * (3 * hidden * size + 16)  # around the final norm; labels and losses
        logits = min(4 * tokens * shape.vocabulary_rows / layout.tensor, LOGIT_CHUNK_BYTES) * (1 if size == 4 else 1.5)
    communication = 0.0
    if layout.tensor > 1:
        communication += shape.hidden * size  # one gathered input
    if layout.pipeline > 1:
        communication += 4 * hidden * size  # two received, two being sent
    return StageMemory(
        weights=parameters * size / sharded_weights,
        gradients=trained * GRADIENT_BYTES / sharded_weights,
        optimizer=trained * state_bytes / optimizer_shards,
        activations=kept * in_flight,
        logits=logits,
        working=working,
        communication=tokens * communication,
    )


def peak_memory(shape: ModelShape, layout: Layout, batch: Batch, *, moves_rows: bool = True) -> tuple[int, StageMemory]:
    """The stage that needs most, and what it needs."""
    stages = {0, layout.pipeline - 1}
    found = {stage: stage_memory(shape, layout, batch, stage, moves_rows=moves_rows) for stage in stages}
    worst = max(found, key=lambda stage: found[stage].total)
    return worst, found[worst]


def usable_bytes(memory_bytes: float) -> float:
    """Of an accelerator's memory what tensors may take."""
    return memory_bytes * (1 - RESERVED_SHARE) - RESERVED_BYTES
