"""Answers turn by turn: what one turn brings, rollouts, and what is told on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_inference import TEXT_SIZE, TEXTS, VOCABULARY, GrayTokenizer, HashDecoder, RowsDecoder, toy_model

from data_pipeline.documents.builder import Picture, Text
from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from model.errors import UserError
from model.generation.settings import PhaseSampling, SamplingConfig
from training.inference.answering import Answering, answer_all, begin, begin_rollouts, take_turn
from training.inference.observing import Event, Progress, Rows, TextPiece
from training.inference.prompts import Prompt

GUIDED = SamplingConfig(PhaseSampling(top_k=40), PhaseSampling(), guidance_scale=2.0, max_new_tokens=60)
SIZE = (16, 24)  # pixels; 2 x 3 tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXTS, folder, TEXT_SIZE)
    return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())


def frame(seed: int) -> np.ndarray:
    return GrayTokenizer().decode(np.random.default_rng(seed).integers(0, 64, (1, 2, 3)))[0]


def test_the_first_turn_is_what_generate_draws(tokenizer: SentencePieceTokenizer) -> None:
    model = toy_model(tokenizer, max_images=1)
    prompts = [
        Prompt("t2i", TEXTS[0], image_size=SIZE),
        Prompt("x2i", TEXTS[1], [frame(0)], image_size=SIZE),
        Prompt("interleaved", parts=[frame(1), TEXTS[2]], image_size=SIZE),
        Prompt("t2i", TEXTS[2], image_size=SIZE),
    ]
    expected = model.generate(prompts, GUIDED, seed=3, first_index=5)
    answerings = begin(model, prompts, GUIDED, range(5, 9))
    told: dict[int, list[Event]] = {id(one): [] for one in answerings}
    answer_all(model, answerings, GUIDED, 3, lambda one, event: told[id(one)].append(event))
    for one, output in zip(answerings, expected, strict=True):
        assert one.ids == output.tokens.tolist()
        assert np.array_equal(model.picture(one.pictures[0]), output.images[0])
        assert one.finished
        assert [len(event.codes) for event in told[id(one)] if isinstance(event, Rows)] == [1, 2]
    # The two t2i prompts took one turn together. The prompt, the header's five ids one by one since guided rows read less,
    # and the codes of 2 x 3 but the last; ends of rows are read with the codes before them.
    assert [one.num_forwards for one in answerings] == [1 + 5 + 5] * 4
    assert isinstance(model.decoder, HashDecoder)


def test_a_rollout_grows_like_a_training_document(tokenizer: SentencePieceTokenizer) -> None:
    """Behind every state the prompt is what the document builder would write, and guidance never sees words."""
    model = toy_model(tokenizer)
    prompt = Prompt("interleaved", parts=[frame(0), "it moves"], image_size=SIZE)
    (one,) = begin_rollouts(model, [prompt], GUIDED, [0], 3, ["right", "left", "up"])
    take_turn(model, [one], GUIDED, 0)
    assert one.next is not None
    answer_all(model, [one], GUIDED, 0)
    first, second, third = (Picture(codes) for codes in one.pictures)
    start = Picture(GrayTokenizer().encode(frame(0)[None])[0])
    parts = [start, Text("it moves"), Text("right"), first, Text("left"), second, Text("up"), third]
    assert one.prompt == model.builder.interleaved_prompt(parts)
    assert one.unconditional == model.builder.interleaved_prompt([start, first, second, third])
    assert [part.text for part in one.parts] == ["right", "", "left", "", "up", ""]
    assert [part.is_given for part in one.parts] == [True, False] * 3
    assert one.finished


class FlatDecoder(RowsDecoder):
    """All ids are as likely, whatever came before."""

    def row_logits(self, row: list[int]) -> torch.Tensor:
        return torch.zeros(VOCABULARY.padded_size)


def test_each_turn_and_each_answer_draw_numbers_of_their_own(tokenizer: SentencePieceTokenizer) -> None:
    model = toy_model(tokenizer, FlatDecoder())
    prompt = Prompt("interleaved", parts=[frame(0)], image_size=SIZE)
    plain = SamplingConfig(max_new_tokens=40)
    answerings = begin_rollouts(model, [prompt, prompt], plain, [0, 1], 2, ["up", "up"])
    answer_all(model, answerings, plain, 0)
    drawn = {codes.tobytes() for one in answerings for codes in one.pictures}
    assert len(drawn) == 4
    assert {one.num_turns for one in answerings} == {2}


def test_an_answer_of_several_pictures_goes_on_behind_each(tokenizer: SentencePieceTokenizer) -> None:
    model = toy_model(tokenizer, max_images=3, interleaved_as="chat")
    story = Prompt("story", TEXTS[0], [frame(0)], image_size=SIZE)
    plain = SamplingConfig(max_new_tokens=300)
    (one,) = begin(model, [story], plain, [11])
    told: list[Event] = []
    answer_all(model, [one], plain, 0, lambda _, event: told.append(event))
    assert one.ids == [*one.prompt][one.num_prompt_tokens :]
    assert "".join(event.text for event in told if isinstance(event, TextPiece)) == one.text
    whole = [event.codes for event in told if isinstance(event, Rows) and event.is_whole]
    assert len(whole) == len(one.pictures)
    assert all(np.array_equal(seen, codes) for seen, codes in zip(whole, one.pictures, strict=True))
    assert one.num_turns == len(one.pictures) + (1 if one.text and one.ids[-1] != VOCABULARY.eoi else 0)


def test_text_is_told_in_whole_characters(tokenizer: SentencePieceTokenizer) -> None:
    text = "a é 漢字 \N{GRINNING FACE} it moves"
    reader = Progress(VOCABULARY, tokenizer)
    pieces: list[str] = []
    for token in [*tokenizer.encode(text), VOCABULARY.eos]:
        pieces += [event.text for event in reader.read(token) if isinstance(event, TextPiece)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5
    # What never becomes a character is told at the end.
    (byte, *_) = tokenizer.encode("漢")
    assert reader.read(byte) == []
    assert reader.end() == [TextPiece("\ufffd")]


class FirstByteDecoder(RowsDecoder):
    """Says the first byte of a character of three, again and again."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        super().__init__()
        self.byte = tokenizer.encode("漢")[0]

    def row_logits(self, row: list[int]) -> torch.Tensor:
        return torch.zeros(VOCABULARY.padded_size).index_fill(0, torch.tensor([self.byte]), 100.0)


