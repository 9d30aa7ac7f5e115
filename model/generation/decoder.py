"""The transformer as generation sees it: read a prompt once, then one token a step, with the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as functional

from model.backbone.key_value_cache import KeyValueCache
from model.backbone.packed_attention import CachedSequences
from model.backbone.rotary import rotary_tables
from model.backbone.token_step import TokenStep, has_known_layers
from model.config import ModelConfig
from model.parallel.megatron import GPTModel, set_model_to_sequence_parallel
from model.vocabulary import Vocabulary


class CachedDecoder:
    """Implements `model.generation.ar.Decoder` for a model that is not split over pipeline stages.

    Prompts of different lengths share a batch: every row starts at slot 0 and has its own length.
    """

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._cache: KeyValueCache | None = None
        self._token_step: TokenStep | None = None

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        """Equal prompts are read once: the answers of a group cost one prompt."""
        rows: dict[tuple[int, ...], int] = {}  # of each distinct prompt
        row_of = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in rows], device=self.device)
        longest = int(lengths.max())
        tokens = torch.zeros((len(rows), longest), dtype=torch.int64, device=self.device)
        for prompt, row in rows.items():
            tokens[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64, device=self.device)
        self._cache = self._token_step = None  # let go of the last batch's memory first
        are_distinct = len(rows) == len(prompts)
        read = allocate_cache(self.model, len(rows), longest + (max_new_tokens if are_distinct else 0))
        logits = self._read_prompts(tokens, lengths, read)
        if are_distinct:
            self._cache = read
            return logits
        index = torch.tensor(row_of, device=self.device)
        self._cache, self._token_step = allocate_cache(self.model, len(prompts), longest + max_new_tokens), None
        self._cache.fill(read, index)
        return logits[index]

    def _read_prompts(self, tokens: torch.Tensor, lengths: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Logits [R, padded vocabulary] after the first `lengths` (int64 [R]) of int64 [R, t] into an empty cache."""
        if has_known_layers(self.model):
            with without_sequence_parallel(self.model):
                return output_logits(self.model, self._lean_step(cache).read_prompts(tokens, lengths), None)
        positions = torch.arange(tokens.shape[1], device=self.device).expand(len(tokens), -1)
        return decoder_forward(self.model, tokens, positions, cache, num_new=lengths, last_only=True)[:, 0]

    def step(
        self, ids: torch.Tensor, advances: torch.Tensor | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        assert self._cache is not None, "start comes before step"
        ids = ids.view(len(ids), -1)
        if has_known_layers(self.model):
            with without_sequence_parallel(self.model):
                return output_logits(self.model, self._lean_step(self._cache).run(ids, advances), columns)
        positions = self._cache.lengths[:, None] + torch.arange(ids.shape[1], device=self.device)
        num_new = None if advances is None else advances * ids.shape[1]
        logits = decoder_forward(self.model, ids, positions, self._cache, num_new=num_new)[:, -1]
        return logits if columns is None else logits[:, columns]

    def _lean_step(self, cache: KeyValueCache, *, copies: bool = False) -> TokenStep:
        """For clean tokens, or for those of copies of images."""
        adapter = self.model.model_config.adapter
        adapted = adapter.rank > 0 and (copies or adapter.tokens == "all")
        if self._token_step is None or self._token_step.adapted != adapted:
            self._token_step = TokenStep(self.model, cache, adapted=adapted)
        return self._token_step


@contextmanager
def without_sequence_parallel(model: GPTModel) -> Iterator[None]:
    """Switch sequence parallelism off: a decoding step has too few tokens to split."""
    was_on = model.config.sequence_parallel
    if was_on:
        set_model_to_sequence_parallel(model, False)
    try:
        yield
    finally:
        if was_on:
            set_model_to_sequence_parallel(model, True)


def allocate_cache(model: GPTModel, batch_size: int, max_length: int) -> KeyValueCache:
    """An empty cache for `decoder_forward` with this model."""
    core = model.config
    parameter = next(model.parameters())
    return KeyValueCache.allocate(
        num_layers=len(model.decoder.layers),
        batch_size=batch_size,
        max_length=max_length,
        num_groups=core.num_query_groups // core.tensor_model_parallel_size,
        head_dim=core.kv_channels,
        dtype=parameter.dtype,
        device=parameter.device,
    )


@torch.no_grad()
def decoder_forward(
    model: GPTModel,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    cache: KeyValueCache,
    *,
    num_new: torch.Tensor | None = None,
    last_only: bool = False,
    whole: bool = False,
) -> torch.Tensor:
    """Run new tokens of B sequences behind what the cache holds of them, and append them to it.

    `tokens`, `position_ids`: int64 [B, t]. Row b's tokens take the slots from `cache.lengths[b]` on. `num_new` int64
    [B]: how many of the t tokens of each row are real (all by default); those behind are padding, and only the real
    ones lengthen the row. Returns float32 logits [B, t, padded vocabulary], ids that pad the vocabulary at -inf; with
    `last_only` [B, 1, ...] of each row's last real token. With `whole` every new token sees all new tokens, as those of a
    noisy copy of an image do. All tensor-parallel ranks return the same; the model must
    not be split over pipeline stages.
    """
    assert hasattr(model, "embedding"), "decoding needs the whole depth on one rank"
    assert hasattr(model, "output_layer"), "decoding needs the whole depth on one rank"
    config: ModelConfig = model.model_config
    step = _cached_step(config, position_ids, cache, whole)
    was_training = model.training
    if was_training:  # each switch walks over all modules: as dear as a small layer's step
        model.eval()
    with without_sequence_parallel(model):
        hidden = model.embedding(tokens, None)
        hidden = model.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=step)
        if last_only:
            hidden = _last_real(hidden, num_new)
        logits, _ = model.output_layer(hidden, runtime_gather_output=True)
    if was_training:
        model.train()
    cache.lengths += tokens.shape[1] if num_new is None else num_new
    logits = logits.transpose(0, 1).float()
    logits[..., Vocabulary.from_config(config.vocabulary).size :] = float("-inf")
    result: torch.Tensor = logits
    return result


