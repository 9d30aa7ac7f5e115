"""What the workers of `test_plan_memory` run: one step of the real engine, its tensors counted."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.batch import MicroBatch
from training.config import TrainConfig


def one_document_rows(rows: int, length: int) -> MicroBatch:
    """A micro-batch in which every row is one document without padding."""
    tokens = np.random.default_rng(0).integers(0, 900, (rows, length))
    zeros = np.zeros((rows, length))
    return MicroBatch(
        tokens=tokens,
        labels=tokens,
        loss_weights=np.ones((rows, length), np.float32),
        loss_classes=zeros.astype(np.uint8),
        sources=zeros.astype(np.uint16),
        position_ids=np.tile(np.arange(length), (rows, 1)),
        cu_seqlens=np.arange(0, rows * length + 1, length).astype(np.int32),
    )


class SavedTensors:
    """Storages that autograd keeps for the backward pass: bytes now, and at the most so far."""

    def __init__(self, ignored: set[int]):
        self.ignored = ignored
        self.alive: dict[int, tuple[int, int]] = {}  # storage -> (bytes, references)
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.ignored:
            return tensor
        _, references = self.alive.get(address, (0, 0))
        if not references:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.alive[address] = (size, references + 1)
        return Kept(self, address, tensor)

    def drop(self, address: int) -> None:
        size, references = self.alive.pop(address)
        if references > 1:
            self.alive[address] = (size, references - 1)
        else:
            self.now -= size


class Kept:
    """One saved tensor; when autograd lets go of it, it is not counted any more."""

    def __init__(self, owner: SavedTensors, address: int, tensor: torch.Tensor):
        self.owner, self.address, self.tensor = owner, address, tensor

    def __del__(self) -> None:
        self.owner.drop(self.address)


def unpack(kept: Any) -> torch.Tensor:
    return kept.tensor if isinstance(kept, Kept) else kept


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors."""
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def measure(config: TrainConfig) -> dict[str, int]:
    """Bytes of one rank: weights, gradients, optimizer, and what a step keeps between forward and backward."""
    from model.parallel import groups
    from training.engines.megatron.engine import MegatronEngine
    from training.objectives.next_token import NextToken

    engine = MegatronEngine(config)
    objective = NextToken(config, NextToken.Options())
    objective.source_names = ["only"]
    stage = config.stage
    batches = [
        one_document_rows(stage.micro_batch_size, stage.sequence_length)
        for _ in range(stage.global_batch_size // stage.micro_batch_size // engine.ranks.data_parallel_size)
    ]
    weights = storages(engine.model.parameters())
    buffers = [*engine.wrapped.buffers, *engine.wrapped.expert_parallel_buffers]
    gradients = storages(buffer.grad_data for buffer in buffers)
    held = [tensor for _, _, tensor, _ in engine.shards._optimizer_tensors()]
    held = [tensor for tensor in held if tensor.untyped_storage().data_ptr() not in weights]
    optimizer = storages(held)
    saved = SavedTensors(set(weights))
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
        engine.forward_backward(batches, objective)
    engine.optimizer_step(1e-3, 1.0)
    groups.destroy()
    return {
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "activations": saved.peak,
    }
