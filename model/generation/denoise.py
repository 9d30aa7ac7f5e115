"""The sampler of parallel image decoding: from noise to codes in a few steps, whatever predicts the codes.

Each step draws a clean image from the prediction, every token by itself, and moves the state towards it along the path.
The last step returns what it draws. Independent draws make inconsistent images where the prediction is broad; three
things mend that (the figures behind the defaults are in docs/dida_measured.md): more steps, a lower temperature at the end, and
the psi corrector (arXiv 2506.10892 and its code, s-sahoo/duo `_psi_update`): a share of the tokens is drawn anew from
p_t'(. | drawn) in the middle of the way, which keeps the marginals of any path and forgets earlier mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from model.generation.decoding_config import DenoiseConfig
from model.generation.paths import NUM_UNIFORMS, DiscretePath, inverse_cumulative, shifted

# logits [B, N, codes] of the clean codes, given states int64 [B, N] at a time
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
# float64 [n, B, N] in [0, 1) for a step
Numbers = Callable[[int, int], torch.Tensor]
UNIFORMS_OF_A_STEP = 2 + 2 * NUM_UNIFORMS  # draw, choice of the corrector, step, corrector


def step_times(config: DenoiseConfig) -> list[float]:
    """steps + 1 times from 0 to 1."""
    even = torch.linspace(0, 1, config.steps + 1, dtype=torch.float64)
    if config.schedule == "cosine":
        even = 1 - torch.cos(even * math.pi / 2)
    times: list[float] = shifted(even, config.shift).tolist()
    return [0.0, *times[1:-1], 1.0]


def step_temperature(config: DenoiseConfig, step: int) -> float:
    if step == config.steps - 1:
        return config.last_temperature
    return config.end_temperature if step >= config.steps * (1 - config.end_share) else config.temperature


def has_corrector(config: DenoiseConfig, step: int) -> bool:
    margin = (1 - config.corrector_share) / 2
    return config.corrector < 1 and margin * config.steps <= step < (1 - margin) * config.steps


def denoise(
    denoiser: Denoiser,
    path: DiscretePath,
    config: DenoiseConfig,
    numbers: Numbers,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int64 [B, N], and float32 [B, N] log-probabilities of the last draws.

    `numbers(step, n)` gives the uniform numbers of a step; step -1 is the start. The log-probabilities are those of one
    factorised draw given the state before it, not of the image.
    """
    state, times = path.start(numbers(-1, NUM_UNIFORMS)), step_times(config)
    log_probs = torch.zeros(state.shape, device=state.device)
    for step in range(config.steps):
        uniforms = numbers(step, UNIFORMS_OF_A_STEP)
        logits = denoiser(state, times[step])
        drawn, log_probs = draw_codes(logits, temperature * step_temperature(config, step), top_k, uniforms[0])
        if step + 1 == config.steps:
            return path.finish(state, drawn), log_probs
        moved = path.step(state, drawn, times[step], times[step + 1], uniforms[2 : 2 + NUM_UNIFORMS])
        if has_corrector(config, step):
            renoised = path.corrupt(drawn, times[step + 1], uniforms[2 + NUM_UNIFORMS :])
            moved = torch.where(uniforms[1] < config.corrector, moved, renoised)
        state = moved
    raise AssertionError("at least one step")


def draw_codes(
    logits: torch.Tensor, temperature: float, top_k: int, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A code for each token of [B, N, codes] and its log-probability at this temperature; 0: the most likely."""
    log_probs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        codes = log_probs.argmax(-1)
    else:
        kept = log_probs
        if 0 < top_k < logits.shape[-1]:
            smallest = log_probs.topk(top_k, dim=-1).values[..., -1:]
            kept = log_probs.masked_fill(log_probs < smallest, -torch.inf)
        codes = inverse_cumulative(kept.flatten(0, -2).exp(), uniforms.reshape(-1)).view(logits.shape[:-1])
    return codes, log_probs.gather(-1, codes[..., None]).squeeze(-1)
