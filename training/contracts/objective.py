"""What an objective promises: what is learnt. It knows no ranks' layout and no optimizer; engines bring them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from training.contracts.batches import BatchSource, Ranks
from training.contracts.inputs import LossMaker
from training.contracts.results import StepResult
from training.contracts.shards import ShardReader


class Objective(Protocol):
    """What every objective has. Made by `Class(config, options)`, options of its own dataclass `Options`.

    The fields of `Options` are the keys below `stage.objective`. It may have: `validate(problems, key)`, of the options
    themselves; `validate_run(problems, config)`, of what they ask of the rest; `missing_inputs(key)`, lines on inputs
    that are named and not there; `stage_keys`, the keys of the stage that the objective reads (left out: all of them);
    `fixed`, its keys that stay as they are when a run resumes.
    """

    Options: ClassVar[type]
    engine: ClassVar[str]  # a name of `training.engines.registry`, used where the configuration names none

    def batches(self, ranks: Ranks) -> BatchSource: ...
    def totals(self, batches: Sequence[Any]) -> np.ndarray:
        """float64 [n], counted before the forward pass on this data-parallel rank's batches; the engine adds up."""
        ...

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        """The step's report from what `totals` and `loss` added up over all ranks."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Its share of each checkpoint's manifest, at least "kind"."""
        ...

    def final_metrics(self) -> dict[str, Any]:
        """Figures of the trained model for the summary; raises `UserError` when it is of no use."""
        ...


class TokenObjective(LossMaker, Objective, Protocol):
    """Learns from what the transformer says of tokens; the engines megatron and deepspeed train these."""


class ModuleObjective(Objective, Protocol):
    """Brings a module and its loss along; the engine `replicated` trains these."""

    model: nn.Module
    terms: nn.Module  # trained beside the model by the same optimizer

    def backward(self, batches: Sequence[Any], totals: np.ndarray, num_updates: int) -> torch.Tensor:
        """Add this rank's part of the gradients of the global batch that `totals` counts, normalised over all of it.

        The figures float64 [n], on the device, are added up over all ranks too; `result` understands the sums. Every
        rank leaves gradients on the same parameters.
        """
        ...

    def other_parameters(self) -> Sequence[nn.Parameter]:
        """What optimizers of the objective's own train: the engine adds their gradients up as well."""
        ...

    def update(self, learning_rate: float, num_updates: int) -> None:
        """After every applied step, with the number of applied steps: what the engine's optimizer does not move."""
        ...

    def discard_gradients(self) -> None: ...
    def published(self) -> dict[str, torch.Tensor]:
        """The weights to use."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All else that a checkpoint needs beside the engine's moments."""
        ...

    def load_published(self, reader: ShardReader) -> None: ...


@runtime_checkable
class FittedObjective(Protocol):
    """Done in one go, without steps, batches and checkpoints."""

    def fit(self) -> dict[str, Any]:
        """Make it and publish it in the stage's folder; figures for the summary."""
        ...
