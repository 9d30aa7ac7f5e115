"""tiktoken in the place of Hugging Face's library: the same ids, or a reason why not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_pipeline.documents import byte_pairs, tokenizers
from data_pipeline.documents.byte_pairs import PATTERNS, BytePairs, UnsuitedError, last_pair
from data_pipeline.documents.tokenizers import HuggingFaceTokenizer

CORPUS = [
    *list(topics.values())[:30],
    "红色的圆形在左上角。蓝色的正方形在中间。你好，世界！今天天气很好。" * 20,
    "I'd say we're here; they've gone, it's 1984 and WE'LL see 12345 THINGS she'd DON'T.\r\n\r\n  \t x" * 20,
    "ÀÉÎ åäö ñandú İstanbul ſtraße Ελληνικά Русский हिन्दी ไทย 한국어 日本語 العربية 👩‍👩‍👧‍👦 😀 🇩🇪" * 20,
]
NAMES = [*PATTERNS, "Qwen, not normalized"]
# What the patterns and normalization are about, beside any text at all.
PIECES = (
    *(
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'ve",
        "'ſ",
        "'",
        "’s",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "\u00a0",
        "\u0085",
        "\x1c",
        "\v",
    ),
    *(
        "1",
        "23",
        "٣",
        "½",
        "Ⅷ",
        "你好",
        "。",
        "é",
        "e\u0301",
        "\u0301",
        "\u0323\u0301",
        "q\u0307\u0323",
        "Å",
        "Å",
        "한",
        "각",
    ),
    *(
        "👩\u200d👧",
        "🏽",
        "🇩🇪",
        "\ufe0f",
        "हिन्दी",
        "\u093c",
        "ΑΣ",
        "ß",
        "ﬁ",
        "ʼn",
        "\u0130",
        "K",
        "Dž",
        "ʰ",
        "a",
        "Word",
        "/",
        "_-!?",
    ),
    *(
        "<|end|>",
        "<tool>",
        "</tool>",
        "<to",
        "ol>",
        "\ue000",
        "\U000e0041",
        "\U0001fae8",
        "\U000e1000",
        "\0",
        "x" * 150,
        " " * 70,
    ),
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)


def trained(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = PATTERNS[name.partition(",")[0]]
    if name == "GPT-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if name in ("Qwen", "Qwen 3.5"):
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("e\u0301</tool>", normalized=True)])
    return tokenizer


@pytest.fixture(scope="module")
def both() -> dict[str, tuple[Tokenizer, BytePairs]]:
    found = {}
    for name in NAMES:
        tokenizer = trained(name)
        tokenizer.encode_special_tokens = True
        found[name] = (tokenizer, BytePairs(json.loads(tokenizer.to_str()), tokenizer))
    return found


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_any_text_has_the_ids_of_the_library(both: dict[str, tuple[Tokenizer, BytePairs]], text: str) -> None:
    for name, (tokenizer, fast) in both.items():
        ids = fast.ids(text)
        if ids is not None:
            assert ids.tolist() == library_ids(tokenizer, text), name


@pytest.mark.parametrize("name", NAMES)
def test_every_character_has_the_ids_of_the_library(both: dict[str, tuple[Tokenizer, BytePairs]], name: str) -> None:
    tokenizer, fast = both[name]
    characters = [chr(code) for code in np.flatnonzero(~fast._strange).tolist() if code < 0x20000 or code >= 0xE0000]
    assert len(characters) > 60_000
    for first in range(0, len(characters), 4096):
        text = "".join(f"a'{one}{one}1 {one}\n" for one in characters[first : first + 4096])
        ids = fast.ids(text)
        assert ids is not None
        assert ids.tolist() == library_ids(tokenizer, text), name


@pytest.mark.parametrize("name", NAMES)
def test_usual_texts_are_not_left_to_the_library(both: dict[str, tuple[Tokenizer, BytePairs]], name: str) -> None:
    tokenizer, fast = both[name]
    for text in (
        *CORPUS[:-1],
        "naïve “quotes” — e\u0301 Русский 한국어 日本語 😀",
        "<|end|>",
        "",
        "a" * 200_000,
        "é" * 200_000,
    ):
        ids = fast.ids(text)
        assert ids is not None
        assert ids.dtype == np.int32
        assert ids.tolist() == library_ids(tokenizer, text)


def test_names_of_tokens_and_strange_characters_are_left_to_the_library(
    both: dict[str, tuple[Tokenizer, BytePairs]],
) -> None:
    for name, (_, fast) in both.items():
        for text in ("a <tool> b", "e\u0301</tool>", "\ud800", "\U000f0000", "\U00100000"):
            assert fast.ids(text) is None, (name, text)
        if name != "GPT-2":
            assert fast.ids("'ſ") is None  # an s, or none, where case does not count
    assert both["Qwen"][1].ids("\u00e9</tool>") is None  # the name as it is normalized
    assert both["Qwen"][1].ids("\U000e1000") is None  # of a Unicode to come


def test_ids_may_be_in_any_order() -> None:
    tokenizer = trained("Llama 3")
    definition = json.loads(tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    ids = list(range(1000, 1000 + len(vocabulary)))
    random.Random(0).shuffle(ids)
    definition["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
    definition["added_tokens"] = []
    shuffled = Tokenizer.from_str(json.dumps(definition))
    fast = BytePairs(definition, shuffled)
    for text in CORPUS[:3]:
        assert fast.ids(text).tolist() == library_ids(shuffled, text)  # type: ignore[union-attr]


# Merges


def of_merges(
    merges: list[tuple[str, str]], extra: tuple[str, ...] = (), ignore_merges: bool = False
) -> dict[str, Any]:
    """A definition that knows the bytes and what these merges make; words are runs of letters."""
    tokens = [*byte_pairs.byte_letters().values(), *dict.fromkeys(left + right for left, right in merges), *extra]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    definition["model"]["vocab"] = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    definition["model"]["merges"] = [list(pair) for pair in merges]
    definition["model"]["ignore_merges"] = ignore_merges
    return definition


def made_of(definition: dict[str, Any]) -> tuple[Tokenizer, BytePairs]:
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    return tokenizer, BytePairs(definition, tokenizer)


@pytest.mark.parametrize(
    ("merges", "word", "reason"),
    [
        # "ab" comes before "bc": "abc" is never made of "a" and "bc", and tiktoken would make it of "ab" and "c".
        ([("a", "b"), ("b", "c"), ("a", "bc")], "abc", "another way"),
        ([("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c")], "xabc", None),
        # "cd" comes before "ab": of "abcd", "ab" and "cd" are left, not what is listed.
        ([("c", "d"), ("a", "b"), ("ab", "c"), ("abc", "d")], "abcd", "another way"),
        # Two ways of "abc", the one that is gone stands behind "abd".
        ([("b", "c"), ("b", "d"), ("ab", "c"), ("a", "bd"), ("a", "bc"), ("a", "b")], "abcabd", "order"),
        ([("a", "b"), ("a", "b")], "ab", "twice"),
        ([("a", "€")], "a", "no bytes"),
    ],
)
def test_merges_that_tiktoken_would_do_otherwise_are_refused(
    merges: list[tuple[str, str]], word: str, reason: str | None
) -> None:
    if reason is None:
        tokenizer, fast = made_of(of_merges(merges))
        assert fast.ids(word).tolist() == library_ids(tokenizer, word)  # type: ignore[union-attr]
        return
    with pytest.raises(UnsuitedError, match=reason):
        byte_pairs.ranked_tokens(of_merges(merges)["model"])


LETTERS = "abc"
WORDS = ["".join(letters) for length in range(1, 8) for letters in itertools.product(LETTERS, repeat=length)]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), ignore_merges=st.booleans())
def test_merges_that_pass_are_merged_alike_in_every_word(data: st.DataObject, ignore_merges: bool) -> None:
    """The proof in `byte_pairs`, on lists of merges at random: all words of up to seven of three letters."""
    parts, merges = list(LETTERS), []
    for _ in range(data.draw(st.integers(1, 7))):
        pair = (data.draw(st.sampled_from(parts)), data.draw(st.sampled_from(parts)))
        if pair not in merges and len("".join(pair)) < 8:
            merges.append(pair)
            parts = list(dict.fromkeys([*parts, "".join(pair)]))
    extra = tuple(data.draw(st.lists(st.sampled_from(WORDS), max_size=2))) if ignore_merges else ()
    try:
        tokenizer, fast = made_of(of_merges(merges, extra, ignore_merges))
    except UnsuitedError:
        return
    text = "\n".join(WORDS)
    assert fast.ids(text).tolist() == library_ids(tokenizer, text)  # type: ignore[union-attr]


def test_lists_at_random_pass_and_are_refused() -> None:
    """Both happen often, so that the test above shows something."""
    draw, passed = random.Random(0), 0
    for _ in range(200):
        parts, merges = list(LETTERS), []
        for _ in range(4):
            pair = (draw.choice(parts), draw.choice(parts))
            if pair not in merges:
                merges.append(pair)
                parts = list(dict.fromkeys([*parts, "".join(pair)]))
        try:
            byte_pairs.ranked_tokens(of_merges(merges)["model"])
            passed += 1
        except UnsuitedError:
            pass
    assert 40 < passed < 190


def test_all_ways_to_make_a_token_may_be_listed() -> None:
    """As files are written that were made of ranks: each split into two tokens, one after another."""
    ranks = dict(byte_pairs.ranked_tokens(json.loads(trained("Llama 3").to_str())["model"])[0])
    letters = byte_pairs.byte_letters()
    written = {token: "".join(letters[value] for value in token) for token in ranks}
    merges = [
        (written[token[:at]], written[token[at:]])
        for token in ranks
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    definition = json.loads(trained("Llama 3").to_str()) | {"added_tokens": []}
    definition["model"] |= {"vocab": {written[token]: rank for token, rank in ranks.items()}, "merges": merges}
    assert len(merges) > (len(ranks) - 256) * 1.2
    tokenizer, fast = made_of(definition)
    for text in CORPUS[:3]:
        assert fast.ids(text).tolist() == library_ids(tokenizer, text)  # type: ignore[union-attr]


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_word_that_no_merge_makes(ignore_merges: bool) -> None:
    """Where merges are ignored, such a word is its token; else nothing is."""
    of_no_pair = of_merges([("a", "b")], ("cxyz",), ignore_merges)
    # "bc" comes first, so that "ab" and "cd" are never there together.
    not_reached = of_merges([("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")], (), ignore_merges)
    for definition, words in ((of_no_pair, ("cxyz", "acxyz", "cxyzb")), (not_reached, ("abcd", "xabcdabcd", "cdab"))):
        tokenizer, fast = made_of(definition)
        for word in words:
            assert fast.ids(word).tolist() == library_ids(tokenizer, word)  # type: ignore[union-attr]
    assert len(fast.ids("abcd")) == (1 if ignore_merges else 3)  # type: ignore[arg-type]
    with pytest.raises(UnsuitedError, match="another way"):  # "abc" is "ab" and "c" to tiktoken, and to no list
        made_of(of_merges([("a", "b")], ("abc",), ignore_merges=True))


def test_the_last_pair() -> None:
    ranks = {bytes([value]): value for value in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"abcd": 259}
    assert last_pair(b"abc", ranks) == (b"a", b"bc")
    assert last_pair(b"ab", ranks) == (b"a", b"b")
    assert last_pair(b"abcd", ranks) == (b"abc", b"d")
    assert last_pair(b"bcxy", ranks) is None


# What else a definition may say


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    definition = of_merges([("a", "b")])
    change(definition)
    return definition


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one["model"].update(dropout=0.1), "plain BPE"),
        (lambda one: one["model"].update(byte_fallback=True), "plain BPE"),
        (lambda one: one["model"].update(continuing_subword_prefix="##"), "prefix"),
        (lambda one: one["model"].update(end_of_word_suffix="</w>"), "suffix"),
        (lambda one: one["model"]["vocab"].pop("a"), "lacks a byte"),
        (lambda one: one["model"]["vocab"].update(ab=3), "same id"),
        (lambda one: one.update(normalizer={"type": "Lowercase"}), "NFC"),
        (lambda one: one.update(normalizer={"type": "NFKC"}), "NFC"),
        (lambda one: one["pre_tokenizer"].update(add_prefix_space=True), "cuts words"),
        (lambda one: one["pre_tokenizer"].update(use_regex=False), "cuts words"),
        (lambda one: one.update(pre_tokenizer=None), "cuts words"),
        (lambda one: one.update(pre_tokenizer={"type": "Whitespace"}), "cuts words"),
    ],
)
def test_other_definitions_are_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(of_merges([("a", "b")])))
    with pytest.raises(UnsuitedError, match=reason):
        BytePairs(changed(change), tokenizer)


def test_it_is_used_from_many_texts_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizers, "_MANY_CHARACTERS", 100)
    tokenizer = HuggingFaceTokenizer(trained("Qwen").to_str().encode())
    texts = ["a <tool> b", CORPUS[-1], "", " " * 250_000 + "e\u0301 <|end|>", CORPUS[0]]
    assert tokenizer.encode_array("short").tolist() == tokenizer.encode("short")
    assert "run by" not in capfd.readouterr().err
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == [tokenizer.encode(text) for text in texts]
    assert tokenizer._fast is not None
    assert capfd.readouterr().err.count("run by tiktoken") == 1
    definition = of_merges([("a", "b"), ("b", "c"), ("a", "bc")])
    other = HuggingFaceTokenizer(json.dumps(definition).encode())
    assert [ids.tolist() for ids in other.encode_arrays(["abc" * 40, "abc"])] == [
        other.encode(text) for text in ("abc" * 40, "abc")
    ]
    assert "run by tokenizers, as tiktoken might give other ids: its merges" in capfd.readouterr().err
