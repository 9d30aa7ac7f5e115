"""Documents: the image block, segments, chat; building and reading back."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents.builder import (
    Document,
    DocumentBuilder,
    ImageBlock,
    MalformedImageError,
    Part,
    Picture,
    Text,
    describe,
    document_id,
    fraction,
    parse_image_block,
)
from data_pipeline.documents.prompts import TASKS
from data_pipeline.documents.reading import StructureToken, read_items
from data_pipeline.documents.templates import DocumentLayout, LayoutConfig, split_video
from data_pipeline.documents.tokenizers import TextTokenizer
from data_pipeline.kinds.registry import KindSet
from data_pipeline.sources import SampleError
from data_pipeline.storage.segments import Flag, Kind, tile_exactly
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig


class CharacterTokenizer(TextTokenizer):
    """A fake text tokenizer: one id for each character of Latin-1, digits where Qwen has them."""

    size = 256
    fingerprint = "fake characters"

    def __init__(self) -> None:
        # Emu3.5's ids: "0" to "9" are 15 to 24, "*" is 9.
        order = list(range(256))
        for character, index in [("*", 9), *((str(digit), 15 + digit) for digit in range(10))]:
            other = order.index(index) if order[ord(character)] != index else ord(character)
            order[ord(character)], order[other] = order[other], order[ord(character)]
        self.ids = {chr(code): index for code, index in enumerate(order)}
        self.characters = {index: character for character, index in self.ids.items()}

    def encode(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[int(index)] for index in ids)


TOKENIZER = CharacterTokenizer()
VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=256, visual_size=64))
BUILDER = DocumentBuilder(VOCABULARY, TOKENIZER)


def codes(height: int, width: int, first: int = 0) -> np.ndarray:
    return (np.arange(height * width).reshape(height, width) + first) % 64


def spans(document: Document) -> list[tuple[str, int]]:
    """(kind, flags) of each segment."""
    return [(Kind(int(one["kind"])).name, int(one["flags"])) for one in document.segments]


def check(document: Document) -> None:
    assert document.tokens.dtype == np.int32
    assert tile_exactly(document.segments, [len(document.tokens)], [len(document.segments)])
    starts = (document.segments["flags"] & Flag.DOCUMENT_START) > 0
    assert starts.tolist() == [True] + [False] * (len(starts) - 1)


def test_the_block_of_emu35_is_exact() -> None:
    vocabulary = Vocabulary.from_config(VocabularyConfig(preset="emu35"))
    builder = DocumentBuilder(vocabulary, TOKENIZER)
    grid = np.arange(64 * 64).reshape(64, 64)
    block = builder.image_block(grid)
    assert len(block) == 4167
    # <|image start|> "64*64" <|image token|>, ids of the released tokenizer
    assert block[:7].tolist() == [151852, 21, 19, 9, 21, 19, 151851]
    assert block[7:71].tolist() == list(range(151854, 151854 + 64))
    assert block[71] == 151846  # <|extra_200|>, end of row
    assert (block == 151846).sum() == 63
    assert block[-2:].tolist() == [151854 + 4095, 151853]


def test_the_block_of_emu3_ends_its_last_row_and_the_frame() -> None:
    builder = DocumentBuilder(VOCABULARY, TOKENIZER, "emu3")
    block = builder.image_block(codes(2, 2))
    names = {index: name for name, index in VOCABULARY.structure.items()}
    readable = [names.get(index, "code" if VOCABULARY.is_visual(index) else "text") for index in block.tolist()]
    assert readable == [
        "boi",
        "text",
        "text",
        "text",
        "img",
        "code",
        "code",
        "eol",
        "code",
        "code",
        "eol",
        "eof",
        "eoi",
    ]
    assert (parse_image_block(block, VOCABULARY, TOKENIZER).codes == codes(2, 2)).all()


def test_codes_of_a_larger_codebook_are_refused() -> None:
    with pytest.raises(UserError, match="codes"):
        BUILDER.image_block(np.array([[64]]))


parts = st.lists(
    st.builds(
        Text,
        st.text("abc <>*019.\n", min_size=1, max_size=20),
        st.sampled_from([Kind.TEXT, Kind.TRANSCRIPT]),
        st.integers(0, 10**6),
    )
    | st.builds(
        lambda height, width, first, time: Picture(codes(height, width, first), time),
        st.integers(1, 12),
        st.integers(1, 12),
        st.integers(0, 63),
        st.integers(0, 10**6),
    ),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(parts=parts, image_format=st.sampled_from(["emu35", "emu3"]))
def test_what_is_built_is_read_back(parts: list[Part], image_format: str) -> None:
    builder = DocumentBuilder(VOCABULARY, TOKENIZER, image_format)
    document = builder.interleaved(7, parts)
    check(document)
    items = read_items(document.tokens, VOCABULARY, TOKENIZER)
    assert items[0] == StructureToken("bos")
    assert items[-1] == StructureToken("eos")
    merged: list[str | np.ndarray] = []  # texts side by side cannot be told apart
    for part in parts:
        if isinstance(part, Picture):
            merged.append(part.codes)
        elif merged and isinstance(merged[-1], str):
            merged[-1] += part.text
        else:
            merged.append(part.text)
    read = [item.codes if isinstance(item, ImageBlock) else item for item in items[1:-1]]
    assert len(read) == len(merged)
    for found, given_part in zip(read, merged, strict=True):
        np.testing.assert_array_equal(found, given_part)
    images = document.segments[document.segments["kind"] == Kind.IMAGE]
    pictures = [part for part in parts if isinstance(part, Picture)]
    assert [(int(one["grid_height"]), int(one["grid_width"])) for one in images] == [
        part.codes.shape for part in pictures
    ]
    assert images["time_ms"].tolist() == [part.time_ms for part in pictures]
    # A prompt is the beginning of the document it is continued to.
    prompt = builder.interleaved_prompt(parts)
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert len(prompt) == len(document.tokens) - 1


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, VOCABULARY.size + 3) | st.integers(-3, 400), max_size=40))
def test_reading_never_fails(tokens: list[int]) -> None:
    assert isinstance(describe(tokens, VOCABULARY, TOKENIZER), str)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block: block[1:],
        lambda block: block[:-1],
        lambda block: block[:9],
        lambda block: np.delete(block, 4),  # without IMG
        lambda block: np.delete(block, 2),  # "22" for "2*2"
        lambda block: np.where(block == VOCABULARY.eol, VOCABULARY.visual_start, block),
        lambda block: np.where(block == VOCABULARY.visual_start, VOCABULARY.eol, block),
        lambda block: np.insert(block, 5, VOCABULARY.visual_start),
        lambda block: np.concatenate([block[:1], [VOCABULARY.size + 5], block[1:]]),
        lambda block: block[:0],
    ],
)
def test_malformed_blocks_are_told(spoil: object) -> None:
    block = BUILDER.image_block(codes(2, 2))
    parse_image_block(block, VOCABULARY, TOKENIZER)
    with pytest.raises(MalformedImageError):
        parse_image_block(spoil(block), VOCABULARY, TOKENIZER)  # type: ignore[operator]


def test_image_text_in_both_orders() -> None:
    first = BUILDER.image_text(1, "a red circle", codes(6, 6))
    assert describe(first.tokens, VOCABULARY, TOKENIZER) == "<bos> a red circle <image 6*6> <eos>"
    last = BUILDER.image_text(1, "a red circle", codes(6, 6), image_first=True)
    assert describe(last.tokens, VOCABULARY, TOKENIZER) == "<bos> <image 6*6> a red circle <eos>"
    assert spans(first) == [("STRUCTURE", 1), ("TEXT", 0), ("IMAGE", 0), ("STRUCTURE", 0)]
    for document in (first, last):
        check(document)


def test_plain_text_may_be_split() -> None:
    document = BUILDER.text(1, "hello")
    check(document)
    assert spans(document) == [("STRUCTURE", Flag.DOCUMENT_START), ("TEXT", Flag.SPLITTABLE), ("STRUCTURE", 0)]
    assert spans(BUILDER.text(1, "hello", splittable=False))[1] == ("TEXT", 0)


@pytest.mark.parametrize("text", ["", "h", "hello " * 40])
def test_plain_text_is_laid_out_as_a_part_alone(text: str) -> None:
    document, other = BUILDER.text(2**64 - 1, text, splittable=False), BUILDER.interleaved(2**64 - 1, [Text(text)])
    assert document.tokens.dtype == np.int32
    assert document.tokens.tolist() == other.tokens.tolist()
    assert document.segments.tobytes() == other.segments.tobytes()


def test_x2i_in_pretraining() -> None:
    document = BUILDER.x2i(1, "make it blue", [codes(2, 2), codes(3, 3)], codes(2, 2))
    assert (
        describe(document.tokens, VOCABULARY, TOKENIZER)
        == "<bos> <image 2*2> <image 3*3> make it blue <image 2*2> <eos>"
    )


def test_chat_asks_for_loss_on_the_response_only() -> None:
    document = BUILDER.chat(1, "t2i", "a red circle", [], [Picture(codes(2, 2))])
    check(document)
    assert describe(document.tokens, VOCABULARY, TOKENIZER) == (
        "<bos> You are a helpful assistant for t2i task. USER: a red circle ASSISTANT: <bss> <image 2*2> <ess> <eos>"
    )
    no_loss = (document.segments["flags"] & Flag.NO_LOSS) > 0
    with_loss = np.repeat(~no_loss, document.segments["length"])
    response = describe(document.tokens[with_loss], VOCABULARY, TOKENIZER)
    assert response == "<image 2*2> <ess> <eos>"
    prompt = BUILDER.chat_prompt("t2i", "a red circle")
    assert document.tokens[~with_loss].tolist() == prompt
    assert prompt[-1] == VOCABULARY.bss


def test_only_edits_show_pictures_before_the_question() -> None:
    images = [Picture(codes(2, 2)), Picture(codes(1, 1))]
    edit = describe(BUILDER.chat_prompt("x2i", "make it blue", images), VOCABULARY, TOKENIZER)
    assert edit == (
        "<bos> You are a helpful assistant for x2i task. USER: <image 2*2> <image 1*1> make it blue ASSISTANT: <bss>"
    )
    story = describe(BUILDER.chat_prompt("explore", "go on", images), VOCABULARY, TOKENIZER)
    assert story == (
        "<bos> You are a helpful assistant for explore task. USER: go on <image 2*2> <image 1*1> ASSISTANT: <bss>"
    )


def test_the_spaces_of_the_template() -> None:
    items = read_items(BUILDER.chat_prompt("t2i", "Q"), VOCABULARY, TOKENIZER)
    assert items[1] == "You are a helpful assistant for t2i task. USER: Q ASSISTANT: "


def test_the_unconditional_prompt_keeps_the_pictures() -> None:
    images = [Picture(codes(2, 2))]
    prompt = BUILDER.unconditional_prompt(images)
    assert describe(prompt, VOCABULARY, TOKENIZER) == (
        "<bos> You are a helpful assistant. USER: <image 2*2> ASSISTANT: <bss>"
    )
    document = BUILDER.chat(1, "x2i", "Q", images, images, unconditional=True)
    assert document.tokens[: len(prompt)].tolist() == prompt


def test_guidance_leaves_what_is_answered_where_the_answer_is() -> None:
    """As condition-dropout documents have it: later pictures stand behind BSS, not in the user's turn."""
    images, answered = [Picture(codes(2, 2))], [Text("then"), Picture(codes(1, 2))]
    prompt = BUILDER.unconditional_prompt(images, answered)
    document = BUILDER.chat(1, "explore", "Q", images, answered, unconditional=True)
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert len(document.tokens) == len(prompt) + 2


