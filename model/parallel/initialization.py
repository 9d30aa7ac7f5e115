"""Initial weights as a function of (seed, logical name of the parameter): the same in every layout.

Matrices are normal(0, std) with std = `init_std`; the two that write into the residual stream (attention output and
MLP down projection) use init_std / sqrt(2 * num_layers), as megatron-core does. Norms start at one. An adapter's A is
normal(0, 1 / sqrt(hidden_size)), its B zero. Rows that pad the
vocabulary are drawn like the others. A matrix is drawn in blocks of rows, each from its own generator, so that a rank
draws little more than the part it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from model.config import ModelConfig

if TYPE_CHECKING:  # importing it imports megatron-core, which conversion does without
    from model.parallel.sharding import Block, LogicalParameter

_BLOCK_ELEMENTS = 1 << 24  # of one generator; part of the definition: changing it changes every initial weight
_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def standard_deviation(name: str, config: ModelConfig) -> float | None:
    """Of a parameter's initial values; None for norms, which start at one."""
    if name.endswith(("norm.weight", "norm_weight")):
        return None
    if name.endswith(".lora.a"):
        return 1.0 / math.sqrt(config.hidden_size)
    if name.endswith(".lora.b"):
        return 0.0  # the adapted model starts as the model itself
    if name.endswith(_RESIDUAL_OUTPUTS):
        return config.init_std / math.sqrt(2.0 * config.num_layers)
    return config.init_std


def rows_of_a_block(row_elements: int) -> int:
    """How many rows one generator draws: the cheapest number to ask `initial_rows` for."""
    return max(1, _BLOCK_ELEMENTS // row_elements)


def initial_rows(
    name: str, shape: tuple[int, ...], std: float | None, seed: int, start: int, stop: int
) -> torch.Tensor:
    """Rows [start, stop) of the logical parameter `name` of the given full shape; float32 on the CPU."""
    if std is None:
        return torch.ones(stop - start, *shape[1:])
    row_elements = math.prod(shape[1:])
    block_rows = rows_of_a_block(row_elements)
    parts = []
    for block in range(start // block_rows, -(-stop // block_rows)):
        first, last = block * block_rows, min((block + 1) * block_rows, shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.normal(0.0, std, (last - first, *shape[1:]), generator=generator)
        parts.append(values[max(start, first) - first : min(stop, last) - first])
    return torch.cat(parts)


def _initial_block(parameter: LogicalParameter, block: Block, std: float | None, seed: int) -> torch.Tensor:
    start, length = block.global_offset[0], block.shape[0]
    rows = initial_rows(parameter.name, parameter.global_shape, std, seed, start, start + length)
    inner = tuple(slice(o, o + n) for o, n in zip(block.global_offset[1:], block.shape[1:], strict=True))
    return rows[(slice(None), *inner)]


@torch.no_grad()
def initialize(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter of this rank its part of the logical initial weights."""
    from model.parallel.sharding import logical_parameters

    parameters = dict(model.named_parameters())
    for local_name, logical in logical_parameters(model).items():
        std = standard_deviation(logical.name, config)
        for block in logical.blocks:
            block.of(parameters[local_name]).copy_(_initial_block(logical, block, std, seed))


class InitialWeights:
    """The initial weights read like a checkpoint (`training.contracts.shards.ShardReader`), by `model/` + logical name.

    For ranks that hold parts of parameters only, whatever those parts are.
    """

    def __init__(self, parameters: Iterable[LogicalParameter], config: ModelConfig, seed: int):
        self.shapes = {f"model/{one.name}": one.global_shape for one in parameters}
        self.config, self.seed = config, seed

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def global_shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key]

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        name = key.removeprefix("model/")
        std = standard_deviation(name, self.config)
        rows = initial_rows(name, self.shapes[key], std, self.seed, offset[0], offset[0] + shape[0])
        inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True))
        return rows[(slice(None), *inner)]
