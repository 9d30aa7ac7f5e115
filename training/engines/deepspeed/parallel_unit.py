"""The ranks of megatron-core's layout under the names by which DeepSpeed asks for them (its `mpu`)."""

from __future__ import annotations

from typing import Any

from model.parallel.megatron import parallel_state


class ParallelUnit:
    """Model parallel means tensor parallel here: the engine has no pipeline.

    Data-parallel ranks include context-parallel ones: both see other tokens and sum their gradients. There are no
    functions of a "sequence parallel" group on purpose, DeepSpeed would take them for its own Ulysses.
    """

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        rank: int = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return rank

    def get_data_parallel_world_size(self) -> int:
        size: int = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return size

    def get_tensor_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        rank: int = parallel_state.get_tensor_model_parallel_rank()
        return rank

    def get_tensor_model_parallel_world_size(self) -> int:
        size: int = parallel_state.get_tensor_model_parallel_world_size()
        return size

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
