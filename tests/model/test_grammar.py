"""The grammar against an independent parser: whatever it generates parses, whatever is legal it accepts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation.grammar import GrammarOptions, GrammarState, ImageGrammar, Phase
from model.vocabulary import Vocabulary, VocabularyConfig

DIGITS = list(range(3, 13))
STAR = 13
VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=20, visual_size=7, pad_multiple=16))
LETTERS = {
    "boi": "B",
    "eoi": "E",
    "img": "I",
    "eol": "L",
    "eof": "F",
    "ess": "S",
    "eos": "X",
    "pad": "P",
    "boc": "t",
    "eoc": "t",
    "bog": "t",
    "eog": "t",
}


def make(**options) -> ImageGrammar:
    return ImageGrammar(VOCABULARY, DIGITS, STAR, GrammarOptions(**options))


def letter(token: int) -> str:
    """One character a token: digits and `*` as themselves, V a visual code, ? what may never appear."""
    if token in DIGITS:
        return str(DIGITS.index(token))
    if token == STAR:
        return "*"
    if token < VOCABULARY.text_size:
        return "t"
    if VOCABULARY.visual_start <= token < VOCABULARY.size:
        return "V"
    names = {value: name for name, value in VOCABULARY.structure.items()}
    return LETTERS.get(names.get(token, ""), "?")


def parse_image(text: str, emu3: bool) -> tuple[str, tuple[int, int]]:
    """What follows the image block at the start of `text`, and its grid."""
    header = re.match(r"B([1-9]\d{0,2})\*([1-9]\d{0,2})I", text)
    assert header, f"bad header: {text[:12]}"
    height, width = int(header[1]), int(header[2])
    row = "V" * width
    body = (row + "L") * height + "FE" if emu3 else "L".join([row] * height) + "E"
    rest = text[header.end() :]
    assert rest.startswith(body), f"bad image: {rest[: len(body)]}"
    return rest[len(body) :], (height, width)


def parse(text: str, emu3: bool = False) -> list[tuple[int, int]]:
    """Grids of the images of a finished sequence; raises on anything that is not legal."""
    grids = []
    while text:
        if text[0] == "B":
            text, grid = parse_image(text, emu3)
            grids.append(grid)
        elif text in ("SX", "X"):
            return grids
        else:
            assert text[0] in "t0123456789*", f"bad text: {text[:12]}"
            text = text[1:]
    return grids


def image_tokens(height: int, width: int, emu3: bool = False, code: int = 0) -> list[int]:
    v = VOCABULARY
    header = [STAR if c == "*" else DIGITS[int(c)] for c in f"{height}*{width}"]
    row = [v.visual_start + (code + i) % v.visual_size for i in range(width)]
    rows = [row + [v.eol] for _ in range(height)]
    body = [token for row in rows for token in row]
    return [v.boi, *header, v.img, *(body + [v.eof] if emu3 else body[:-1]), v.eoi]


def walk(grammar: ImageGrammar, rng: np.random.Generator, rows: int, steps: int, **start) -> list[list[int]]:
    """Random allowed tokens; image starts and ends are made likelier than uniform so that walks hold images."""
    state = grammar.start([[VOCABULARY.bos]] * rows, **start)
    sequences: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(steps):
        mask = grammar.mask(state).numpy()
        done = state.done.numpy()
        forced = grammar.forced(state).numpy()
        ids = np.zeros(rows, dtype=np.int64)
        for row in range(rows):
            allowed = np.flatnonzero(mask[row])
            assert len(allowed) > 0
            assert (forced[row] >= 0) == (len(allowed) == 1)
            if forced[row] >= 0:
                assert allowed[0] == forced[row]
            if VOCABULARY.boi in allowed and rng.random() < 0.4:
                ids[row] = VOCABULARY.boi
            else:
                ids[row] = rng.choice(allowed)
            if not done[row]:
                sequences[row].append(int(ids[row]))
        state = grammar.advance(state, torch.from_numpy(ids))
        if bool(state.done.all()):
            break
    return [sequence for sequence, finished in zip(sequences, state.done.tolist(), strict=True) if finished]


def accepts(grammar: ImageGrammar, tokens: list[int], grids=None) -> GrammarState:
    """The state after `tokens`, each of which must be allowed."""
    state = grammar.start([[VOCABULARY.bos]], grids)
    for index, token in enumerate(tokens):
        assert grammar.mask(state)[0, token], f"token {index} ({letter(token)}) refused in {Phase(int(state.phase))}"
        state = grammar.advance(state, torch.tensor([token]))
    return state


@pytest.mark.parametrize("emu3", [False, True])
def test_random_walks_parse(emu3: bool) -> None:
    grammar = make(max_side=12, max_image_tokens=30, emu3_format=emu3)
    sequences = walk(grammar, np.random.default_rng(1), rows=150, steps=400)
    assert len(sequences) > 100
    grids = [grid for tokens in sequences for grid in parse("".join(map(letter, tokens)), emu3)]
    assert len(set(grids)) > 20
    assert all(h <= 12 and w <= 12 and h * w <= 30 for h, w in grids)
    assert any(h >= 10 for h, _ in grids)
    assert any(w >= 10 for _, w in grids)


@settings(deadline=None, max_examples=60)
@given(
    emu3=st.booleans(),
    parts=st.lists(
        st.one_of(
            st.lists(st.integers(0, 19), min_size=1, max_size=4), st.tuples(st.integers(1, 13), st.integers(1, 13))
        ),
        max_size=4,
    ),
    close=st.booleans(),
)
def test_legal_documents_are_accepted(emu3: bool, parts: list, close: bool) -> None:
    tokens: list[int] = []
    for part in parts:
        tokens += image_tokens(*part, emu3) if isinstance(part, tuple) else part
    tokens += [VOCABULARY.ess, VOCABULARY.eos] if close else [VOCABULARY.eos]
    state = accepts(make(emu3_format=emu3), tokens)
    assert bool(state.done)
    assert int(state.num_images) == sum(isinstance(part, tuple) for part in parts)


def test_three_digit_grid_is_accepted() -> None:
    assert int(accepts(make(), image_tokens(1, 123)).width) == 123
    assert int(accepts(make(), image_tokens(100, 1)).height) == 100


def test_one_wrong_token_is_refused_everywhere_in_an_image() -> None:
    grammar = make()
    tokens = image_tokens(2, 11)
    state = grammar.start([[VOCABULARY.bos]])
    for token in tokens:
        allowed = {letter(i) for i in np.flatnonzero(grammar.mask(state)[0].numpy())}
        expected = {
            Phase.TEXT: set("t0123456789*BXS"),
            Phase.CODES: {"V"},
            Phase.ROW_END: {"L"},
            Phase.IMAGE_END: {"E"},
        }.get(Phase(int(state.phase)))
        assert expected is None or allowed == expected
        assert letter(token) in allowed
        state = grammar.advance(state, torch.tensor([token]))
    assert int(state.phase) == Phase.TEXT


def test_header_never_starts_with_zero_nor_exceeds_three_digits() -> None:
    grammar = make()
    state = grammar.start([[VOCABULARY.bos]])
    seen = []
    for token in [VOCABULARY.boi, DIGITS[1], DIGITS[0], DIGITS[2]]:
        state = grammar.advance(state, torch.tensor([token]))
        seen.append("".join(sorted(letter(i) for i in np.flatnonzero(grammar.mask(state)[0].numpy()))))
    assert seen == ["123456789", "*0123456789", "*0123456789", "*"]


@pytest.mark.parametrize("grid", [(6, 6), (1, 1), (12, 3), (3, 110)])
def test_forced_grid_leaves_one_header(grid: tuple[int, int]) -> None:
    grammar = make(max_images=1)
    sequences = walk(grammar, np.random.default_rng(2), rows=12, steps=700, grids=[grid] * 12)
    found = [g for tokens in sequences for g in parse("".join(map(letter, tokens)))]
    assert found
    assert set(found) == {grid}
    state = grammar.start([[VOCABULARY.bos]], [grid])
    for token in image_tokens(*grid):
        if int(state.phase) not in (Phase.TEXT, Phase.CODES):
            assert int(grammar.forced(state)) == token
        state = grammar.advance(state, torch.tensor([token]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(0, 200),
    st.booleans(),
    st.booleans(),
)
def test_forced_runs_are_what_the_machine_forces_a_token_at_a_time(
    grids: list[tuple[int, int]], length: int, begins: bool, stops: bool
) -> None:
    grammar = make(begin_with_image=begins, stop_after_images=1 if stops else None, repeat_grid=True)
    whole = [image_tokens(*grid) for grid in grids]
    prompts = [[VOCABULARY.bos, *tokens[: length % (len(tokens) + 1)]] for tokens in whole]
    state = grammar.start(prompts, [None if stops else grid for grid in grids])
    rows = state.to_rows()
    for name, values in vars(GrammarState.from_rows(rows, grammar.device)).items():
        assert torch.equal(values, getattr(state, name))
    for number, row in enumerate(rows):
        run, one = grammar.forced_run(row), state.select(torch.tensor([number]))
        assert grammar.forced_run(row) is run
        for token, in_image, after in zip(run.ids, run.in_image, run.states, strict=True):
            assert np.flatnonzero(grammar.mask(one)[0].numpy()).tolist() == [token]
            assert in_image == (int(one.phase) not in (Phase.TEXT, Phase.CLOSE))
            one = grammar.advance(one, torch.tensor([token]))
            assert one.to_rows() == [after]
        assert bool(one.done) or int(grammar.forced(one)) < 0


def test_grids_differ_by_row() -> None:
    grammar = make(begin_with_image=True, stop_after_images=1)
    state = grammar.start([[VOCABULARY.bos]] * 3, [(1, 2), None, (12, 1)])
    rows = torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(40):
        ids = grammar.forced(state)
        ids = torch.where(ids < 0, grammar.mask(state).int().argmax(1), ids)
        rows = torch.cat([rows, ids[:, None]], dim=1)
        state = grammar.advance(state, ids)
    first, second, third = ("".join(map(letter, row)).rstrip("P") for row in rows.tolist())
    assert first == "B1*2IVVE"
    assert third == "B12*1I" + "L".join("V" * 12) + "E"
    assert second.startswith("B100*100IVVV")


def test_image_limits_and_stops() -> None:
    boi = VOCABULARY.boi
    text_only = make(max_images=0)
    assert not text_only.mask(text_only.start([[1]]))[0, boi]
    one = make(max_images=1)
    state = accepts(one, image_tokens(1, 2))
    assert int(state.phase) == Phase.TEXT
    assert not one.mask(state)[0, boi]
    stops = make(stop_after_images=2)
    assert not bool(accepts(stops, image_tokens(1, 2)).done)
    assert bool(accepts(stops, image_tokens(1, 2) * 2).done)
    begins = make(begin_with_image=True)
    assert int(begins.forced(begins.start([[1, 2]]))) == boi


def test_repeated_grid_forces_later_images() -> None:
    grammar = make(repeat_grid=True)
    state = accepts(grammar, [*image_tokens(2, 11), 1, *image_tokens(2, 11), VOCABULARY.boi])
    assert int(grammar.forced(state)) == DIGITS[2]


def test_prompt_that_ends_inside_an_image_is_completed() -> None:
    whole = image_tokens(2, 3)
    grammar = make(stop_after_images=1)
    prompts = [[1, *image_tokens(1, 1), *whole[:cut]] for cut in range(1, len(whole))]
    state = grammar.start(prompts)
    for row, cut in enumerate(range(1, len(whole))):
        single = state.select(torch.tensor([row]))
        for token in whole[cut:]:
            assert grammar.mask(single)[0, token]
            single = grammar.advance(single, torch.tensor([token]))
        assert bool(single.done)


def test_emu35_ids() -> None:
    vocabulary = Vocabulary.from_config(VocabularyConfig(preset="emu35", pad_multiple=1024))
    grammar = ImageGrammar(vocabulary, list(range(15, 25)), 9)
    state = grammar.start([[vocabulary.bos]], [(64, 64)])
    text = grammar.mask(state)[0]
    assert text[:151_643].all()
    assert not text[151_854:].any()
    length = 0
    ids = torch.tensor([vocabulary.boi])
    header = []
    while True:
        state = grammar.advance(state, ids)
        length += 1
        if int(state.phase) == Phase.TEXT:
            break
        ids = grammar.forced(state)
        header.append(int(ids))
        ids = torch.where(ids < 0, vocabulary.visual_start, ids)
    assert length == 4167
    assert header[:6] == [21, 19, 9, 21, 19, vocabulary.img]
