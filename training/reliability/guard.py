"""The guard: decides whether a step may be applied. A pure state machine, equal on every rank."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

from training.config import ReliabilityConfig
from training.contracts.results import StepResult

NUM_REMEMBERED_NORMS = 64
NUM_NORMS_BEFORE_JUDGING = 16  # a median of fewer says little


class Verdict(Enum):
    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll_back"
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    reason: str = ""


class StepGuard:
    """Non-finite or spiking steps are skipped; too many in a row roll back; too many rollbacks stop the run.

    The number of tries is bounded: at most `max_consecutive_skips` skips between two steps that were applied, and
    at most `max_rollbacks` rollbacks in a run. What it remembers is part of the checkpoint, so that a resumed run
    decides as the unbroken one would.
    """

    def __init__(self, config: ReliabilityConfig):
        self.config = config
        self.num_consecutive_skips = 0
        self.num_rollbacks = 0
        self._norms: deque[float] = deque(maxlen=NUM_REMEMBERED_NORMS)

    def judge(self, result: StepResult) -> Decision:
        if not result.has_labels:  # nothing is wrong with the run: it does not count towards a rollback
            return Decision(Verdict.SKIP, "no label of the global batch has a weight")
        reason = self._find_fault(result.loss, result.gradient_norm)
        if not reason:
            self.num_consecutive_skips = 0
            self._norms.append(result.gradient_norm)
            return Decision(Verdict.APPLY)
        if self.num_consecutive_skips < self.config.max_consecutive_skips:
            self.num_consecutive_skips += 1
            return Decision(Verdict.SKIP, reason)
        return self.judge_weights(reason)

    def judge_weights(self, reason: str) -> Decision:
        """Of weights that cannot be gone on with: no skip mends them."""
        is_allowed = self.num_rollbacks < self.config.max_rollbacks
        return Decision(Verdict.ROLL_BACK if is_allowed else Verdict.STOP, reason)

    def has_rolled_back(self, num_rollbacks: int) -> None:
        """Called after the state of the checkpoint was loaded: the count of rollbacks does not go back with it."""
        self.num_rollbacks = num_rollbacks
        self.num_consecutive_skips = 0

    def state(self) -> dict[str, Any]:
        return {
            "num_consecutive_skips": self.num_consecutive_skips,
            "num_rollbacks": self.num_rollbacks,
            "norms": list(self._norms),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_consecutive_skips = int(state["num_consecutive_skips"])
        self.num_rollbacks = int(state["num_rollbacks"])
        self._norms = deque(state["norms"], maxlen=NUM_REMEMBERED_NORMS)

    def _find_fault(self, loss: float, gradient_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient norm is {gradient_norm}"
        if self.config.spike_factor and len(self._norms) >= NUM_NORMS_BEFORE_JUDGING:
            limit = self.config.spike_factor * statistics.median(self._norms)
            if gradient_norm > limit:
                return f"the gradient norm {gradient_norm:.6g} is above {limit:.6g}"
        return ""
