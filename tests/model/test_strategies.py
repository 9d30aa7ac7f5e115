"""Strategies of decoding on a real model: what they share with token-by-token decoding, and what they count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_ar_model import CONFIG, DIGITS, STAR, VOCABULARY, full_logits

from model.config import AdapterConfig
from model.errors import UserError
from model.generation.ar import ARGenerator
from model.generation.decoding_config import DecodingConfig, DenoiseConfig
from model.generation.grammar import GrammarOptions, ImageGrammar, Phase
from model.generation.image_decoder import ImageDecoder
from model.generation.image_phases import GuidedImages
from model.generation.paths import FromReferencePath, MaskPath, MetricPath, UniformPath
from model.generation.settings import PhaseSampling, SamplingConfig
from model.generation.strategies import DecodingMetrics, Strategy, make_strategy
from model.parallel import groups

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
GRIDS = [(2, 3), (3, 2), (2, 3)]
SAMPLING = SamplingConfig(max_new_tokens=60)
GREEDY = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), max_new_tokens=60)
PATH = UniformPath(VOCABULARY.visual_size)


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    from model.backbone.transformer import build_model

    started_here = not groups.is_initialized()
    if started_here:
        groups.initialize(rank=0, world_size=1)
    yield build_model(CONFIG, seed=3).eval()
    if started_here:
        groups.destroy()


def rules(**options: object) -> ImageGrammar:
    defaults: dict[str, object] = {"begin_with_image": True, "max_images": 2, "stop_after_images": 2, "max_side": 3}
    return ImageGrammar(VOCABULARY, DIGITS, STAR, GrammarOptions(**(defaults | options)))  # type: ignore[arg-type]


def strategy(model: torch.nn.Module, name: str, grammar: ImageGrammar | None = None, **options: object) -> Strategy:
    """`causal`: `dida` with two causal steps of three."""
    config = DecodingConfig(name, DenoiseConfig(steps=3), window=4)
    if name == "causal":
        config = DecodingConfig("dida", DenoiseConfig(steps=3, causal_steps=2))
    for key, value in options.items():
        setattr(config.dida, key, value)
    decoder = ImageDecoder(model)
    return make_strategy(config, decoder, grammar or rules(), PATH, DecodingMetrics(), 8, learnt_diagonals=True)


def sequences(found: list) -> list[list[int]]:  # type: ignore[type-arg]
    return [one.ids.tolist() for one in found]


@pytest.mark.parametrize("name", ["sjd", "verified"])
def test_exact_strategies_draw_what_greedy_decoding_draws(model: torch.nn.Module, name: str) -> None:
    expected = ARGenerator(ImageDecoder(model), rules()).sample(PROMPTS, GREEDY, 0, GRIDS)
    chosen = strategy(model, name)
    found = chosen.sample(PROMPTS, GREEDY, 0, GRIDS)
    assert sequences(found) == sequences(expected)
    assert any(ids.count(VOCABULARY.boi) == 2 for ids in sequences(found)), "several images in one answer"
    assert chosen.metrics.num_tokens == sum(map(len, sequences(expected)))


@pytest.mark.parametrize("name", ["dida", "causal", "diagonal", "sjd", "verified"])
def test_an_answer_does_not_depend_on_its_batch(model: torch.nn.Module, name: str) -> None:
    together = strategy(model, name).sample(PROMPTS, SAMPLING, 5, GRIDS)
    alone = [
        strategy(model, name).sample([prompt], SAMPLING, 5, [grid], None, [index])[0]
        for index, (prompt, grid) in enumerate(zip(PROMPTS, GRIDS, strict=True))
    ]
    assert sequences(together) == sequences(alone)
    assert sequences(together) != sequences(strategy(model, name).sample(PROMPTS, SAMPLING, 6, GRIDS))


@pytest.mark.parametrize("name", ["dida", "causal", "diagonal"])
def test_the_cache_behind_an_image_is_that_of_a_prefill(model: torch.nn.Module, name: str) -> None:
    """And so is what follows: text, and a second image, greedy."""
    chosen = strategy(model, name, rules(stop_after_images=None))
    found = chosen.sample(PROMPTS, GREEDY, 0, GRIDS)
    cache = chosen.decoder.cache
    by_length = sorted(zip(PROMPTS, found, strict=True), key=lambda pair: len(pair[0]))  # as they share a batch
    for row, (prompt, one) in enumerate(by_length):
        length = int(cache.lengths[row])
        assert length >= len(prompt) + len(one.ids) - 1
        prefill = ImageDecoder(model)
        prefill.start([(prompt + one.ids.tolist())[:length]], 1)
        for ours, theirs in ((cache.keys, prefill.cache.keys), (cache.values, prefill.cache.values)):
            assert torch.allclose(ours[:, row, :, :length], theirs[:, 0, :, :length], atol=1e-5)
    wholes = full_logits(model, [p + one.ids.tolist() for p, one in zip(PROMPTS, found, strict=True)])
    for prompt, one, logits in zip(PROMPTS, found, wholes, strict=True):
        texts = np.flatnonzero((one.ids < VOCABULARY.text_size) & one.sampled)
        for place in texts[texts > np.flatnonzero(one.ids == VOCABULARY.eoi)[0]]:
            allowed = logits[len(prompt) + place - 1][: VOCABULARY.text_size]
            assert int(allowed.argmax()) == one.ids[place]


def test_an_image_of_one_row_is_decoded_as_token_by_token(model: torch.nn.Module) -> None:
    """A diagonal has one code then, and any model knows its order."""
    one_image, grids = rules(max_images=1, stop_after_images=1), [(1, 3), (1, 1), (1, 3)]
    expected = ARGenerator(ImageDecoder(model), one_image).sample(PROMPTS, GREEDY, 0, grids)
    found = strategy(model, "diagonal", one_image).sample(PROMPTS, GREEDY, 0, grids)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert np.allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


@pytest.mark.parametrize("emu3_format", [False, True])
def test_blocks_are_what_the_grammar_forces(model: torch.nn.Module, emu3_format: bool) -> None:
    grammar = rules(max_images=1, stop_after_images=1, emu3_format=emu3_format)
    generator = strategy(model, "dida", grammar).generator
    block = generator._block((2, 3), 1)  # type: ignore[attr-defined]
    state = grammar.start([[0]])
    state.phase.fill_(Phase.CODES)
    state.height.fill_(2)
    state.width.fill_(3)
    for place, token in enumerate(block.tokens[0, 1:].tolist(), 1):
        forced = int(grammar.forced(state)[0])
        assert (forced < 0) == (place in block.places.tolist())
        assert forced < 0 or forced == token
        state = grammar.advance(state, torch.tensor([token]))
    assert bool(state.done.all())
    assert block.tokens[0, 0] == VOCABULARY.img


def image_ids(height: int, width: int, codes: list[int]) -> list[int]:
    """BOI to EOI."""
    rows = [[VOCABULARY.visual_start + code for code in codes[row * width :][:width]] for row in range(height)]
    body = [token for row in rows for token in [*row, VOCABULARY.eol]][:-1]
    header = [VOCABULARY.boi, DIGITS[height], STAR, DIGITS[width], VOCABULARY.img]
    return [*header, *body, VOCABULARY.eoi]


def codes_of(ids: list[int]) -> list[list[int]]:
    """The codes of each whole image."""
    ends = [place for place, one in enumerate(ids) if one == VOCABULARY.eoi]
    starts = [place for place, one in enumerate(ids) if one == VOCABULARY.img]
    first = VOCABULARY.visual_start
    return [[one - first for one in ids[a:b] if one >= first] for a, b in zip(starts, ends, strict=False)]


@pytest.mark.parametrize("name", ["dida", "verified"])
def test_images_begin_as_the_last_one_of_their_grid(model: torch.nn.Module, name: str) -> None:
    older, last = [7, 8, 9, 1, 2, 3], [11, 12, 13, 14, 15, 16]
    without = [1, *image_ids(3, 2, last), 2]  # of another grid: the first image has no reference
    prompts = [[1, *image_ids(2, 3, older), *image_ids(2, 3, last), *image_ids(3, 2, older), 2], *[without] * 6]
    decoder, config = ImageDecoder(model), DecodingConfig(name, DenoiseConfig(steps=3))
    shown: list[list[list[int]]] = [[] for _ in prompts]

    def watch(rows: list[int], tokens: torch.Tensor) -> None:
        for row, block in zip(rows, tokens.tolist(), strict=True):
            shown[row].append([one - VOCABULARY.visual_start for one in block if one >= VOCABULARY.visual_start])

    decoder.watch = watch
    found = make_strategy(config, decoder, rules(), FromReferencePath(PATH), DecodingMetrics(), 8).sample(
        prompts, SAMPLING, 0, [(2, 3)] * len(prompts)
    )
    *looks_without, looks = shown  # rows are ordered by their prompts' lengths
    assert looks[0] == last
    assert all(one[0] not in (last, older) for one in looks_without), "noise"
    with_two = 0
    for answer, seen in zip(found[1:], looks_without, strict=True):
        images = codes_of(answer.ids.tolist())
        with_two += len(images) == 2
        assert len(images) == 1 or images[0] in seen, "the second image begins as the first one ended"
    assert with_two


def first_codes(found: list, count: int) -> list[list[int]]:
    return [codes_of(ids)[0][:count] for ids in sequences(found)]


@pytest.mark.parametrize("causal_steps", [1, 4])
def test_causal_steps_settle_as_many_codes_as_token_by_token_decoding_draws(
    model: torch.nn.Module, causal_steps: int
) -> None:
    """Greedy, where only the likeliest code is plausible."""
    one_image, grids = rules(max_images=1, stop_after_images=1), [(3, 3)] * len(PROMPTS)
    expected = ARGenerator(ImageDecoder(model), one_image).sample(PROMPTS, GREEDY, 0, grids)
    causal = strategy(model, "dida", one_image, steps=causal_steps + 1, causal_steps=causal_steps, plausible=1.0)
    found = causal.sample(PROMPTS, GREEDY, 0, grids)
    assert first_codes(found, causal_steps) == first_codes(expected, causal_steps)
    noisy = strategy(model, "dida", one_image, steps=1).sample(PROMPTS, GREEDY, 0, grids)
    assert first_codes(noisy, causal_steps) != first_codes(expected, causal_steps)


def test_causal_steps_read_with_the_weights_that_decode_token_by_token(model: torch.nn.Module) -> None:
    """Adapters that act on noisy copies alone have no part in them."""
    from model.backbone.transformer import build_model

    adapted = build_model(replace(CONFIG, adapter=AdapterConfig(rank=4, alpha=4.0, tokens="copies")), seed=3).eval()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.normal_(std=0.3)
    assert len(trained) < len(list(adapted.parameters()))
    one_image, grids = rules(max_images=1, stop_after_images=1), [(3, 3)] * len(PROMPTS)
    expected = ARGenerator(ImageDecoder(model), one_image).sample(PROMPTS, GREEDY, 0, grids)
    causal = strategy(adapted, "dida", one_image, steps=5, causal_steps=4, plausible=1.0)
    found = causal.sample(PROMPTS, GREEDY, 0, grids)
    assert first_codes(found, 4) == first_codes(expected, 4)


def test_where_all_codes_are_plausible_causal_steps_change_none(model: torch.nn.Module) -> None:
    without = sequences(strategy(model, "dida", steps=2).sample(PROMPTS, SAMPLING, 0, GRIDS))
    all_stay = strategy(model, "dida", steps=4, causal_steps=2, plausible=0.0)
    assert sequences(all_stay.sample(PROMPTS, SAMPLING, 0, GRIDS)) == without
    some_stay = strategy(model, "dida", steps=4, causal_steps=2, plausible=0.5)
    assert sequences(some_stay.sample(PROMPTS, SAMPLING, 0, GRIDS)) != without


def test_causal_steps_have_numbers_of_their_own_which_are_the_same_in_each(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = [], GuidedImages.uniforms

    def uniforms(images: GuidedImages, stream: int, count: int) -> torch.Tensor:
        asked.append(stream)
        return answered(images, stream, count)

    monkeypatch.setattr(GuidedImages, "uniforms", uniforms)
    one_image = rules(max_images=1, stop_after_images=1)
    strategy(model, "dida", one_image, steps=5, causal_steps=3).sample([[1, 2]], SAMPLING, 0, [(2, 3)])
    noisy, causal = asked[:3], asked[3:]  # the start and two steps
    assert len(causal) == 3
    assert len(set(causal)) == 1
    assert not set(causal) & set(noisy)


def test_verified_decoding_reads_causally_by_itself(model: torch.nn.Module) -> None:
    chosen, plain = strategy(model, "verified", steps=3, causal_steps=1), strategy(model, "verified", steps=2)
    assert sequences(chosen.sample(PROMPTS, SAMPLING, 0, GRIDS)) == sequences(plain.sample(PROMPTS, SAMPLING, 0, GRIDS))
    assert chosen.metrics.num_forwards == plain.metrics.num_forwards


def test_forward_passes_are_counted(model: torch.nn.Module) -> None:
    one_image = rules(max_images=1, stop_after_images=1)
    chosen = strategy(model, "dida", one_image, steps=4)
    (answer,) = chosen.sample([PROMPTS[0]], SAMPLING, 0, [(3, 3)])
    header = 5  # BOI 3 * 3 IMG: forced, so read with the prompt; IMG with the codes
    assert chosen.metrics.num_forwards == 1 + 4, "nobody reads what ends the answer"
    assert len(answer.ids) == header + 9 + 2 + 1
    assert answer.finished
    assert answer.sampled.sum() == 9
    causal = strategy(model, "dida", one_image, steps=4, causal_steps=3)
    causal.sample([PROMPTS[0]], SAMPLING, 0, [(3, 3)])
    assert causal.metrics.num_forwards == 1 + 4, "causal steps are steps"
    diagonal = strategy(model, "diagonal", one_image)
    diagonal.sample([PROMPTS[0]], SAMPLING, 0, [(3, 3)])
    assert diagonal.metrics.num_forwards == 1 + (3 + 3 - 1)
    goes_on = strategy(model, "dida", rules(max_images=1), steps=4)
    (longer,) = goes_on.sample([PROMPTS[0]], SAMPLING, 0, [(3, 3)])
    assert goes_on.metrics.num_forwards == 1 + 4 + 1 + len(longer.ids) - len(answer.ids), "the commit pass, then text"
    plain = strategy(model, "ar", one_image)
    plain.sample([PROMPTS[0]], SAMPLING, 0, [(3, 3)])
    # The prompt, the header, and each code with what is forced behind it; nobody reads what ends the answer.
    assert plain.metrics.num_forwards == 1 + 1 + 8
    assert plain.metrics.tokens_a_forward == len(answer.ids) / 10


@pytest.mark.parametrize("name", ["dida", "causal", "diagonal", "sjd", "verified"])
def test_guidance_acts(model: torch.nn.Module, name: str) -> None:
    """At scale 1 the unconditional prompt is not read; where both prompts are one, any scale gives the same."""
    one_image = rules(max_images=1, stop_after_images=1)
    unconditional = [[13]] * len(PROMPTS)
    guided = replace(SAMPLING, guidance_scale=4.0)
    plain = sequences(strategy(model, name, one_image).sample(PROMPTS, SAMPLING, 0, GRIDS))
    assert sequences(strategy(model, name, one_image).sample(PROMPTS, guided, 0, GRIDS, PROMPTS)) == plain
    assert sequences(strategy(model, name, one_image).sample(PROMPTS, guided, 0, GRIDS, unconditional)) != plain
    if name == "dida":
        off = strategy(model, name, one_image, guidance_until=0.0)
        assert sequences(off.sample(PROMPTS, guided, 0, GRIDS, unconditional)) == plain


def test_an_image_that_does_not_fit_ends_the_answer(model: torch.nn.Module) -> None:
    (answer,) = strategy(model, "dida").sample([[1, 2]], SamplingConfig(max_new_tokens=10), 0, [(3, 3)])
    assert not answer.finished
    assert answer.ids.tolist()[-1] == VOCABULARY.img


def test_what_cannot_be_decoded_in_parallel_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match="not trained for decoding"):
        make_strategy(DecodingConfig("dida"), ImageDecoder(model), rules(), None, DecodingMetrics())
    with pytest.raises(UserError, match="stage with the objective diagonal"):
        make_strategy(DecodingConfig("diagonal"), ImageDecoder(model), rules(), PATH, DecodingMetrics())
    with pytest.raises(UserError, match="more decoding steps than an image has tokens"):
        strategy(model, "dida", steps=7).sample([[1]], SAMPLING, 0, [(2, 3)])
    inside = [1, VOCABULARY.boi, DIGITS[2], STAR, DIGITS[2], VOCABULARY.img, VOCABULARY.visual_start]
    with pytest.raises(UserError, match="ends inside an image"):
        strategy(model, "dida").sample([inside], SAMPLING, 0)


@pytest.mark.parametrize("path", [MaskPath(40), MetricPath(torch.randn(40, 4), 3.0, 0.9)], ids=lambda path: path.name)
def test_every_path_decodes(model: torch.nn.Module, path: object) -> None:
    config = DecodingConfig("dida", DenoiseConfig(steps=3))
    chosen = make_strategy(config, ImageDecoder(model), rules(), path, DecodingMetrics(), 8)  # type: ignore[arg-type]
    assert all(one.finished or len(one.ids) >= 12 for one in chosen.sample(PROMPTS, SAMPLING, 0, GRIDS))
