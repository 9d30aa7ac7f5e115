"""Where batches come from, and what a source may ask of the ranks and of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from training.contracts.inputs import InputMaker
from training.contracts.run_view import LoopState
from training.contracts.shards import ShardReader


class Ranks(Protocol):
    """Who takes part, and the two things they do together outside of a step."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when true on any: the ranks' common decision (signals, stops). Reads no device."""
        ...

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64, added up over all ranks on the host; the same on every rank."""
        ...

    def barrier(self) -> None: ...

    @property
    def is_first_of_replica(self) -> bool:
        """One rank of each replica: the one that writes and asks for the others of its replica."""
        ...

    def gather(self, payload: bytes) -> list[bytes]:
        """What every rank brought, by rank, on every rank; over the hosts' process group."""
        ...


class Policy(Protocol):
    """The weights in training, asked without gradient."""

    def log_probs(self, batches: Sequence[Any], objective: InputMaker) -> list[torch.Tensor]:
        """float32 [tokens] of each batch: the log-probability of every label, the same on every rank of a replica."""
        ...

    def weights_of(self, reader: ShardReader) -> AbstractContextManager[None]:
        """The weights of a checkpoint in place of those in training, for the time of the context (reference policies).

        They are kept from the first call on, on the host or cut over the replicas; those in training come back bit for bit.
        """
        ...

    def offloaded(self) -> AbstractContextManager[None]:
        """For the time of the context, what only updates need is off the device: gradients are lost, the rest comes back.

        Answers may be drawn and scored meanwhile; no update may be made.
        """
        ...

    def decoder(self) -> AbstractContextManager[Any]:
        """A `model.generation.decoder.CachedDecoder` over these weights, for the time of the context."""
        ...


class BatchSource(Protocol):
    """Where batches come from: rows read from disk, or rollouts drawn from the weights."""

    fingerprint: str  # of the data; a checkpoint of other data is not continued

    def next(self, state: LoopState, policy: Policy, interrupted: Callable[[], bool]) -> Sequence[Any]:
        """This data-parallel rank's micro-batches of the next global batch; called on the main thread.

        May return nothing once `interrupted()`: the loop then stops before it uses them.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What it needs beside `LoopState` to go on after a restart: JSON values, taken from rank 0."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...
