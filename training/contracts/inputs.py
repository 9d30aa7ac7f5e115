"""What passes between an objective and an engine for one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from model.backbone.attention_plan import AttentionPlan

if TYPE_CHECKING:  # it brings megatron along, which takes seconds to import and not every engine needs
    from model.backbone.head import AllowedSets


@dataclass
class ModelInput:
    """One micro-batch: what the model reads and where something is learnt. Flattened to T tokens, numpy, whole.

    An engine that splits a row over context-parallel ranks takes the same tokens of every array.
    """

    tokens: np.ndarray  # int [T]
    position_ids: np.ndarray  # int [T]
    plan: AttentionPlan  # which token sees which, over the T tokens
    labels: np.ndarray  # int [T]
    weights: np.ndarray  # float32 [T]; 0 where nothing is learnt
    fields: dict[str, np.ndarray] = field(default_factory=dict)  # [T] each: class, source, advantage, old_log_prob


@dataclass
class LocalInput:
    """The part of a `ModelInput` that this rank scores, on its device; T_local tokens."""

    labels: torch.Tensor  # int64 [T_local]
    weights: torch.Tensor  # float32 [T_local]
    fields: dict[str, torch.Tensor]  # [T_local] each


class TokenScores(Protocol):
    """What the model says of each of T_local tokens, computed when asked for; never all of [T_local, vocabulary].

    `allowed`: a `model.backbone.head.AllowedSets`, the ids that may stand at each token; all by default.
    """

    def log_probs(self, ids: torch.Tensor, allowed: AllowedSets | None = None) -> torch.Tensor:
        """ids int64 [T_local] -> float32 [T_local], differentiable."""
        ...

    def weighted_losses(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of weights * losses [], differentiable; losses float32 [T_local]) of ids int64 and weights float32
        [T_local], a quarter cheaper. The sum has to become the loss, or a term of it, without a further factor."""
        ...

    def entropy(self, allowed: AllowedSets | None = None) -> torch.Tensor:
        """float32 [T_local], in nats, differentiable."""
        ...

    def log_probs_and_entropy(
        self, ids: torch.Tensor, allowed: AllowedSets | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, for less than the price of both."""
        ...

    def only(self, places: torch.Tensor) -> TokenScores:
        """Of the tokens at `places` (int64 [n]) alone: the others cost nothing then."""
        ...

    def adjusted(
        self, temperatures: torch.Tensor, partners: torch.Tensor | None = None, guidance_scale: float = 1.0
    ) -> TokenScores:
        """Of the distribution that a sampler draws from; see `model.backbone.head.TokenScores.adjusted`."""
        ...


@dataclass
class LossSums:
    """What one micro-batch adds on one rank."""

    loss: torch.Tensor  # [], differentiable, normalised over the global batch: gradients are summed, never averaged
    sums: torch.Tensor  # float64 [num_sums], for the report


class InputMaker(Protocol):
    """The part of an objective that says what a batch means to the model."""

    def inputs(self, batch: Any) -> ModelInput: ...

    def label_log_probs(self, scores: TokenScores, inputs: LocalInput) -> torch.Tensor:
        """float32 [T_local]: what `Policy.log_probs` says of every label, as this objective reads the model."""
        ...


class LossMaker(InputMaker, Protocol):
    """The part of an objective that an engine needs in the middle of a step."""

    num_sums: int

    def loss(self, scores: TokenScores, inputs: LocalInput, totals: torch.Tensor) -> LossSums:
        """Of one micro-batch on a last pipeline stage. `totals` are those of the global batch, on the device."""
        ...
