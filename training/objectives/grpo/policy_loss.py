"""The terms of the loss, token by token: ratio, clipped surrogate, importance weight, KL. Pure functions of tensors [T].

Notation, for a sampled token: log_probs = log pi (differentiable), old = log pi before the update, sampler = log mu of
the sampler that drew it, reference = log pi_ref. None of the others has a gradient.
"""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # verl's clamp: exp(20) is far outside any clip, and finite


def token_ratios(log_probs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """pi / pi_old of each token."""
    return (log_probs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def segment_ratios(
    log_probs: torch.Tensor, old: torch.Tensor, learnt: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """The geometric mean of the ratios of a token's segment (GSPO, arXiv 2507.18071); the gradient stays the token's own.

    `segments` int64 [T] numbers the segments (an image, a run of text) of a micro-batch; tokens that are not `learnt`
    (bool [T]) count in no mean. One image of 4,096 tokens has one ratio: per token its tail would decide.
    """
    num_segments = int(segments.max()) + 1 if len(segments) else 0
    change = torch.where(learnt, (log_probs - old).detach(), 0.0)
    sums = change.new_zeros(num_segments).index_add_(0, segments, change)
    counts = change.new_zeros(num_segments).index_add_(0, segments, learnt.to(change.dtype))
    means = (sums / counts.clamp(min=1)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return means.exp()[segments] * (log_probs - log_probs.detach()).exp()


def clipped_surrogate(
    ratios: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [T], bool [T] where the clip took the gradient away). PPO's, with two limits (DAPO, arXiv 2503.14476)."""
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    is_clipped = clipped * advantages < ratios * advantages
    return -torch.minimum(ratios * advantages, clipped * advantages), is_clipped


def importance_weights(old: torch.Tensor, sampler: torch.Tensor, cap: float) -> torch.Tensor:
    """pi_old / mu of each token, at most `cap` (truncated importance sampling); 0: all ones.

    It repairs a part of what a sampler of other numbers does to the gradient (docs/rl.md), never all of it.
    """
    if cap == 0:
        return torch.ones_like(old)
    return (old - sampler).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def kl_to_reference(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(pi | pi_ref) of each token: the value of the estimator k3, the gradient of k2 (verl's "k3+").

    With d = reference - log_probs, k3 = exp(d) - d - 1 is an unbiased value of low variance, but the expectation of its
    gradient is not the gradient of the KL; that of k2 = d^2 / 2 is, on samples of pi.
    """
    difference = (reference - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    squared = difference.square() / 2
    value = difference.exp() - difference - 1
    return squared - squared.detach() + value.detach()
