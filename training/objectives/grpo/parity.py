"""The gate: trainer and sampler must say the same of the same tokens, or nothing that follows is true.

Same weights, same tokens, two ways of computing. What is wrong with masks, temperatures, guidance, positions or the
cache shows here by orders of magnitude; a loss would hide it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.errors import UserError
from training.contracts.batches import Ranks
from training.objectives.grpo.rows import MicroBatch

# Of the mean |log pi_old - log mu| over sampled tokens. Guidance trained by the conditional alone gives 0.4.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Parity:
    """Of all ranks' sampled tokens."""

    num_tokens: int
    mean: float  # of |log pi_old - log mu|
    largest: float

    def is_within(self, dtype: str) -> bool:
        return self.mean <= TOLERANCES[dtype]  # NaN is not

    def refuse_beyond(self, dtype: str) -> None:
        """Raises `UserError` where trainer and sampler do not agree."""
        if not self.is_within(dtype):
            raise UserError(
                "trainer and sampler do not agree on the log-probabilities of the answers drawn: nothing is trained",
                expected=f"a mean difference of at most {TOLERANCES[dtype]:g} ({dtype})",
                got=f"mean {self.mean:.3g}, largest {self.largest:.3g}, of {self.num_tokens:,} sampled tokens",
                fix="an engine or a sampler of your own must draw from what `label_log_probs` scores; "
                "check guidance, temperature and the allowed sets",
            )


def difference(ranks: Ranks, batches: Sequence[MicroBatch], log_probs: Sequence[torch.Tensor]) -> Parity:
    """Between what the trainer says (float32 [T] of each batch) and what the sampler said; the same on every rank."""
    found = [
        np.abs(values.double().cpu().numpy() - batch.fields["sampler"])[batch.learnt > 0]
        for batch, values in zip(batches, log_probs, strict=True)
    ]
    here = np.concatenate([np.zeros(0), *found])
    mine = [len(here), float(here.sum()), float(here.max(initial=0.0))]
    payload = json.dumps(mine if ranks.is_first_of_replica else [0, 0.0, 0.0])
    counts, sums, largest = zip(*(json.loads(one) for one in ranks.gather(payload.encode())), strict=True)
    return Parity(sum(counts), sum(sums) / max(1, sum(counts)), float(np.max(largest)))