def test_what_is_held_is_told_when_an_answer_is_cut_short(tokenizer: SentencePieceTokenizer) -> None:
    model = toy_model(tokenizer, FirstByteDecoder(tokenizer))
    plain = SamplingConfig(max_new_tokens=3)
    (one,) = begin(model, [Prompt("story", "a")], plain, [0])
    told: list[Event] = []
    answer_all(model, [one], plain, 0, lambda _, event: told.append(event))
    assert told == [TextPiece("\ufffd" * 3)]
    assert one.text == "\ufffd" * 3
    assert not one.finished


def test_a_watch_that_raises_ends_the_turn(tokenizer: SentencePieceTokenizer) -> None:
    class GoneError(Exception):
        pass

    def watch(one: Answering, event: Event) -> None:
        raise GoneError

    model = toy_model(tokenizer)
    (one,) = begin(model, [Prompt("t2i", "a", image_size=(64, 64))], GUIDED, [0])
    with pytest.raises(GoneError):
        take_turn(model, [one], GUIDED, 0, watch)
    assert isinstance(model.decoder, HashDecoder)
    assert len(model.decoder.rows[0]) - one.num_prompt_tokens < 20, "stopped behind the first row of eight"


def test_what_does_not_fit_is_refused(tokenizer: SentencePieceTokenizer) -> None:
    prompt = Prompt("interleaved", parts=[frame(0), "it moves right again and again"], image_size=SIZE)
    with pytest.raises(UserError, match="leaves no room for 9 states"):
        begin_rollouts(toy_model(tokenizer, length=150), [prompt], GUIDED, [0], 9)
    with pytest.raises(UserError, match="leaves no room for a picture of this size"):
        begin(toy_model(tokenizer, length=40), [prompt], GUIDED, [0])
    with pytest.raises(UserError, match="outside of what the model is asked for"):
        toy_model(tokenizer, image_tokens=[1, 5]).questions([prompt])
