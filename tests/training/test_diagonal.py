"""The objective `diagonal` and decoding by anti-diagonals: one order, one distribution, and nothing seen too early."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_rows import IDS, Forward, batches_of, copy_places, dida_config, make_diagonal

from data_pipeline.loading.batch import build_micro_batch
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from model.generation.decoding_config import DecodingConfig
from model.generation.diagonals import DiagonalOrder
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.image_decoder import ImageDecoder
from model.generation.settings import PhaseSampling, SamplingConfig
from model.generation.strategies import DecodingMetrics, make_strategy
from model.vocabulary import Vocabulary, VocabularyConfig
from training.contracts.inputs import ModelInput
from training.objectives.dida_rows import DidaBatch, find_images
from training.objectives.next_token import NextToken

DIGITS, STAR = list(range(3, 13)), 13
TINY = VocabularyConfig(text_size=30, reserved_size=16, visual_size=3, pad_multiple=64)


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_each_step_reads_what_predicts_its_diagonal(height: int, width: int) -> None:
    """Against the rule, place by place: a token before a code comes with that code's diagonal, none comes earlier than known."""
    order = DiagonalOrder.of(height, width)
    assert len(order.lengths) == height + width
    assert sorted(order.tokens) == list(range(height * (width + 1)))
    step_of = {token: step for step, tokens in enumerate(order.steps()) for token in tokens.tolist()}
    for row, column in itertools.product(range(height), range(width)):
        place = 1 + row * (width + 1) + column
        assert step_of[place - 1] == row + column, "predicts the code"
        assert step_of[place] == row + column + 1, "read as soon as it is known"


@pytest.fixture(scope="module")
def forward(single_process: None) -> Forward:
    return Forward(dida_config().model)


def most_copied() -> DidaBatch:
    batches = [batch for sample in range(0, 24, 4) for batch in batches_of(dida_config(), sample)]
    return max(batches, key=lambda batch: len(batch.numbers))


def test_copies_hold_their_image_in_the_order_of_reading() -> None:
    """At its positions, with what follows each code in its row as label; documents are as without copies."""
    objective, batch = make_diagonal(dida_config()), most_copied()
    plain, found = NextToken.inputs(objective, batch.rows), objective.inputs(batch)
    clean = np.flatnonzero(found.fields["noisy"] == 0)[: plain.tokens.size]
    for name in ("tokens", "labels", "weights", "position_ids"):
        assert np.array_equal(getattr(found, name)[clean], getattr(plain, name))
    images = batch.images
    grids = zip(images.starts, images.heights, images.widths, copy_places(found, batch), strict=True)
    num_codes = 0
    for start, height, width, here in grids:
        source = start + DiagonalOrder.of(int(height), int(width)).tokens
        for name in ("tokens", "labels", "position_ids"):
            assert np.array_equal(getattr(found, name)[here], getattr(plain, name)[source])
        assert np.array_equal(found.weights[here] > 0, IDS.is_visual(plain.labels[source]))
        num_codes += height * width
    assert objective.totals([batch])[-3] == num_codes > 20
    objective.look_at([np.zeros((2, 3), np.int64), np.zeros((5, 1), np.int64)], num_references=0)
    assert objective.metadata()["diagonal"] == {"heights": [2, 5], "widths": [1, 3]}


def test_no_code_is_seen_before_its_diagonal_is_known(forward: Forward) -> None:
    """Bit for bit; and it is seen from then on."""
    objective, batch = make_diagonal(dida_config()), most_copied()
    inputs = objective.inputs(batch)
    before = forward(inputs)
    clean = torch.from_numpy(inputs.fields["noisy"] == 0)
    images = batch.images
    of_grid = dict(zip(zip(images.heights, images.widths, strict=True), copy_places(inputs, batch), strict=True))
    assert len(of_grid) > 2, "ragged"
    for (height, width), here in of_grid.items():
        bounds = np.cumsum(DiagonalOrder.of(int(height), int(width)).lengths)
        for step, known in enumerate(bounds[:-1].tolist()):
            changed = here[known:][IDS.is_visual(inputs.tokens[here[known:]])]
            other = inputs.tokens.copy()
            other[changed] = IDS.visual_start + (other[changed] - IDS.visual_start + 5) % 18
            after = forward(replace(inputs, tokens=other))
            assert torch.equal(before[here[:known]], after[here[:known]]), f"step {step}"
            assert not torch.isclose(before[here[known:]], after[here[known:]]).all(1).any()
            assert torch.equal(before[clean], after[clean]), "copies are seen by nothing clean"


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_logits_of_copies_are_those_of_decoding(forward: Forward, which: str) -> None:
    """Step by step behind a cached prefix, rows of different lengths together."""
    objective, batch = make_diagonal(dida_config()), most_copied()
    inputs, model = objective.inputs(batch), getattr(forward, which)
    trained, flat, images = forward(inputs, model), batch.rows.tokens.ravel(), batch.images
    grids = list(zip(images.heights.tolist(), images.widths.tolist(), strict=True))
    places = copy_places(inputs, batch)
    decoder, all_ids = ImageDecoder(model), slice(0, IDS.size)
    for grid in sorted(set(grids)):
        members = [number for number, one in enumerate(grids) if one == grid]
        bounds = batch.rows.cu_seqlens
        firsts = bounds[np.searchsorted(bounds, images.starts[members], "right") - 1]
        prompts = [flat[a:b].tolist() for a, b in zip(firsts, images.starts[members], strict=True)]
        decoder.start(prompts, grid[0] * (grid[1] + 1))
        starts, at = decoder.cache.lengths.clone(), 0
        for step in DiagonalOrder.of(*grid).steps()[:-1]:
            here = np.stack([places[number][at : at + len(step)] for number in members])
            at += len(step)
            positions = starts[:, None] + torch.from_numpy(step)
            found = decoder.extend(torch.from_numpy(inputs.tokens[here]), positions, all_ids)
            assert torch.allclose(found, trained[here][..., : IDS.size], atol=1e-5)
        decoder.forget(starts)
        again = decoder.look(torch.tensor([[IDS.img]] * len(members)), whole=False)[:, 0]
        decoder.start(prompts, 1)
        assert torch.allclose(decoder.step(torch.tensor([IDS.img] * len(members))), again, atol=1e-5), (
            "no trace is left"
        )