@pytest.mark.parametrize("images", [[], [Picture(codes(2, 2))]])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_those_of_the_released_configurations(task: str, images: list[Picture]) -> None:
    """The strings that `configs/` of the released code make, character by character."""
    extra = " Please generate a response with interleaved text and images." if task == "howto" else ""
    image = "<image 2*2>" if images else ""
    words = f"{image}Draw it" if task == "x2i" else f"Draw it{image}"
    expected = f"<bos>You are a helpful assistant for {task} task.{extra} USER: {words} ASSISTANT: <bss>"
    shown = describe(BUILDER.chat_prompt(task, "Draw it", images), VOCABULARY, TOKENIZER)
    assert shown.replace(" ", "") == expected.replace(" ", "")


def test_document_ids_tell_datasets_and_keys_apart() -> None:
    ids = {document_id(source, key) for source in ("a", "b") for key in ("1", "2")}
    assert len(ids) == 4
    assert document_id("a", "b1") != document_id("ab", "1")


def test_choices_by_key_are_even_and_repeatable() -> None:
    numbers = [fraction(1, "purpose", str(key)) for key in range(2000)]
    assert numbers == [fraction(1, "purpose", str(key)) for key in range(2000)]
    assert abs(np.mean(np.array(numbers) < 0.3) - 0.3) < 0.05
    assert numbers != [fraction(2, "purpose", str(key)) for key in range(2000)]


