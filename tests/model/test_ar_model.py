"""Decoding with the cache against reading the whole sequence again, on a real model of megatron-core."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.generation.ar import ARGenerator
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.settings import PhaseSampling, SamplingConfig
from model.parallel import groups
from model.vocabulary import Vocabulary, VocabularyConfig

DIGITS, STAR = list(range(3, 13)), 13
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    init_std=0.2,
    vocabulary=VocabularyConfig(text_size=20, visual_size=40, pad_multiple=64),
)
VOCABULARY = Vocabulary.from_config(CONFIG.vocabulary)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 1, 14, 15, 16]]
GREEDY = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), max_new_tokens=30)


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    from model.backbone.transformer import build_model

    started_here = not groups.is_initialized()
    if started_here:
        groups.initialize(rank=0, world_size=1)
    yield build_model(CONFIG, seed=3).eval()
    if started_here:
        groups.destroy()


def rules(**options) -> ImageGrammar:
    return ImageGrammar(VOCABULARY, DIGITS, STAR, GrammarOptions(max_side=3, **options))


def generator(model: torch.nn.Module, grammar: ImageGrammar, batch_size: int = 8) -> ARGenerator:
    from model.generation.decoder import CachedDecoder

    return ARGenerator(CachedDecoder(model), grammar, batch_size)


@torch.no_grad()
def full_logits(model: torch.nn.Module, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits [n, padded vocabulary] of whole sequences by the forward pass of training, all in one row."""
    from model.backbone.attention_plan import packed_documents
    from model.backbone.packed_attention import prepare_attention

    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = np.cumsum([0, *lengths])
    packed = prepare_attention(
        packed_documents(bounds), positions, head_dim=CONFIG.head_dim, rope_theta=CONFIG.rope_theta
    )
    tokens = torch.tensor([[token for sequence in sequences for token in sequence]])
    logits = model(tokens, positions[None], None, packed_seq_params=packed)
    return list(logits[0].float().split(lengths))


def expected_log_probs(
    model: torch.nn.Module,
    grammar: ImageGrammar,
    prompts: list[list[int]],
    answers: list[list[int]],
    unconditional: list[list[int]] | None = None,
    scale: float = 1.0,
) -> list[list[torch.Tensor]]:
    """For each answer and each of its tokens, the log-probabilities [padded vocabulary] given all before it.

    The unconditional stream holds its prompt and those tokens of the answer that belong to images.
    """
    whole = full_logits(model, [p + a for p, a in zip(prompts, answers, strict=True)])
    free_prompts = unconditional or prompts
    images = [in_image(a, VOCABULARY.boi in p) for p, a in zip(prompts, answers, strict=True)]
    free_sequences = [
        p + [t for t, inside in zip(a, flags, strict=True) if inside]
        for p, a, flags in zip(free_prompts, answers, images, strict=True)
    ]
    without = full_logits(model, free_sequences)
    result = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        state, num_free, scores = grammar.start([prompt]), len(free_prompts[row]), []
        for index, token in enumerate(answer):
            forbidden = ~grammar.mask(state)[0]
            score = whole[row][len(prompt) + index - 1].masked_fill(forbidden, -torch.inf)
            score = score.log_softmax(0)
            if unconditional and not forbidden[VOCABULARY.visual_start]:
                free = without[row][num_free - 1].masked_fill(forbidden, -torch.inf).log_softmax(0)
                score = (free + scale * (score - free)).nan_to_num(-torch.inf).log_softmax(0)
            scores.append(score)
            num_free += images[row][index]
            state = grammar.advance(state, torch.tensor([token]))
        result.append(scores)
    return result


def in_image(answer: list[int], open_image: bool) -> list[bool]:
    flags = []
    for token in answer:
        open_image = open_image or token == VOCABULARY.boi
        flags.append(open_image)
        open_image = open_image and token != VOCABULARY.eoi
    return flags


def greedy_of(scores: list[list[torch.Tensor]]) -> list[list[int]]:
    return [[int(score.argmax()) for score in row] for row in scores]


@pytest.mark.parametrize("begin_with_image", [False, True])
def test_cached_batch_equals_full_forward(model: torch.nn.Module, begin_with_image: bool) -> None:
    grammar = rules(begin_with_image=begin_with_image)
    found = generator(model, grammar, batch_size=3).generate(PROMPTS, GREEDY, seed=0)
    assert greedy_of(expected_log_probs(model, grammar, PROMPTS, found)) == found
    assert len({tuple(ids) for ids in found}) > 1
    assert all(len(ids) == 30 or grammar.vocabulary.eos in ids for ids in found)
    if begin_with_image:
        assert all(VOCABULARY.eoi in ids for ids in found)


def test_guided_batch_equals_full_forward(model: torch.nn.Module) -> None:
    grammar = rules()
    sampling = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), guidance_scale=2.5, max_new_tokens=60)
    # Prompts that end inside an image, and one where text comes first.
    image = [VOCABULARY.boi, DIGITS[2], STAR, DIGITS[3], VOCABULARY.img]
    prompts = [*([*prompt, *image] for prompt in PROMPTS[:2]), PROMPTS[2]]
    free = [[17, 18, *image], [19, *image], [17, 17, 17]]
    found = [
        generation.ids.tolist()
        for generation in generator(model, grammar).sample(prompts, sampling, 0, unconditional_prompts=free)
    ]
    expected = expected_log_probs(model, grammar, prompts, found, free, 2.5)
    assert greedy_of(expected) == found
    assert greedy_of(expected_log_probs(model, grammar, prompts, found)) != found


def test_log_probs_are_those_of_the_full_forward(model: torch.nn.Module) -> None:
    grammar = rules()
    sampling = SamplingConfig(max_new_tokens=30)
    found = generator(model, grammar).sample(PROMPTS, sampling, seed=2)
    scores = expected_log_probs(model, grammar, PROMPTS, [g.ids.tolist() for g in found])
    for generation, row in zip(found, scores, strict=True):
        expected = [float(score[token]) for score, token in zip(row, generation.ids, strict=True)]
        np.testing.assert_allclose(generation.log_probs, expected, atol=1e-4)
