"""The transformer as generation sees it: read a prompt once, then one token a step, with the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.backbone.key_value_cache import KeyValueCache
from model.backbone.transformer import GPTModel, allocate_cache, decoder_forward


class CachedDecoder:
    """Implements `model.generation.ar.Decoder` for a model that is not split over pipeline stages.

    Prompts of different lengths share a batch: every row starts at slot 0 and has its own length.
    """

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._cache: KeyValueCache | None = None

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        tokens = torch.zeros((len(prompts), longest), dtype=torch.int64, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64, device=self.device)
        self._cache = None  # let go of the last batch's memory first
        self._cache = allocate_cache(self.model, len(prompts), longest + max_new_tokens)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), -1)
        logits = decoder_forward(self.model, tokens, positions, self._cache, num_new=lengths, last_only=True)
        return logits[:, 0]

    def step(self, ids: torch.Tensor, advances: torch.Tensor | None = None) -> torch.Tensor:
        assert self._cache is not None, "start comes before step"
        positions = self._cache.lengths[:, None].clone()
        num_new = None if advances is None else advances.to(torch.int64)
        logits = decoder_forward(self.model, ids[:, None], positions, self._cache, num_new=num_new)
        return logits[:, 0]
