"""Causal steps of parallel decoding: which codes stay, and what they do in a world whose conditionals are known."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation.causal_steps import redraw_implausible

TEXTURES = 4


@given(
    st.integers(0, 1 << 30),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 6),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_plausible_codes_stay_and_others_are_drawn(
    seed: int, images: int, codes: int, size: int, plausible: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((images, codes, size), generator=generator)
    probabilities = torch.softmax(torch.randn((images, codes, size), generator=generator).double(), -1)
    given_codes = torch.randint(size, (images, codes), generator=generator)
    uniforms = torch.rand((images, codes), generator=generator, dtype=torch.float64)
    found = redraw_implausible(logits, probabilities, given_codes, plausible, uniforms)
    for image in range(images):
        for place in range(codes):
            said = torch.softmax(logits[image, place], 0)
            code = int(given_codes[image, place])
            share = float(said[code] / said.max())
            if abs(share - plausible) < 1e-5:
                continue  # rounding decides
            if share < plausible:
                below = 0.0
                for code in range(size):
                    below += float(probabilities[image, place, code])
                    if uniforms[image, place] < below:
                        break
            assert int(found[image, place]) == code


def test_the_likeliest_code_always_stays() -> None:
    """Also where it would be drawn anew as another one."""
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    others = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    likeliest, uniforms = torch.tensor([[0, 1]]), torch.full((1, 2), 0.5, dtype=torch.float64)
    assert torch.equal(redraw_implausible(logits, others, likeliest, 1.0, uniforms), likeliest)
    assert torch.equal(redraw_implausible(logits, others, 1 - likeliest, 1.0, uniforms), 1 - likeliest)
    assert torch.equal(redraw_implausible(logits, 1 - others, 1 - likeliest, 1.0, uniforms), likeliest)


def conditionals(textures: torch.Tensor) -> torch.Tensor:
    """float64 [B, N, textures] of a row with one hidden texture: any at first, then nearly always the one before."""
    before = torch.nn.functional.one_hot(textures, TEXTURES).double() * (1 - 1e-6) + 1e-6 / TEXTURES
    return torch.cat((torch.full_like(before[:, :1], 1 / TEXTURES), before[:, :-1]), 1)


def test_rows_become_consistent_and_stay_diverse() -> None:
    """Every cell drawn by itself, then causal steps: each makes one more cell that of the first one, and keeps that."""
    generator = torch.Generator().manual_seed(0)
    textures = torch.randint(TEXTURES, (4000, 8), generator=generator)
    uniforms = torch.rand(textures.shape, generator=generator, dtype=torch.float64)
    first = textures[:, 0].clone()
    for step in range(1, 8):
        probabilities = conditionals(textures)
        textures = redraw_implausible(probabilities.log(), probabilities, textures, 0.1, uniforms)
        assert (textures[:, : step + 1] == first[:, None]).float().mean() > 0.999
    shares = torch.bincount(textures.flatten(), minlength=TEXTURES).double() / textures.numel()
    assert float(-(shares * shares.log()).sum()) / math.log(TEXTURES) > 0.999
