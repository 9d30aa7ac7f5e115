"""Guessing codes and keeping those that token-by-token decoding could have drawn: the result has exactly its distribution.

A round guesses the next `w` codes of each image, every code by itself from a known distribution q; one causal pass over
the guesses gives what the model says of each, p. Guess i is kept with probability min(1, p_i / q_i); at the first one
that is not, a code of (p - q)_+ takes its place and what comes behind is forgotten (Leviathan et al., arXiv 2211.17192).
The proof needs that guesses are independent given everything that q was made of, so nothing of a forgotten guess is
ever reused as a guess: later rounds draw anew.

Arrays of a round are [B, w]: column j of row b stands for code `accepted[b] + j`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from model.generation.paths import inverse_cumulative


class Draws(Protocol):
    """Where randomness comes from: numbers of each image, or, in a proof by enumeration, every possibility."""

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        """int64 [B, n] from float64 [B, n, K]; rows of K need not sum to one."""
        ...

    def accepted(self, probabilities: torch.Tensor) -> torch.Tensor:
        """bool [B, n], true with these probabilities."""
        ...


class UniformDraws:
    """Draws by numbers that a function gives: `numbers(count)` is float64 [B, count] in [0, 1), new at every call."""

    def __init__(self, numbers: NumberSource) -> None:
        self.numbers = numbers

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        uniforms = self.numbers(probabilities.shape[1]).reshape(-1)
        return inverse_cumulative(probabilities.flatten(0, 1), uniforms).view(probabilities.shape[:2])

    def accepted(self, probabilities: torch.Tensor) -> torch.Tensor:
        return self.numbers(probabilities.shape[1]) < probabilities


class NumberSource(Protocol):
    def __call__(self, count: int) -> torch.Tensor: ...


class Target(Protocol):
    def __call__(self, guesses: torch.Tensor) -> torch.Tensor:
        """float64 [B, w, K]: what the model says of each code of the window, given the guesses before it."""
        ...


def speculative_round(
    guess: torch.Tensor, target: Target, left: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One round of `guess` q float64 [B, w, K], for images with `left` int64 [B] codes to go.

    Returns codes [B, w], how many of them are decided [B], the guesses [B, w] and p. Columns from `left` on are decided
    by nobody and mean nothing.
    """
    guesses = draws.categorical(guess)
    said = target(guesses)
    p, q = (values.gather(-1, guesses[..., None]).squeeze(-1) for values in (said, guess))
    kept = draws.accepted((p / q.clamp(min=torch.finfo(q.dtype).tiny)).clamp(max=1.0))
    columns = torch.arange(guess.shape[1], device=guess.device)
    in_image = columns < left[:, None]
    first_bad = torch.where(in_image & ~kept, columns, guess.shape[1]).amin(1)
    is_bad = first_bad < guess.shape[1]
    at = first_bad.clamp(max=guess.shape[1] - 1)[:, None, None].expand(-1, 1, guess.shape[2])
    rest = (said.gather(1, at) - guess.gather(1, at)).clamp_(min=0.0)
    # Where nothing is refused the row is not read; where p = q nothing can be refused.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, said.gather(1, at))
    replacement = draws.categorical(rest)
    codes = torch.where(columns == first_bad[:, None], replacement, guesses)
    num_decided = torch.where(is_bad, first_bad + 1, torch.minimum(left, left.new_tensor(guess.shape[1])))
    return codes, num_decided, guesses, said


def next_jacobi_guess(said: torch.Tensor, num_decided: torch.Tensor) -> torch.Tensor:
    """q of the next round of speculative Jacobi decoding: what was said of the undecided codes; behind them any code.

    What was said was said of forgotten guesses. That costs acceptance and no exactness.
    """
    width, num_codes = said.shape[1:]
    columns = torch.arange(width, device=said.device) + num_decided[:, None]
    known = columns < width
    shifted = said.gather(1, columns.clamp(max=width - 1)[..., None].expand(-1, -1, num_codes))
    return torch.where(known[..., None], shifted, 1.0 / num_codes)
