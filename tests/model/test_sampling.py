"""Sampling against distributions computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.errors import Problems
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.sampling import allowed_log_probs, choose, draw, guide, next_tokens, truncate, uniform_numbers
from model.generation.settings import PhaseSampling, SamplingConfig
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=20, visual_size=7, pad_multiple=16))
DIGITS, STAR = list(range(3, 13)), 13


def test_uniform_numbers_depend_on_their_coordinates_only() -> None:
    whole = uniform_numbers(7, np.array([0, 5, 9]), 64)
    assert np.array_equal(uniform_numbers(7, np.array([9, 0]), 32), whole[[2, 0], :32])
    assert not np.array_equal(uniform_numbers(8, np.array([0]), 64)[0], whole[0])
    assert np.array_equal(uniform_numbers(-1, np.array([3]), 4), uniform_numbers(2**64 - 1, np.array([3]), 4))


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = uniform_numbers(1, np.arange(400), 250)
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    expected = numbers.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared, 19 degrees: P(> 45) < 0.001
    for shifted in (numbers[1:] * numbers[:-1], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.005
    seeds = np.stack([uniform_numbers(seed, np.array([0]), 1)[0] for seed in range(2000)])
    assert abs(seeds.mean() - 0.5) < 0.03
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    number = 4000
    uniforms = torch.as_tensor(uniform_numbers(3, np.arange(number), 1)[:, 0])
    ids = draw(probabilities.log().repeat(number, 1), uniforms)
    share = torch.bincount(ids, minlength=4) / number
    assert share[1] == 0
    assert (share - probabilities).abs().max() < 0.03


def test_draw_at_the_ends_of_the_interval() -> None:
    log_probs = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert draw(log_probs, torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)).tolist() == [1, 2]


@settings(deadline=None, max_examples=80)
@example(seed=1950, top_k=0, top_p=1.0, allowed_share=1.0)  # adds up to 1 before the last one
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    allowed_share=st.floats(0.1, 1.0),
)
def test_truncation_keeps_what_a_plain_loop_keeps(seed: int, top_k: int, top_p: float, allowed_share: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(1, 10)) * 2)
    allowed = torch.tensor(rng.random((1, 10)) < allowed_share)
    allowed[0, 3] = True
    log_probs = allowed_log_probs(logits, allowed, 0.7)
    kept = torch.isfinite(truncate(log_probs, PhaseSampling(top_k=top_k, top_p=top_p)))[0]
    order = [int(i) for i in np.argsort(-log_probs[0].numpy(), kind="stable") if allowed[0, i]]
    order = order[:top_k] if top_k else order
    total, expected, mass = float(log_probs[0, order].exp().sum()), [], 0.0
    for index in order:
        if top_p < 1 and mass / total >= top_p:  # at 1 all stay, whatever their sum is rounded to
            break
        expected.append(index)
        mass += float(log_probs[0, index].exp())
    assert sorted(expected) == torch.nonzero(kept).flatten().tolist()


def test_log_probs_are_those_of_the_allowed_ids() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    allowed = torch.tensor([[True, False, True, False]])
    weights = torch.tensor([1.0, 3.0]).div(0.5).exp()
    ids, log_probs = choose(logits, allowed, PhaseSampling(temperature=0.5), torch.tensor([0.999], dtype=torch.float64))
    assert ids.tolist() == [2]
    torch.testing.assert_close(log_probs[0], (weights[1] / weights.sum()).log())
    ids, log_probs = choose(logits, allowed, PhaseSampling(temperature=0.0), torch.zeros(1, dtype=torch.float64))
    assert ids.tolist() == [2]
    torch.testing.assert_close(log_probs[0], torch.log_softmax(torch.tensor([1.0, 3.0]), 0)[1])


def test_guidance_formula() -> None:
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), c)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), u)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), u + 3 * (c - u))


def test_guidance_touches_visual_tokens_only() -> None:
    grammar = ImageGrammar(VOCABULARY, DIGITS, STAR)
    state = grammar.start([[1], [1, VOCABULARY.boi, DIGITS[2], STAR, DIGITS[2], VOCABULARY.img]])
    logits = torch.zeros(2, VOCABULARY.padded_size)
    logits[:, 4], logits[:, VOCABULARY.visual_start + 1] = 1.0, 1.0
    logits[:, VOCABULARY.size :] = 100.0  # padded ids must never win
    unconditional = torch.zeros_like(logits)
    unconditional[:, 5], unconditional[:, VOCABULARY.visual_start + 1] = -9.0, 3.0
    greedy = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), guidance_scale=4.0)
    uniforms = torch.zeros(2, dtype=torch.float64)
    plain = next_tokens(logits, state, grammar, greedy, uniforms)
    guided = next_tokens(logits, state, grammar, greedy, uniforms, unconditional)
    assert plain.ids.tolist() == [4, VOCABULARY.visual_start + 1]
    assert guided.ids[0] == plain.ids[0]
    assert guided.log_probs[0] == plain.log_probs[0]
    assert guided.ids[1] == VOCABULARY.visual_start  # the favourite of the unconditional stream is pushed down
    assert guided.log_probs[1] != plain.log_probs[1]


def test_forced_tokens_have_no_log_prob() -> None:
    grammar = ImageGrammar(VOCABULARY, DIGITS, STAR, GrammarOptions(begin_with_image=True))
    choice = next_tokens(
        torch.randn(2, VOCABULARY.padded_size),
        grammar.start([[1], [1]]),
        grammar,
        SamplingConfig(),
        torch.zeros(2, dtype=torch.float64),
    )
    assert choice.ids.tolist() == [VOCABULARY.boi] * 2
    assert choice.log_probs.tolist() == [0.0, 0.0]
    assert choice.sampled.tolist() == [False, False]


@pytest.mark.parametrize("bad", [PhaseSampling(-1.0), PhaseSampling(top_k=-1), PhaseSampling(top_p=0.0)])
def test_bad_settings_are_named(bad: PhaseSampling) -> None:
    problems = Problems()
    SamplingConfig(text=bad).validate(problems)
    assert len(problems.found) == 1
    assert problems.found[0].startswith("sampling.text.")
