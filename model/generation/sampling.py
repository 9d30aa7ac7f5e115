"""Choosing the next token: truncation, guidance, and randomness that a batch cannot change.

The number that decides a draw is a hash of (seed, prompt index, position), so that a sequence does not depend on which
other prompts share its batch, nor on the order in which batches run. (Logits may still differ in their last bits when a
matrix product picks another kernel for another batch size.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.generation.grammar import GrammarState, ImageGrammar, Phase
from model.generation.settings import PhaseSampling, SamplingConfig


@dataclass
class Choice:
    """The next token of B rows. `log_probs` is 0 where the grammar forced it."""

    ids: torch.Tensor  # int64 [B]
    log_probs: torch.Tensor  # float32 [B]; under the allowed ids after guidance and temperature, before top-k and top-p
    sampled: torch.Tensor  # bool [B]; False where the grammar left no choice


def uniform_numbers(seed: int, prompt_indices: np.ndarray, num_positions: int) -> np.ndarray:
    """float64 [B, num_positions] in [0, 1): a pure function of (seed, prompt index, position).

    Each number is a chain of splitmix64 finalizers (Steele, Lea and Flood, OOPSLA 2014) over its three coordinates.
    """
    rows = _mix(np.uint64(seed & (2**64 - 1)) ^ _mix(np.asarray(prompt_indices).astype(np.uint64)))
    bits = _mix(rows[:, None] ^ _mix(np.arange(num_positions, dtype=np.uint64) + np.uint64(1 << 32)))
    return (bits >> np.uint64(12)).astype(np.float64) / 2.0**52  # 52 bits: u * total < total for every total near 1


def _mix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: np.ndarray = value ^ (value >> np.uint64(31))
        return result


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance u + scale * (c - u) of two sets of logits [B, V], in log-softmax space."""
    unconditional = torch.log_softmax(unconditional.float(), dim=-1)
    return unconditional + scale * (torch.log_softmax(conditional.float(), dim=-1) - unconditional)


def allowed_log_probs(logits: torch.Tensor, allowed: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """float32 [B, V]: log-probabilities under the allowed ids (bool [B, V]; None: all), -inf for the others.

    Temperature 0 gives those of temperature 1. A trainer calls this too, so that it scores with the sampler's numbers.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def truncate(log_probs: torch.Tensor, settings: PhaseSampling) -> torch.Tensor:
    """Log-probabilities [B, V] with -inf for what top-k and then top-p remove (not normalised again).

    Ids as likely as the last one that is kept by top-k are kept too. The most likely id always stays.
    """
    if 0 < settings.top_k < log_probs.shape[-1]:
        smallest_kept = log_probs.topk(settings.top_k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < smallest_kept, -torch.inf)
    if settings.top_p < 1.0:
        ordered, order = torch.softmax(log_probs.double(), dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        removed = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, before >= settings.top_p)
        log_probs = log_probs.masked_fill(removed, -torch.inf)
    return log_probs


def draw(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 [B]: ids drawn by inverting the cumulative distribution of [B, V] at `uniforms` (float64 [B] in [0, 1))."""
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    threshold = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def choose(
    logits: torch.Tensor, allowed: torch.Tensor | None, settings: PhaseSampling, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One id a row of `logits` [B, V] among the allowed ones, and its log-probability (see `Choice`)."""
    log_probs = allowed_log_probs(logits, allowed, settings.temperature)
    if settings.greedy:
        ids = log_probs.argmax(dim=-1)
    else:
        ids = draw(truncate(log_probs, settings), uniforms)
    return ids, log_probs.gather(-1, ids[:, None]).squeeze(-1)


def next_tokens(
    logits: torch.Tensor,
    state: GrammarState,
    grammar: ImageGrammar,
    sampling: SamplingConfig,
    uniforms: torch.Tensor,
    unconditional: torch.Tensor | None = None,
) -> Choice:
    """The next token of every row: forced where the grammar leaves no choice, drawn elsewhere.

    `logits` [B, padded vocabulary]; `unconditional` the same for the stream without the condition, read for visual
    tokens only. Padded ids are never looked at: text phases read the ids below the visual ones, images the visual ids.
    """
    vocabulary = grammar.vocabulary
    ids = grammar.forced(state)
    sampled = ids < 0
    log_probs = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    codes = torch.nonzero(state.phase == Phase.CODES).squeeze(1)
    others = torch.nonzero(sampled & (state.phase != Phase.CODES)).squeeze(1)
    if len(others):
        mask = grammar.below_visual_mask(state.select(others))
        below_visual = logits[others, : vocabulary.visual_start]
        ids[others], log_probs[others] = choose(below_visual, mask, sampling.text, uniforms[others])
    if len(codes):
        visual = slice(vocabulary.visual_start, vocabulary.size)
        scores = logits[codes, visual]
        if unconditional is not None:
            scores = guide(scores, unconditional[codes, visual], sampling.guidance_scale)
        drawn, log_probs[codes] = choose(scores, None, sampling.image, uniforms[codes])
        ids[codes] = drawn + vocabulary.visual_start
    return Choice(ids, log_probs, sampled)
