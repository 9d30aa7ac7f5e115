"""Which part of which logical parameter this rank holds, read from megatron-core's own sharding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from model.errors import UserError
from model.parallel.megatron import ShardedTensor, ShardedTensorFactory, parallel_state

ADAPTER = ".lora."  # in names: between the adapted layer and `a` or `b`


@dataclass(frozen=True)
class Block:
    """A rectangle of a local parameter and its place in the logical one."""

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The rectangle as a view of the local parameter (or of a tensor of its shape)."""
        return local[tuple(slice(o, o + n) for o, n in zip(self.local_offset, self.shape, strict=True))]


@dataclass(frozen=True)
class LogicalParameter:
    """`name` and `global_shape` are the same in every layout; `blocks` cover this rank's local tensor once."""

    name: str
    global_shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    is_split: bool  # over tensor-parallel ranks; otherwise each of them holds the same values


def _block(tensor: ShardedTensor, local_row: int) -> Block:
    prepended = tensor.prepend_axis_num
    shape = tuple(tensor.local_shape)
    offset = tuple(int(value) for value in tensor.global_offset[prepended:])
    return Block((local_row,) + (0,) * (len(shape) - 1), offset, shape)


def _logical(entry: Any) -> LogicalParameter:
    # A fused gate/up projection is a factory of two tensors, one for each half of its rows.
    tensors = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    blocks, local_row = [], 0
    for tensor in tensors:
        blocks.append(_block(tensor, local_row))
        local_row += tensor.local_shape[0]
    global_shape = tuple(int(size) for size in tensors[0].global_shape[tensors[0].prepend_axis_num :])
    is_split = sum(math.prod(block.shape) for block in blocks) < math.prod(global_shape)
    return LogicalParameter(tensors[0].key, global_shape, tuple(blocks), is_split)


def logical_parameters(model: Any) -> dict[str, LogicalParameter]:
    """By local parameter name: what each parameter of an unwrapped GPTModel is a part of."""
    metadata = {
        "non_homogeneous_layers": True,  # one key a layer, with its number in the whole model
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    sharded = model.sharded_state_dict(metadata=metadata)
    found: dict[str, LogicalParameter] = {}
    for name, parameter in model.named_parameters():
        layer, mark, matrix = name.rpartition(ADAPTER)
        if mark:  # an adapter, after its layer's own weight
            found[name] = adapter_part(found[f"{layer}.weight"], matrix, tuple(parameter.shape))
            continue
        entry = sharded[name]
        assert isinstance(entry, ShardedTensor | ShardedTensorFactory), f"{name}: not a sharded tensor"
        found[name] = _logical(entry)
    return found


def adapter_part(weight: LogicalParameter, matrix: str, shape: tuple[int, ...]) -> LogicalParameter:
    """A [rank, in] or B [out, rank] of an adapter (`model.backbone.adapters`), cut as its layer's weight [out, in] is.

    `shape`: of this rank's part. B has the rows of the weight's blocks, A the columns of them.
    """
    name = f"{weight.name.removesuffix('.weight')}{ADAPTER}{matrix}"
    if matrix == "b":
        blocks = tuple(
            Block((one.local_offset[0], 0), (one.global_offset[0], 0), (one.shape[0], shape[1]))
            for one in weight.blocks
        )
        global_shape = (weight.global_shape[0], shape[1])
    else:
        first = weight.blocks[0]  # all of them have the same columns
        blocks = (Block((0, 0), (0, first.global_offset[1]), (shape[0], first.shape[1])),)
        global_shape = (shape[0], weight.global_shape[1])
    is_split = sum(math.prod(block.shape) for block in blocks) < math.prod(global_shape)
    return LogicalParameter(name, global_shape, blocks, is_split)


def mark_split_parameters(model: Any) -> None:
    """Set megatron-core's mark on parameters split over tensor-parallel ranks.

    It sets the mark when it initialises weights itself, which this project does not let it do; the gradient norm
    counts a parameter without the mark on the first rank only.
    """
    logical = logical_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = logical[name].is_split


@torch.no_grad()
def load_weights(model: Any, reader: Any) -> None:
    """Fills this rank's part of a model from a `CheckpointReader`, whatever layout wrote the checkpoint."""
    parameters = dict(model.named_parameters())
    for local_name, logical in logical_parameters(model).items():
        key = f"model/{logical.name}"
        if reader.global_shape(key) != logical.global_shape:
            raise UserError(
                "the checkpoint's weights do not fit its model configuration",
                where=f"{reader.folder}: {key}",
                expected=str(logical.global_shape),
                got=str(reader.global_shape(key)),
            )
        for block in logical.blocks:
            values = reader.read(key, block.global_offset, block.shape)
            block.of(parameters[local_name]).copy_(values)
