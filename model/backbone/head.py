"""The output layer in chunks of tokens: log-probabilities and entropies that never hold the logits of all tokens.

The logits of 32,768 tokens over the 282,926 ids of Emu3.5 are 37 GB in float32. Here a chunk of tokens is taken to
logits, reduced to a few numbers a token, and forgotten. The backward pass computes the chunk's logits again, except
that of `weighted_losses`, whose gradient is known as soon as the logits are and is made beside them. The matrix
products run in the parameters' dtype and the softmax in float32, as in megatron-core's output layer and cross entropy.
The vocabulary may be split over tensor-parallel ranks; each call has two small collectives, `weighted_losses` each chunk.

Notation, for a token: x = logits minus the largest one held here, p = softmax(logits), H = entropy.
Of a loss with d loss / d log-probability = g and d loss / d H = e the gradient of logit j is
g (1[j is the given id] - p_j) - e p_j (log p_j + H).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch.autograd.function import once_differentiable

from model.config import LOGIT_CHUNK_BYTES
from model.parallel.megatron import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    parallel_state,
)
from model.vocabulary import Vocabulary

# Of one block of the weight gradient before it is added in float32, when the parameters are not float32 themselves.
WEIGHT_BLOCK_BYTES = 1 << 26
# The logit of an id that takes no part: exp(EXCLUDED - any real logit) is exactly 0, and 0 * EXCLUDED is no NaN.
EXCLUDED = -1e30


@dataclass(frozen=True)
class AllowedSets:
    """Which ids may stand at each token: a few distinct sets, and which of them is whose.

    `sets`: bool [number of sets, padded vocabulary], such as the distinct rows of `ImageGrammar.mask` along a sequence
    (text, text without BOI, visual codes, each forced id, digits of a header). `index`: int64 [T], a row of `sets`;
    -1: all ids of the vocabulary. The log-probability of an id outside its set is -inf. A set of one id (a forced
    token) gives log-probability 0, entropy 0 and gradient 0, all exact.
    """

    sets: torch.Tensor
    index: torch.Tensor

    @classmethod
    def from_masks(cls, masks: torch.Tensor) -> AllowedSets:
        """From one mask a token, bool [T, padded vocabulary]: equal rows become one set."""
        sets, index = torch.unique(masks, dim=0, return_inverse=True)
        return cls(sets, index)


def gathered_hidden(hidden: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """What a tensor-parallel output layer reads: the hidden states of all tokens, [T, 1, h] on every rank.

    With sequence parallelism `hidden` is this rank's [T / tensor, 1, h]: gathered forward, summed and scattered
    backward. Without it every rank has all tokens: copied forward, summed backward.
    """
    if sequence_parallel:
        gathered: torch.Tensor = gather_from_sequence_parallel_region(hidden)
        return gathered
    copied: torch.Tensor = copy_to_tensor_model_parallel_region(hidden)
    return copied


class TokenScores:
    """Scores of every token of a micro-batch; each method computes when it is called, in chunks of tokens.

    `hidden`: [T, 1, h] behind the final norm ([T / tensor, 1, h] with `sequence_parallel`); `weight`: the output
    layer's [padded vocabulary / tensor, h] of this rank. `chunk_tokens` overrides the number of tokens whose logits
    exist at once (default: `LOGIT_CHUNK_BYTES` of float32). Ids from `vocabulary.size` on have probability exactly 0.

    All tensor-parallel ranks call the same methods in the same order and get the same values. Differentiable once. The
    gradient of `weight` is summed in float32: in place in `weight.main_grad` where megatron-core's data-parallel
    wrapper has put a float32 one (autograd then sees none), else in a tensor that autograd hands on.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        vocabulary: Vocabulary,
        *,
        sequence_parallel: bool = False,
        chunk_tokens: int | None = None,
    ) -> None:
        assert hidden.dim() == 3, f"hidden states are [T, 1, h], got {tuple(hidden.shape)}"
        assert hidden.shape[1] == 1, f"hidden states are [T, 1, h], got {tuple(hidden.shape)}"
        num_columns = weight.shape[0]
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        assert num_columns * tensor_size == vocabulary.padded_size, "weight holds the padded vocabulary / tensor"
        self._hidden = gathered_hidden(hidden, sequence_parallel).squeeze(1)
        self._weight = weight
        first = parallel_state.get_tensor_model_parallel_rank() * num_columns
        chunk = chunk_tokens or max(1, LOGIT_CHUNK_BYTES // (4 * num_columns))
        num_valid = min(max(0, vocabulary.size - first), num_columns)
        self._columns = _Columns(first, num_columns, num_valid, chunk)

    def log_probs(self, ids: torch.Tensor, allowed: AllowedSets | None = None) -> torch.Tensor:
        """float32 [T]: log-probability of `ids` (int64 [T]), among the allowed ids of each token if given."""
        return self._compute(ids, allowed, with_entropy=False)[0]

    def entropy(self, allowed: AllowedSets | None = None) -> torch.Tensor:
        """float32 [T], in nats, of the distribution over the allowed ids of each token (all by default)."""
        any_ids = torch.zeros(len(self._hidden), dtype=torch.int64, device=self._hidden.device)
        return self._compute(any_ids, allowed, with_entropy=True)[1]

    def log_probs_and_entropy(
        self, ids: torch.Tensor, allowed: AllowedSets | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, for the price of one pass over the logits."""
        return self._compute(ids, allowed, with_entropy=True)

    def weighted_losses(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of weights * losses [], losses [T]), float32; a loss is minus the log-probability of the id.

        For a loss that is linear in the log-probabilities with `weights` (float32 [T]) known beforehand: three matrix
        products instead of four. The sum alone is differentiable, and is meant to be the loss or a term of it: its own
        gradient has to be 1, since that of the weight may be in `main_grad` by then. Anything else is an error.
        """
        assert ids.shape == self._hidden.shape[:1], f"ids are [T] = [{len(self._hidden)}], got {tuple(ids.shape)}"
        if not torch.is_grad_enabled():
            losses = -self.log_probs(ids)
            return torch.dot(losses, weights), losses
        found: tuple[torch.Tensor, torch.Tensor] = _WeightedLosses.apply(  # type: ignore[no-untyped-call]
            self._hidden, self._weight, ids, weights, self._columns
        )
        return found

    def only(self, places: torch.Tensor) -> TokenScores:
        """Of the tokens at `places` (int64 [n]) alone: the others cost nothing then."""
        found = copy.copy(self)
        found._hidden = self._hidden[places]
        return found

    def adjusted(
        self, temperatures: torch.Tensor, partners: torch.Tensor | None = None, guidance_scale: float = 1.0
    ) -> TokenScores:
        """Scores of the distribution that a sampler draws from, with temperature and classifier-free guidance.

        `temperatures` float32 [T]. `partners` int64 [T]: for a guided token the place of the hidden state without the
        condition, -1 for the others. Exact: the output layer is linear, so the guided logits u + scale (c - u) are
        those of the same mixture of hidden states, whose gradient reaches both.
        """
        hidden = self._hidden.float()
        if partners is not None:
            guided = guidance_scale * hidden + (1 - guidance_scale) * hidden[partners.clamp(min=0)]
            hidden = torch.where((partners >= 0)[:, None], guided, hidden)
        found = copy.copy(self)
        found._hidden = (hidden / temperatures[:, None]).to(self._hidden.dtype)
        return found

    def _compute(
        self, ids: torch.Tensor, allowed: AllowedSets | None, *, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert ids.shape == self._hidden.shape[:1], f"ids are [T] = [{len(self._hidden)}], got {tuple(ids.shape)}"
        exclusion = self._columns.exclusion(allowed) if allowed is not None else None
        needs_gradient = torch.is_grad_enabled() and (self._hidden.requires_grad or self._weight.requires_grad)
        scores: tuple[torch.Tensor, torch.Tensor] = _Scores.apply(  # type: ignore[no-untyped-call]
            self._hidden, self._weight, ids, self._columns, exclusion, with_entropy, needs_gradient
        )
        return scores


@dataclass(frozen=True)
class _Exclusion:
    """Allowed sets in the form that the chunks use."""

    columns: torch.Tensor  # bool [sets + 1, columns of this rank]: takes no part; the last row is for "all ids"
    index: torch.Tensor  # int64 [T], a row of `columns`
    forced: torch.Tensor  # bool [T]: one id is allowed


@dataclass(frozen=True)
class _Columns:
    """This rank's columns of the logits, and how many tokens are worked on at once."""

    first: int  # id of the first column
    size: int
    num_valid: int  # columns before the ids that only pad the vocabulary
    chunk_tokens: int

    def exclusion(self, allowed: AllowedSets) -> _Exclusion:
        assert allowed.sets.shape[1] >= self.first + self.size, "sets are [number of sets, padded vocabulary]"
        num_sets, last = len(allowed.sets), self.first + self.num_valid
        columns = allowed.sets.new_ones((num_sets + 1, self.size))
        columns[:-1, : self.num_valid] = ~allowed.sets[:, self.first : last]
        columns[-1, : self.num_valid] = False
        index = torch.where(allowed.index < 0, num_sets, allowed.index)
        forced = torch.cat((allowed.sets.sum(1) == 1, allowed.sets.new_zeros(1)))
        return _Exclusion(columns, index, forced[index])

    def own(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The column of each id (0 where another rank has it), and bool: this rank has it."""
        local_ids = ids - self.first
        held = (local_ids >= 0) & (local_ids < self.size)
        return torch.where(held, local_ids, 0), held

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))

    def new_buffer(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [tokens of a whole chunk, columns], which all chunks of a pass share: its pages are touched once."""
        return hidden.new_empty((min(self.chunk_tokens, len(hidden)), self.size), dtype=torch.float32)

    def logits(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        exclusion: _Exclusion | None,
        chunk: slice,
        buffer: torch.Tensor,
    ) -> torch.Tensor:
        """float32 [chunk, columns], in the buffer; excluded ids at EXCLUDED."""
        logits = buffer[: chunk.stop - chunk.start]
        if weight.dtype == logits.dtype:
            torch.matmul(hidden[chunk], weight.t(), out=logits)
        else:
            logits.copy_(torch.matmul(hidden[chunk], weight.t()))
        if exclusion is not None:
            return logits.masked_fill_(exclusion.columns[exclusion.index[chunk]], EXCLUDED)
        logits[:, self.num_valid :] = EXCLUDED
        return logits


class _Scores(torch.autograd.Function):
    """(log-probability of ids [T], entropy [T]); the entropy is zero unless asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        columns: _Columns,
        exclusion: _Exclusion | None,
        with_entropy: bool,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local_ids, held = columns.own(ids)
        # A row each: largest logit; logit of the id; sum of exp(x); sum of x exp(x). Of this rank's columns.
        local = hidden.new_zeros((4, len(hidden)), dtype=torch.float32)
        buffer = columns.new_buffer(hidden)
        for chunk in columns.chunks(len(hidden)):
            x = columns.logits(hidden, weight, exclusion, chunk, buffer)
            _reduce_chunk(x, local_ids[chunk], local[:, chunk], with_entropy)
        # If one chunk holds all tokens, nothing needs to be computed twice.
        kept = buffer if needs_gradient and len(buffer) == len(hidden) else None
        held &= ~(local[1] <= EXCLUDED)  # NaN stays NaN
        largest, total, log_probs, entropy = _combine_ranks(local, held)
        unused = torch.zeros_like(entropy)
        if not with_entropy:
            ctx.mark_non_differentiable(unused)
        ctx.set_materialize_grads(False)
        ctx.columns, ctx.exclusion, ctx.kept, ctx.kept_is_exp = columns, exclusion, kept, not with_entropy
        ctx.save_for_backward(hidden, weight, local_ids, held, local[0], largest, total, entropy)
        return log_probs, entropy if with_entropy else unused

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Any:
        hidden, weight, local_ids, held, local_largest, largest, total, entropy = ctx.saved_tensors
        columns, exclusion = ctx.columns, ctx.exclusion
        shift = local_largest - largest
        tokens = _TokenGradients(
            log_probs=_without_forced(grad_log_probs, exclusion, like=total),
            entropy=None if grad_entropy is None else _without_forced(grad_entropy, exclusion, like=total),
            local_ids=local_ids,
            held=held,
            scale=torch.exp(shift) / total,
            offset=shift - torch.log(total) + entropy,
        )
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _float32_gradient(weight) if ctx.needs_input_grad[1] else None
        # What was kept is overwritten here; a second backward pass computes it again.
        kept, ctx.kept = ctx.kept, None
        is_exp = kept is not None and ctx.kept_is_exp
        buffer = columns.new_buffer(hidden) if kept is None else kept
        for chunk in columns.chunks(len(hidden)):
            x = kept
            if x is None:
                x = columns.logits(hidden, weight, exclusion, chunk, buffer).sub_(local_largest[chunk, None])
            _add_chunk(tokens.of_logits(x, is_exp, chunk), hidden, weight, chunk, grad_hidden, grad_weight)
        return grad_hidden, _for_autograd(grad_weight, weight), None, None, None, None, None


class _WeightedLosses(torch.autograd.Function):
    """(weighted sum of losses [], losses [T]); the gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        columns: _Columns,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local_ids, held = columns.own(ids)
        losses = torch.empty_like(weights)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _float32_gradient(weight) if ctx.needs_input_grad[1] else None
        buffer = columns.new_buffer(hidden)
        for chunk in columns.chunks(len(hidden)):
            exponentials = columns.logits(hidden, weight, None, chunk, buffer)
            local = hidden.new_zeros((4, len(exponentials)), dtype=torch.float32)
            _reduce_chunk(exponentials, local_ids[chunk], local, with_entropy=False)
            held_here = held[chunk] & ~(local[1] <= EXCLUDED)  # NaN stays NaN
            largest, total, log_probs, _ = _combine_ranks(local, held_here)
            losses[chunk] = -log_probs
            tokens = _TokenGradients(
                log_probs=-weights[chunk],
                entropy=None,
                local_ids=local_ids[chunk],
                held=held_here,
                scale=torch.exp(local[0] - largest) / total,
                offset=total,  # of entropies only
            )
            grad_logits = tokens.of_logits(exponentials, True, slice(None))
            _add_chunk(grad_logits, hidden, weight, chunk, grad_hidden, grad_weight)
        ctx.grad_hidden, ctx.grad_weight = grad_hidden, _for_autograd(grad_weight, weight)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return torch.dot(losses, weights), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor, _: None) -> Any:
        torch._assert_async(grad_sum == 1, "the weighted sum of losses has to be a term of the loss as it is")
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        return grad_hidden, grad_weight, None, None, None


def _add_chunk(
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    chunk: slice,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """A chunk's share of both gradients, from float32 [chunk, columns]."""
    grad_logits = grad_logits.to(weight.dtype)
    if grad_hidden is not None:
        torch.matmul(grad_logits, weight, out=grad_hidden[chunk])
    if grad_weight is not None:
        _add_product(grad_weight, grad_logits.t(), hidden[chunk])


def _for_autograd(grad_weight: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """None where the gradient is already where megatron-core's data-parallel wrapper would add it."""
    if grad_weight is None or grad_weight is getattr(weight, "main_grad", None):
        return None
    return grad_weight.to(weight.dtype)


def _reduce_chunk(x: torch.Tensor, local_ids: torch.Tensor, local: torch.Tensor, with_entropy: bool) -> None:
    """Fill `local` [4, chunk] (see `_Scores.forward`) from logits x, which become x (with entropy) or exp(x)."""
    local[0] = x.amax(1)
    local[1] = x.gather(1, local_ids[:, None])[:, 0]
    x.sub_(local[0, :, None])
    if not with_entropy:
        local[2] = x.exp_().sum(1)
        return
    exponentials = x.exp()
    local[2] = exponentials.sum(1)
    local[3] = exponentials.mul_(x).sum(1)


def _combine_ranks(
    local: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Over tensor-parallel ranks, float32 [T] each: largest logit, sum of exponentials, log-probability, entropy."""
    group = parallel_state.get_tensor_model_parallel_group()
    local_largest, predicted, total, weighted = local
    largest = local_largest.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    shift = local_largest - largest
    factor = torch.exp(shift)
    sums = torch.stack(
        (torch.where(held, predicted, 0.0), held.float(), total * factor, (weighted + shift * total) * factor)
    )
    distributed.all_reduce(sums, group=group)
    predicted, found, total, weighted = sums
    log_total = torch.log(total)
    log_probs = torch.where(found > 0, predicted - largest - log_total, -torch.inf)
    return largest, total, log_probs, log_total - weighted / total


@dataclass(frozen=True)
class _TokenGradients:
    """What the gradient of a token's logits is made of; every tensor is [T]."""

    log_probs: torch.Tensor  # g
    entropy: torch.Tensor | None  # e
    local_ids: torch.Tensor  # column of the given id, where `held`
    held: torch.Tensor  # bool: this rank has the id's column, and the id is allowed
    scale: torch.Tensor  # p = exp(x) * scale
    offset: torch.Tensor  # log p + H = x + offset

    def of_logits(self, x: torch.Tensor, is_exp: bool, chunk: slice) -> torch.Tensor:
        """float32 [chunk, columns], made in place of x (exp(x) with `is_exp`)."""
        given = self.log_probs[chunk]
        if self.entropy is None:
            gradient = (x if is_exp else x.exp_()).mul_((-given * self.scale[chunk])[:, None])
        else:
            assert not is_exp
            p = x.exp().mul_(self.scale[chunk, None])
            gradient = x.add_(self.offset[chunk, None]).mul_(-self.entropy[chunk, None]).sub_(given[:, None]).mul_(p)
        at_id = torch.where(self.held[chunk], given, 0.0)
        return gradient.scatter_add_(1, self.local_ids[chunk, None], at_id[:, None])


def _without_forced(gradient: torch.Tensor | None, exclusion: _Exclusion | None, like: torch.Tensor) -> torch.Tensor:
    """Zero at forced tokens: exact, however the logits are computed the second time."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient if exclusion is None else gradient.masked_fill(exclusion.forced, 0.0)


def _float32_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Where the gradient of the weight is summed: megatron-core's float32 `main_grad` if there is one, else zeros."""
    main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.dtype == torch.float32:
        return main_grad
    return torch.zeros_like(weight, dtype=torch.float32)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in float32; a product of another dtype is rounded to it once, in blocks of rows."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    rows = max(1, WEIGHT_BLOCK_BYTES // (right.shape[1] * right.element_size()))
    for start in range(0, len(total), rows):
        total[start : start + rows] += left[start : start + rows] @ right