def inputs_of(documents: list[list[int]], num_prompt: int, vocabulary: Vocabulary) -> ModelInput:
    """Documents of one length, a row each, with a copy of each of their images, as training has them."""
    config, length = dida_config(), len(documents[0])
    config.model.vocabulary = TINY if vocabulary.visual_size == TINY.visual_size else config.model.vocabulary
    config.stage.sequence_length = length
    segments = np.zeros((len(documents), 2), SEGMENT_DTYPE)
    segments["kind"], segments["flags"] = [Kind.TEXT, Kind.IMAGE], [Flag.DOCUMENT_START | Flag.NO_LOSS, 0]
    segments["start"], segments["length"] = [0, num_prompt], [num_prompt, length - num_prompt]
    segments["row"] = np.arange(len(documents))[:, None]
    tokens = np.array(documents, np.int64)
    rows = build_micro_batch(tokens, segments.reshape(-1), np.ones(3, np.float32), "document", vocabulary)
    images = find_images(rows, vocabulary)
    batch = DidaBatch(rows, images, np.arange(len(images.starts)), len(images.starts))
    return make_diagonal(config, copy_tokens=int(images.lengths.sum()) // len(documents)).inputs(batch)


def code_log_probs(
    forward: Forward, inputs: ModelInput, vocabulary: Vocabulary, temperature: float
) -> tuple[torch.Tensor, np.ndarray]:
    """float64 [codes] of the copies in the order of reading, each among all codes; and where in its document each stands."""
    at = np.flatnonzero((inputs.fields["noisy"] > 0) & (inputs.weights > 0))
    logits = forward(inputs)[at][:, vocabulary.visual_start : vocabulary.size].double() / temperature
    labels = torch.from_numpy(inputs.labels)[at] - vocabulary.visual_start
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1), inputs.position_ids[at] + 1


def test_log_probabilities_are_the_product_of_the_factors(forward: Forward) -> None:
    """Two images an answer, three grids, prompts of several lengths in one batch: the loss of copies is what was drawn."""
    options = GrammarOptions(begin_with_image=True, max_images=2, stop_after_images=2, max_side=4)
    grammar, metrics = ImageGrammar(IDS, DIGITS, STAR, options), DecodingMetrics()
    chosen = make_strategy(
        DecodingConfig("diagonal"), ImageDecoder(forward.model), grammar, None, metrics, learnt_diagonals=True
    )
    prompts = [[1, 2, 14], [15, 16, 17, 18, 19, 20, 21], [14], [22, 23]]
    grids = [(2, 3), (3, 1), (3, 4), (2, 3)]
    sampling = SamplingConfig(image=PhaseSampling(0.7), max_new_tokens=60)
    num_images = 0
    for prompt, one in zip(prompts, chosen.sample(prompts, sampling, 3, grids), strict=True):
        inputs = inputs_of([[*prompt, *one.ids.tolist()]], len(prompt), IDS)
        expected, places = code_log_probs(forward, inputs, IDS, 0.7)
        codes = IDS.is_visual(one.ids)
        assert sorted(places - len(prompt)) == np.flatnonzero(codes).tolist()
        assert float(one.log_probs[codes].sum(dtype=np.float64)) == pytest.approx(float(expected.sum()), abs=1e-5)
        assert np.allclose(one.log_probs[places - len(prompt)], expected.float().numpy(), atol=1e-5)
        num_images += int((one.ids == IDS.boi).sum())
    assert num_images > len(prompts), "an answer has several images"


def test_all_images_together_have_probability_one(single_process: None) -> None:
    """81 images of 2 x 2 codes: a factor that knew its own code or a later one would break the sum."""
    vocabulary = Vocabulary.from_config(TINY)
    config = replace(dida_config().model, vocabulary=TINY, init_std=0.5)
    forward = Forward(config)
    documents = []
    for codes in itertools.product(range(3), repeat=4):
        a, b, c, d = (vocabulary.visual_start + code for code in codes)
        header = [vocabulary.boi, DIGITS[2], STAR, DIGITS[2], vocabulary.img]
        documents.append([14, 15, *header, a, b, vocabulary.eol, c, d, vocabulary.eoi])
    scores, _ = code_log_probs(forward, inputs_of(documents, 2, vocabulary), vocabulary, 1.0)
    chances = scores.view(81, 4).sum(1).exp()
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(chances.max()) > 3 * float(chances.min()), "they differ"
