"""Text tokenizers: exact round trips, digits one by one, no control ids from text."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents.byte_pairs import PATTERNS, grouped
from data_pipeline.documents.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    TiktokenTokenizer,
    _parse_ranks,
    encode_grid,
    load_text_tokenizer,
    train_sentencepiece,
)
from model.errors import UserError

TEXTS = [
    "a red circle at top left and a blue square at middle center",
    "make the green triangle purple. The quick brown fox jumps over the lazy dog!",
    "红色的圆形在左上角。蓝色的正方形在中间。你好，世界！今天天气很好。",
    "You are a helpful assistant for t2i task. USER: draw it ASSISTANT: ",
    "In 1984 there were 128 * 64 = 8192 pixels;\nnow there are many more, aren't there?",
] * 20 + [topics["lambda"], topics["comparisons"]]  # real English text
CONTROL_TEXT = "<s></s><unk><0x41><pad><|extra_200|><|image start|><|endoftext|>[CLS]"


def ranks_file() -> bytes:
    """A small ranks file: all bytes, then merges of common words."""
    tokens = [bytes([value]) for value in range(256)]
    for word in ("the", " the", " a", "ed", "red", "circle", "你", "好"):
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1)]
    unique = list(dict.fromkeys(tokens))
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(unique))
    return b"\n".join(lines) + b"\n"


def hugging_face_definition() -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return {
        "sentencepiece": train_sentencepiece(TEXTS, folder, 360),
        "tiktoken": TiktokenTokenizer(ranks_file()),
        "huggingface": HuggingFaceTokenizer(hugging_face_definition()),
    }


KINDS = ("sentencepiece", "tiktoken", "huggingface")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces  ",
        "\n\n",
        "tab\tand\r\nline",
        "你好 世界",
        "😀 é ñ",
        "\0",
        "\u2581 block \u2581\u2581",
        "64*64",
        CONTROL_TEXT,
        "a" * 300,
        *TEXTS[:5],
    ],
)
def test_text_comes_back_exactly(tokenizers: dict[str, TextTokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert all(0 <= index < tokenizer.size for index in ids)
    assert tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.text("ab 19*\n\u2581<s>|红圆。", max_size=60)
)
def test_any_text_comes_back(tokenizers: dict[str, TextTokenizer], text: str) -> None:
    for kind in ("sentencepiece", "huggingface"):
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text, kind
    # Qwen's tokenizer normalises first.
    normal = unicodedata.normalize("NFC", text)
    assert tokenizers["tiktoken"].decode(tokenizers["tiktoken"].encode(text)) == normal


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=20) | st.text("ab 19*\n\u2581<s>|红圆e\u0301", max_size=40), max_size=8))
def test_many_texts_at_once_have_the_ids_of_each(tokenizers: dict[str, TextTokenizer], texts: list[str]) -> None:
    for tokenizer in tokenizers.values():
        found = tokenizer.encode_arrays(texts)
        assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in texts]
        assert all(ids.dtype == np.int32 for ids in found)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_control_tokens_are_mere_text(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for name in ("<s>", "</s>", "<unk>", "<0x41>", "<|extra_200|>", "<|endoftext|>"):
        assert len(tokenizer.encode(name)) > 1, name
    assert tokenizer.decode(tokenizer.encode(CONTROL_TEXT)) == CONTROL_TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_digits_stand_one_by_one(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert [tokenizer.decode([index]) for index in tokenizer.encode("1984")] == list("1984")
    header = encode_grid(tokenizer, 64, 8)
    assert [tokenizer.decode([index]) for index in header] == list("64*8")
    assert tokenizer.encode("64*8") == header


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40) | st.text("aB1 \t\r\n'sſ。é\u0301/-<|\u3000\u0085", max_size=40))
def test_tiktoken_cuts_words_as_the_published_pattern_does(text: str) -> None:
    import tiktoken

    ranks = _parse_ranks(ranks_file(), "ranks")
    for pattern in PATTERNS.values():
        published, ours = (
            tiktoken.Encoding("a", pat_str=one, mergeable_ranks=ranks, special_tokens={})
            for one in (pattern, grouped(pattern))
        )
        assert ours.encode_ordinary(text) == published.encode_ordinary(text)


def test_a_tokenizer_that_merges_digits_still_writes_sizes_one_by_one() -> None:
    class Merging:
        """A fake tokenizer that knows "64" as one token."""

        size, fingerprint = 300, "fake"

        def encode(self, text: str) -> list[int]:
            return [299] if text == "64" else [ord(character) for character in text]

    assert encode_grid(Merging(), 64, 64) == [ord(character) for character in "64*64"]  # type: ignore[arg-type]


def test_a_tokenizer_without_digits_is_refused() -> None:
    class Pairs:
        """A fake tokenizer that writes two tokens for each character."""

        size, fingerprint = 600, "fake"

        def encode(self, text: str) -> list[int]:
            return [index for character in text for index in (0, ord(character))]

    with pytest.raises(UserError, match="image sizes"):
        encode_grid(Pairs(), 6, 6)  # type: ignore[arg-type]


def test_long_texts_are_cut_and_come_back(tokenizers: dict[str, TextTokenizer]) -> None:
    for text in ("red circle " * 20_000, "x" * 250_001, "\n" * 120_000):
        for kind in KINDS:
            tokenizer = tokenizers[kind]
            assert tokenizer.decode(tokenizer.encode(text)) == text, kind


def test_training_is_a_function_of_the_texts(tmp_path: Path) -> None:
    first = train_sentencepiece(TEXTS, tmp_path / "first", 350)
    second = train_sentencepiece(iter(TEXTS), tmp_path / "second", 350)
    assert first.fingerprint == second.fingerprint
    assert first.size == second.size == 350
    other = train_sentencepiece([*TEXTS, "another text"] * 3, tmp_path / "other", 350)
    assert other.fingerprint != first.fingerprint
    assert load_text_tokenizer(tmp_path / "first").fingerprint == first.fingerprint


def test_lines_longer_than_the_trainers_limit_are_not_lost(tmp_path: Path) -> None:
    word = "zygomorphic "
    tokenizer = train_sentencepiece([*TEXTS, word * 2000], tmp_path / "tokenizer", 360)
    assert len(tokenizer.encode(word * 10)) <= 5 * 10


def test_rare_characters_do_not_crowd_out_the_words(tmp_path: Path) -> None:
    many = "".join(chr(0x4E00 + number) for number in range(600))
    tokenizer = train_sentencepiece([*TEXTS * 5, many], tmp_path / "tokenizer", 360)
    assert tokenizer.decode(tokenizer.encode(many)) == many
    assert len(tokenizer.encode("the quick brown fox")) < len("the quick brown fox")


def test_too_few_texts_for_the_size_say_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most \d+ pieces"):
        train_sentencepiece(TEXTS[:2], tmp_path / "tokenizer", 5000)
    assert not (tmp_path / "tokenizer" / "tokenizer.json").exists()


def test_loading_tells_the_kinds_apart(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(ranks_file())
    assert isinstance(load_text_tokenizer(tmp_path / "qwen.tiktoken"), TiktokenTokenizer)
    folder = tmp_path / "hugging_face"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(hugging_face_definition())
    assert isinstance(load_text_tokenizer(folder), HuggingFaceTokenizer)
    train_sentencepiece(TEXTS, tmp_path / "ours", 350)
    assert isinstance(load_text_tokenizer(tmp_path / "ours"), SentencePieceTokenizer)
    model = load_text_tokenizer(tmp_path / "ours" / "tokenizer.model")
    assert isinstance(model, SentencePieceTokenizer)


def test_damage_and_strangers_are_the_users_to_mend(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, tmp_path / "ours", 350)
    model = tmp_path / "ours" / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="damaged"):
        load_text_tokenizer(tmp_path / "ours")
    with pytest.raises(UserError, match="does not exist"):
        load_text_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text tokenizer"):
        load_text_tokenizer(tmp_path / "empty")
    for name, content in (
        ("a.model", b"junk"),
        ("a.tiktoken", b"not base64! 1\n"),
        ("b.tiktoken", b"\n".join(ranks_file().split(b"\n")[1:])),
        ("a.json", b"{}"),
        ("a.txt", b"text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            load_text_tokenizer(tmp_path / name)


def test_the_description_says_what_the_tokenizer_is(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, tmp_path / "ours", 350, inputs={"shards": {"a": "b"}})
    description = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    assert description["kind"] == "sentencepiece"
    assert description["size"] == 350
    assert description["inputs"] == {"shards": {"a": "b"}}


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_have_the_ids_of_the_whole(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    """No cut changes ids: the libraries' own answer for the whole text is the measure."""
    tokenizer: Any = tokenizers[kind]
    whole = {
        "sentencepiece": lambda text: tokenizer._processor.encode(text),
        "tiktoken": lambda text: tokenizer._encoding.encode_ordinary(text),
        "huggingface": lambda text: tokenizer._tokenizer.encode(text, add_special_tokens=False).ids,
    }[kind]
    for text in ("a" * 250_000, "red\n\n  disc " * 10_000, "一" * 120_000):
        assert tokenizer.encode(text) == list(whole(text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_blanks_end_no_process(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    text = "a" + " " * 1_000_000 + "b"
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text