def lay_out(document_format: str, kind: str, parts: list[Part], **options: float) -> str:
    config = LayoutConfig(**options)  # type: ignore[arg-type]
    layout = DocumentLayout(BUILDER, document_format, config, "source", 0)
    document = layout.build(KindSet()[kind], "key", parts, {})
    check(document)
    assert (document.segments["document"] == document_id("source", "key")).all()
    return describe(document.tokens, VOCABULARY, TOKENIZER)


def test_the_share_of_pairs_with_the_picture_first_is_kept() -> None:
    layout = DocumentLayout(BUILDER, "pretrain", LayoutConfig(image_first_probability=0.25), "source", 0)
    pair: list[Part] = [Text("words"), Picture(codes(1, 1))]
    documents = [layout.build(KindSet()["image_text"], str(key), pair, {}) for key in range(400)]
    first = [document.segments["kind"][1] == Kind.IMAGE for document in documents]
    assert abs(np.mean(first) - 0.25) < 0.08


def test_video_as_chat() -> None:
    parts: list[Part] = [
        Text("it moves", Kind.TRANSCRIPT),
        Picture(codes(2, 2)),
        Text("to the right", Kind.TRANSCRIPT),
        Picture(codes(2, 2)),
        Picture(codes(2, 2)),
    ]
    assert lay_out("chat", "video_interleaved", parts) == (
        "<bos> You are a helpful assistant for explore task. USER: it moves <image 2*2> ASSISTANT: "
        "<bss> to the right <image 2*2> <image 2*2> <ess> <eos>"
    )
    assert lay_out("chat", "video_interleaved", parts, context_frames=2) == (
        "<bos> You are a helpful assistant for explore task. USER: it moves to the right "
        "<image 2*2> <image 2*2> ASSISTANT: <bss> <image 2*2> <ess> <eos>"
    )
    for too_many in (3, 4):
        with pytest.raises(SampleError, match="too_few_frames"):
            split_video(parts, too_many)


def test_other_kinds_as_chat() -> None:
    picture = Picture(codes(1, 1))
    assert "t2i task. USER: words ASSISTANT: <bss> <image 1*1> <ess>" in lay_out(
        "chat", "image_text", [Text("words"), picture]
    )
    assert "x2i task. USER: <image 1*1> words ASSISTANT: <bss> <image 1*1> <ess>" in lay_out(
        "chat", "x2i", [picture, Text("words"), picture]
    )
    assert "story task. USER: words ASSISTANT: <bss> <image 1*1> <image 1*1> <ess>" in lay_out(
        "chat", "video_text", [Text("words"), picture, picture]
    )
    with pytest.raises(SampleError, match="no_chat_format"):
        lay_out("chat", "text", [Text("words")])
    dropped = lay_out("chat", "image_text", [Text("words"), picture], condition_dropout_probability=1.0)
    assert "words" not in dropped
