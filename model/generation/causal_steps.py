"""Steps of parallel decoding that read the drawn image as the model reads any image, token by token, in one forward pass.

Draws of one step are independent, so an image may hold codes that do not go together. One causal pass over it says of
every code how likely the model finds it behind the codes before. Codes that are plausible stay; the others are drawn
anew from what the model says of them, all at once. An image that the model finds plausible throughout is not changed by
further steps. What a code is drawn by is the same number in each step. So with `plausible=1` in greedy decoding k steps
settle the first k codes at least, as Jacobi decoding does (arXiv 2305.10427): they are those of token-by-token decoding.

A lower `plausible` keeps what token-by-token decoding could have drawn as well. Codebooks have many codes for one look:
without it most steps would be spent on exchanging codes for others of their look (figures: docs/dida_measured.md).
"""

from __future__ import annotations

import torch

from model.generation.paths import inverse_cumulative


def redraw_implausible(
    logits: torch.Tensor, probabilities: torch.Tensor, codes: torch.Tensor, plausible: float, uniforms: torch.Tensor
) -> torch.Tensor:
    """int64 [B, N]: each of `codes` (int64 [B, N]) that is `plausible` times as likely as the likeliest, the others anew.

    `logits` float [B, N, codes] are what the model says of each code behind those before it; `probabilities` float64
    [B, N, codes] what token-by-token decoding would draw from, with its temperature and truncation; `uniforms` float64
    [B, N] in [0, 1). How likely a code is is asked of `logits`: a temperature of 0 would leave one plausible code.
    """
    log_probs = logits.float().log_softmax(-1)
    below_likeliest = log_probs.gather(-1, codes[..., None]).squeeze(-1) - log_probs.amax(-1)
    drawn = inverse_cumulative(probabilities.flatten(0, 1), uniforms.reshape(-1)).view(codes.shape)
    return torch.where(below_likeliest.exp() >= plausible, codes, drawn)
