"""Batched generation against one that reads the whole sequence again for each token, with hand-made logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.generation.ar import ARGenerator, ImageRun
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.settings import PhaseSampling, SamplingConfig
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=20, visual_size=7, pad_multiple=16))
DIGITS, STAR = list(range(3, 13)), 13
GREEDY = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), max_new_tokens=40)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [4, 4]]


def table_logits(sequence: Sequence[int]) -> np.ndarray:
    """Logits that are a function of the whole sequence; BOI and EOS are made likely."""
    logits = np.random.default_rng([len(sequence), *sequence]).normal(size=VOCABULARY.padded_size)
    logits[[VOCABULARY.boi, VOCABULARY.eos]] += 1.5
    return logits


class TableDecoder:
    """Holds the sequences themselves as its cache."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.pending: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        self.rows = [list(prompt) for prompt in prompts]
        return self._logits(self.rows)

    def step(
        self, ids: torch.Tensor, advances: torch.Tensor | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        read = [[*row, *new] for row, new in zip(self.rows, ids.view(len(ids), -1).tolist(), strict=True)]
        moves = [True] * len(read) if advances is None else advances.tolist()
        self.rows = [new if move else old for new, old, move in zip(read, self.rows, moves, strict=True)]
        logits = self._logits(self.rows)
        return logits if columns is None else logits[:, columns]

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(np.stack([table_logits(row) for row in rows]))


def grammar(**options) -> ImageGrammar:
    return ImageGrammar(VOCABULARY, DIGITS, STAR, GrammarOptions(max_side=3, **options))


def one_by_one(rules: ImageGrammar, prompt: list[int], limit: int, unconditional=None, scale: float = 1.0) -> list[int]:
    """Greedy generation in the plainest way. The unconditional stream reads image tokens only."""
    sequence, free = list(prompt), list(unconditional or [])
    state = rules.start([prompt])
    for _ in range(limit):
        mask = rules.mask(state)[0].numpy()
        scores = torch.tensor(table_logits(sequence)).masked_fill(~torch.tensor(mask), -torch.inf).log_softmax(0)
        if unconditional is not None and mask[VOCABULARY.visual_start]:
            without = torch.tensor(table_logits(free)).masked_fill(~torch.tensor(mask), -torch.inf).log_softmax(0)
            scores = (without + scale * (scores - without)).nan_to_num(-torch.inf)
        token = int(scores.argmax())
        inside = token == VOCABULARY.boi or int(state.phase) in range(1, 8)
        sequence.append(token)
        free += [token] if inside else []
        state = rules.advance(state, torch.tensor([token]))
        if bool(state.done):
            break
    return sequence[len(prompt) :]


def test_greedy_equals_one_by_one() -> None:
    for seed_prompt in range(12):
        prompts = [[seed_prompt, *prompt] for prompt in PROMPTS]
        found = ARGenerator(TableDecoder(), grammar(), max_batch_size=3).generate(prompts, GREEDY, seed=0)
        assert found == [one_by_one(grammar(), prompt, 40) for prompt in prompts]


def test_guided_greedy_equals_one_by_one() -> None:
    sampling = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), guidance_scale=3.0, max_new_tokens=40)
    changed = 0
    for seed_prompt in range(8):
        prompts = [[seed_prompt, *prompt] for prompt in PROMPTS]
        free = [[19]] * len(prompts)
        generator = ARGenerator(TableDecoder(), grammar(), max_batch_size=3)
        found = [g.ids.tolist() for g in generator.sample(prompts, sampling, 0, unconditional_prompts=free)]
        assert found == [one_by_one(grammar(), prompt, 40, [19], 3.0) for prompt in prompts]
        changed += found != [one_by_one(grammar(), prompt, 40) for prompt in prompts]
    assert changed > 0


