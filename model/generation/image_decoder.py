"""The transformer as parallel decoding of images sees it: blocks of tokens, read without a trace or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from model.backbone.key_value_cache import KeyValueCache
from model.backbone.token_step import has_known_layers
from model.generation.decoder import CachedDecoder, decoder_forward, output_logits, without_sequence_parallel


class ImageDecoder(CachedDecoder):
    """A `CachedDecoder` that also reads blocks, and counts its forward passes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.num_forwards = 0
        # Shown images (int64 [R, t]) before each step that refines them, and which rows of the batch they belong to.
        self.watch: Callable[[list[int], torch.Tensor], None] | None = None
        self._rows: list[int] = []

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        self.num_forwards += 1
        return super().start(prompts, max_new_tokens)

    def step(
        self, ids: torch.Tensor, advances: torch.Tensor | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        self.num_forwards += 1
        return super().step(ids, advances, columns)

    @property
    def cache(self) -> KeyValueCache:
        assert self._cache is not None, "start comes first"
        return self._cache

    def look(self, tokens: torch.Tensor, *, whole: bool, columns: slice | None = None) -> torch.Tensor:
        """Logits [R, t, padded vocabulary] after each of int64 [R, t] behind every row, which stays as long as it is.

        `whole`: every token sees all of them (a noisy copy of an image), else those before it. With `columns` only those
        logits, [R, t, n].
        """
        self.num_forwards += 1
        if has_known_layers(self.model):
            with without_sequence_parallel(self.model):
                return output_logits(
                    self.model, self._lean_step(self.cache, copies=whole).look(tokens, whole=whole), columns
                )
        positions = self.cache.lengths[:, None] + torch.arange(tokens.shape[1], device=self.device)
        nothing = torch.zeros_like(self.cache.lengths)
        logits = decoder_forward(self.model, tokens, positions, self.cache, num_new=nothing, whole=whole)
        return logits if columns is None else logits[..., columns]

    def show(self, tokens: torch.Tensor) -> None:
        """Images int64 [R, t] as they are before a step."""
        if self.watch is not None:
            self.watch(self._rows, tokens)

    def extend(self, tokens: torch.Tensor, positions: torch.Tensor, columns: slice) -> torch.Tensor:
        """Logits [R, t, n] of some ids after each of int64 [R, t], which see one another and what the rows hold.

        They belong to the rows from now on. `positions` (int64 [R, t]) say where in their row they stand; adapters take
        them for tokens of a copy.
        """
        self.num_forwards += 1
        if has_known_layers(self.model):
            with without_sequence_parallel(self.model):
                return output_logits(
                    self.model, self._lean_step(self.cache, copies=True).extend(tokens, positions), columns
                )
        return decoder_forward(self.model, tokens, positions, self.cache, whole=True)[..., columns]

    def forget(self, lengths: torch.Tensor) -> None:
        """The rows are as long again as int64 [R] says."""
        self.cache.lengths.copy_(lengths)
        self._token_step = None  # it has counted along

    def keep(self, num_tokens: torch.Tensor) -> None:
        """The first tokens (int64 [R]) of the last look that was not `whole` become part of the rows."""
        self.cache.lengths += num_tokens
        self._token_step = None  # it has counted along

    @contextmanager
    def only(self, rows: torch.Tensor) -> Iterator[None]:
        """Work on some rows (int64 [R]) alone; their cache is copied, unless they are all."""
        whole, self._rows = self.cache, rows.tolist()
        if len(rows) == whole.batch_size:
            yield
            return
        part = KeyValueCache(whole.keys[:, rows], whole.values[:, rows], whole.lengths[rows])
        self._cache, self._token_step = part, None
        try:
            yield
        finally:
            self._cache, self._token_step = whole, None
        whole.keys[:, rows], whole.values[:, rows], whole.lengths[rows] = part.keys, part.values, part.lengths