@torch.no_grad()
def output_logits(model: GPTModel, hidden: torch.Tensor, columns: slice | None) -> torch.Tensor:
    """float32 logits of some ids (all by default: padding of the vocabulary at -inf) from [..., h] behind the last norm."""
    vocabulary_size = Vocabulary.from_config(model.model_config.vocabulary).size
    if model.config.tensor_model_parallel_size > 1:
        logits, _ = model.output_layer(hidden.flatten(0, -2)[None], runtime_gather_output=True)
        logits = logits.view(*hidden.shape[:-1], -1)
        found: torch.Tensor = logits if columns is None else logits[..., columns]
    else:
        weight = model.output_layer.weight
        found = functional.linear(hidden, weight if columns is None else weight[columns])
    found = found.float()
    if columns is None:
        found[..., vocabulary_size:] = float("-inf")
    return found


def _last_real(hidden: torch.Tensor, num_new: torch.Tensor | None) -> torch.Tensor:
    """[t, B, h] -> [1, B, h], the last real token of each row."""
    if num_new is None:
        return hidden[-1:]
    rows = torch.arange(hidden.shape[1], device=hidden.device)
    return hidden[num_new - 1, rows][None]


def _cached_step(config: ModelConfig, position_ids: torch.Tensor, cache: KeyValueCache, whole: bool) -> CachedSequences:
    steps = torch.arange(position_ids.shape[1], device=position_ids.device)
    slots = cache.lengths[:, None] + steps[None]
    reach = int(slots.max()) + 1
    assert reach <= cache.max_length, f"the cache holds {cache.max_length} tokens, {reach} are needed"
    is_even = len(steps) == 1 and bool((cache.lengths == cache.lengths[0]).all())
    mask = None
    if not is_even:
        last_seen = slots[:, -1:].expand_as(slots) if whole else slots
        mask = torch.arange(reach, device=slots.device)[None, None, None] <= last_seen[:, None, :, None]
    cos, sin = rotary_tables(position_ids.T, config.head_dim, config.rope_theta, cache.keys.dtype)
    return CachedSequences(
        qkv_format="sbhd",
        cache=cache,
        slots=slots,
        mask=mask,
        reach=reach,
        rotary_cos=cos[:, :, None],
        rotary_sin=sin[:, :, None],
        copies=whole,
    )