@pytest.mark.parametrize("emu3_format", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_images_in_step_are_those_of_single_tokens(
    monkeypatch: pytest.MonkeyPatch, emu3_format: bool, scale: float
) -> None:
    """All rows in the same place of one grid go through it without asking the grammar; so may a prompt that ends in one."""
    sampling = SamplingConfig(PhaseSampling(0.8), PhaseSampling(0.9, top_k=5), guidance_scale=scale)
    rules = grammar(emu3_format=emu3_format, stop_after_images=2, repeat_grid=True)
    begun = [VOCABULARY.boi, DIGITS[2], STAR, DIGITS[3], VOCABULARY.img, VOCABULARY.visual_start]
    cases = [
        ([[1, 2], [4, 5]], [(3, 2)] * 2),
        ([[1, *begun], [2, 3, *begun]], [None] * 2),
        ([[1], [2]], [(1, 1), (2, 2)]),
    ]
    in_step, all_runs = 0, ImageRun.of

    def counted(*arguments: Any) -> ImageRun | None:
        nonlocal in_step
        run = all_runs(*arguments)
        in_step += run is not None
        return run

    for begins in (True, False):
        rules.options = replace(rules.options, begin_with_image=begins)
        for limit in (3, 12, 17, 40):
            sampling.max_new_tokens = limit
            for prompts, grids in cases:
                runs = []
                for find in (counted, lambda *_: None):
                    monkeypatch.setattr(ImageRun, "of", find)
                    free = [[19]] * len(prompts) if scale != 1.0 else None
                    runs.append(ARGenerator(TableDecoder(), rules).sample(prompts, sampling, 3, grids, free))
                for one, other in zip(*runs, strict=True):
                    assert one.finished == other.finished
                    for name in ("ids", "log_probs", "sampled", "mask_numbers"):
                        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert in_step > 10


def test_a_sample_does_not_depend_on_its_batch() -> None:
    sampling = SamplingConfig(PhaseSampling(0.8, top_k=9), PhaseSampling(1.0, top_p=0.9), max_new_tokens=40)
    whole = ARGenerator(TableDecoder(), grammar()).sample(PROMPTS, sampling, seed=5)
    small = ARGenerator(TableDecoder(), grammar(), max_batch_size=1).sample(PROMPTS, sampling, seed=5)
    order = [3, 1, 0]
    other = ARGenerator(TableDecoder(), grammar()).sample(
        [PROMPTS[i] for i in order], sampling, seed=5, prompt_indices=order
    )
    for index, expected in enumerate(whole):
        assert small[index].ids.tolist() == expected.ids.tolist()
        assert small[index].log_probs.tolist() == expected.log_probs.tolist()
    assert [g.ids.tolist() for g in other] == [whole[i].ids.tolist() for i in order]
    again = ARGenerator(TableDecoder(), grammar()).sample(PROMPTS, sampling, seed=6)
    assert [g.ids.tolist() for g in again] != [g.ids.tolist() for g in whole]


def test_log_probs_match_a_replay_of_the_sequence() -> None:
    sampling = SamplingConfig(PhaseSampling(0.7, top_k=5), PhaseSampling(1.0), max_new_tokens=40)
    rules = grammar()
    for prompt, found in zip(PROMPTS, ARGenerator(TableDecoder(), rules).sample(PROMPTS, sampling, 1), strict=True):
        state, sequence = rules.start([prompt]), list(prompt)
        for token, log_prob, sampled in zip(found.ids.tolist(), found.log_probs, found.sampled, strict=True):
            mask = rules.mask(state)[0]
            visual = bool(mask[VOCABULARY.visual_start])
            logits = torch.tensor(table_logits(sequence)) / (1.0 if visual else 0.7)
            expected = logits.masked_fill(~mask, -torch.inf).log_softmax(0)[token]
            assert abs(float(expected) - float(log_prob)) < 1e-5
            assert bool(sampled) == (int(mask.sum()) > 1)
            state = rules.advance(state, torch.tensor([token]))
            sequence.append(token)


def test_length_limit_and_early_stop() -> None:
    sampling = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), max_new_tokens=5)
    rules = grammar(begin_with_image=True, stop_after_images=1)
    short, enough = ARGenerator(TableDecoder(), rules).sample([[1], [2]], sampling, 0, [(3, 3), (1, 1)])
    assert len(short.ids) == 5
    assert not short.finished
    sampling.max_new_tokens = 100
    both = ARGenerator(TableDecoder(), rules).sample([[1], [2]], sampling, 0, [(3, 3), (1, 1)])
    assert [len(g.ids) for g in both] == [5 + 9 + 2 + 1, 7]
    assert all(g.finished for g in both)
    assert (
        both[0].ids[:5].tolist() == short.ids.tolist() == [VOCABULARY.boi, DIGITS[3], STAR, DIGITS[3], VOCABULARY.img]
    )
    assert enough.ids.tolist()[:5] == both[1].ids.tolist()[:5]
