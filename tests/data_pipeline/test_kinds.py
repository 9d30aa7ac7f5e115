"""Kinds and filters of a user's own package, named by dotted paths; one home each for a prompt and an image block."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.documents.builder import DocumentBuilder, Picture, Text, describe
from data_pipeline.documents.prompts import EMPTY_PROMPTS, TASKS
from data_pipeline.documents.reading import split_parts
from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from data_pipeline.filters.base import FilterChain, FilterConfig
from data_pipeline.kinds.named_parts import PartsConfig
from data_pipeline.kinds.registry import KINDS, KindSet, read_shard
from data_pipeline.sources import BadSample, Sample
from data_pipeline.storage.token_files import TokenFileReader
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig
from training.tokenizers.text import TextTokenizerOptions, training_texts

# A package as a user has it, beside the installed one.
PACKAGE = '''
from data_pipeline.documents.builder import Text
from data_pipeline.documents.templates import Chat
from data_pipeline.kinds.base import SampleKind
from data_pipeline.sources.samples import SampleError


class QuestionAnswer(SampleKind):
    """KEY.question.txt and KEY.answer.txt."""

    name = "question_answer"

    def accepts(self, extensions):
        return extensions == {"question.txt", "answer.txt"}

    def check(self, sample):
        if sample.parts["question.txt"] == sample.parts["answer.txt"]:
            raise SampleError("echo")

    def prepare(self, sample, decoder):
        return [Text(sample.text("question.txt")), Text(sample.text("answer.txt"))]

    def chat(self, sample, layout):
        question, answer = sample.parts
        return Chat("explore", question.text, [], [answer])

    def texts(self, sample):
        yield sample.text("question.txt")
        yield sample.text("answer.txt")


class Shouting:
    name = "shouting"
    unit = "share of capitals"

    def score(self, sample):
        text = "".join(sample.texts)
        return sum(map(str.isupper, text)) / len(text)


class Nothing:
    name = "nothing"


answer = 42
'''
QA, SHOUTING = "users_corpus.parts.QuestionAnswer", "users_corpus.parts.Shouting"


@pytest.fixture
def users_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "users_corpus"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "parts.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("users_corpus", "users_corpus.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    texts = ["what is red, and why", "the circle is red", "WHY NOT", *(name for name in dir(np)), *EMPTY_PROMPTS] * 20
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer"), 420)


def vocabulary_of(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    return Vocabulary.from_config(VocabularyConfig(text_size=tokenizer.size, visual_size=64))


def write_shard(path: Path) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "qa", "question.txt": "what is red", "answer.txt": "the circle is red"})
        writer.write({"__key__": "loud", "question.txt": "WHY", "answer.txt": "WHY NOT"})
        writer.write({"__key__": "echo", "question.txt": "why", "answer.txt": "why"})
        writer.write({"__key__": "plain", "txt": "the circle is red"})
    return path


@pytest.mark.usefixtures("users_package")
def test_a_kind_and_a_filter_of_a_users_package_go_all_the_way(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    shard = write_shard(tmp_path / "0.tar")
    vocabulary = vocabulary_of(tokenizer)
    expected = {
        "pretrain": ["<bos> what is redthe circle is red <eos>"],
        "chat": [
            "<bos> You are a helpful assistant for explore task. USER: what is red ASSISTANT: "
            "<bss> the circle is red <ess> <eos>"
        ],
    }
    for document_format, documents in expected.items():
        config = TokenizeConfig("mine", document_format, kinds=[QA], filters=[FilterConfig(SHOUTING, maximum=0.5)])
        result = ShardTokenizer(config, vocabulary, tokenizer, None).tokenize(
            shard, tmp_path / document_format / "000000"
        )
        assert result.manifest["quarantined"] == {"echo": 1, "unknown_kind": 1, "filter_shouting": 1}
        reader = TokenFileReader(tmp_path / document_format / "000000")
        found = [describe(reader.tokens(index), vocabulary, tokenizer) for index in range(len(reader))]
        assert found == documents
    options = TextTokenizerOptions(corpora=["x"], template_copies=0, kinds=[QA, "text"])
    assert Counter(training_texts(options, [shard])) == Counter(
        {"what is red": 1, "the circle is red": 2, "WHY": 1, "WHY NOT": 1}
    )


@pytest.mark.usefixtures("users_package")
def test_only_the_kinds_that_are_asked_for_are_taken(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar")

    def outcome(names: list[str]) -> list[str]:
        return [item.kind if isinstance(item, Sample) else item.reason for item in read_shard(shard, KindSet(names))]

    assert outcome([]) == ["unknown_kind"] * 3 + ["text"]
    assert outcome(["image_text"]) == ["unknown_kind"] * 4
    assert outcome(["text", QA]) == ["question_answer", "question_answer", "echo", "text"]


@pytest.mark.usefixtures("users_package")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pictures", "there is no kind of sample"),
        ("no_such_package.Kind", "cannot be imported"),
        ("users_corpus.parts.Missing", "cannot be imported"),
        ("users_corpus.parts.answer", "is no class"),
        ("users_corpus.parts.Nothing", "not a kind of sample"),
    ],
)
def test_what_is_no_kind_is_one_message(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KindSet([name])


@pytest.mark.usefixtures("users_package")
def test_what_is_no_filter_is_one_message() -> None:
    with pytest.raises(UserError, match="without unit, score"):
        FilterChain([FilterConfig("users_corpus.parts.Nothing", maximum=1.0)])
    with pytest.raises(UserError, match="same name"):
        KindSet([QA, QA])


def test_the_choice_of_kinds_enters_the_fingerprint_and_none_changes_nothing(tokenizer: SentencePieceTokenizer) -> None:
    def fingerprint(**values: list[str]) -> str:
        config = TokenizeConfig("name", **values)  # type: ignore[arg-type]
        return ShardTokenizer(config, vocabulary_of(tokenizer), tokenizer, None).fingerprint

    assert fingerprint() == fingerprint(kinds=[])
    assert len({fingerprint(), fingerprint(kinds=["text"]), fingerprint(kinds=list(KINDS))}) == 3


def test_the_tokenizers_templates_are_the_prompts_of_the_builder(tokenizer: SentencePieceTokenizer) -> None:
    builder = DocumentBuilder(vocabulary_of(tokenizer), tokenizer)
    prompts = [builder.unconditional_prompt(), *(builder.chat_prompt(task, "") for task in TASKS)]
    assert [tokenizer.decode(prompt[1:-1]) for prompt in prompts] == list(EMPTY_PROMPTS)


def test_one_parser_reads_what_the_builder_writes_and_passes_over_what_is_cut(
    tokenizer: SentencePieceTokenizer,
) -> None:
    vocabulary = vocabulary_of(tokenizer)
    codes = np.arange(6).reshape(2, 3)
    for image_format in ("emu35", "emu3"):
        builder = DocumentBuilder(vocabulary, tokenizer, image_format)
        tokens = builder.interleaved(0, [Text("red"), Picture(codes), Text("why")]).tokens
        shapes = [part.shape for part in split_parts(tokens, vocabulary, tokenizer)]
        assert shapes[1] == (2, 3)
        assert len(shapes) == 3
        begin = int(np.flatnonzero(tokens == vocabulary.boi)[0])
        end = int(np.flatnonzero(tokens == vocabulary.eoi)[0])
        for length in range(begin + 1, end + 1):  # cut inside the image
            (text,) = split_parts(tokens[:length], vocabulary, tokenizer)
            assert tokenizer.decode(text.tolist()) == "red"
        spoilt = tokens.copy()
        spoilt[end - 1] = vocabulary.eol  # a code is missing: the block goes, the text after it stays
        assert [tokenizer.decode(part.tolist()) for part in split_parts(spoilt, vocabulary, tokenizer)] == [
            "red",
            "why",
        ]


def test_metadata_of_any_depth_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "deep", "txt": "x", "json": b"[" * 200_000})
        writer.write({"__key__": "good", "txt": "x", "json": json.dumps({"split_ok": True}).encode()})
    deep, good = read_shard(tmp_path / "0.tar")
    assert isinstance(deep, BadSample)
    assert deep.reason == "bad_metadata"
    assert isinstance(good, Sample)


def test_captions_from_metadata_and_files_that_do_not_count(tmp_path: Path) -> None:
    """Clips as cosmos-curate and video2dataset lay them out, an image of img2dataset with a caption of its own."""
    windows = {"windows": [{"qwen_caption": "a dog runs"}, {"qwen_caption": " it stops\n"}]}
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "clip", "mp4": b"film", "json": json.dumps(windows).encode(), "pickle": b"x"})
        writer.write(
            {"__key__": "named", "jpg": b"i", "txt": "old", "json": json.dumps({"windows": windows["windows"]})}
        )
        writer.write({"__key__": "sound", "mp4": b"film", "m4a": b"x", "json": b"{}"})
        writer.write({"__key__": "number", "mp4": b"film", "json": json.dumps({"windows": [{"qwen_caption": 3}]})})
        writer.write({"__key__": "bare", "mp4": b"film"})
    parts = PartsConfig("windows.*.qwen_caption", ["pickle", ".M4A"])
    found = list(read_shard(tmp_path / "0.tar", KindSet((), parts)))
    clip, named = found[:2]
    assert isinstance(clip, Sample)
    assert isinstance(named, Sample)
    assert (clip.kind, clip.text("txt")) == ("video_text", "a dog runs\nit stops")
    assert (named.kind, named.text("txt")) == ("image_text", "a dog runs\nit stops")
    assert [(bad.key, bad.reason) for bad in found[2:] if isinstance(bad, BadSample)] == [
        ("sound", "no_caption"),
        ("number", "no_caption"),
        ("bare", "no_caption"),
    ]
    options = TextTokenizerOptions(corpora=["x"], template_copies=0, parts=parts)
    assert list(training_texts(options, [tmp_path / "0.tar"])).count("a dog runs\nit stops") == 2
    (first,) = (
        item
        for item in read_shard(tmp_path / "0.tar", KindSet((), PartsConfig("windows.1.qwen_caption")))
        if item.key == "named"
    )
    assert isinstance(first, Sample)
    assert first.text("txt") == "it stops"


def test_token_files_made_before_parts_could_be_chosen_are_not_made_again(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    monkeypatch.setattr("data_pipeline.tokenize.encode_json", lambda content: hashed.append(content) or b"")
    for parts in (PartsConfig(), PartsConfig("caption"), PartsConfig(ignore=["pickle"])):
        ShardTokenizer(TokenizeConfig("mine", parts=parts), vocabulary_of(tokenizer), tokenizer, None)
    assert "parts" not in str(hashed[0])
    assert hashed[1]["parts"] == {"caption": "caption", "ignore": []}
    assert hashed[2]["parts"] == {"caption": "", "ignore": ["pickle"]}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (["mp4", "json"], ["video_text lacks txt", "video_interleaved lacks vtt"]),
        (["jpg", "caption"], ["image_text takes txt, not caption"]),
        (["jpg", "png", "gif"], []),
        ([f"{number}.bin" for number in range(2000)], []),  # not tried: too many
    ],
)
def test_a_sample_of_no_kind_says_what_is_missing(parts: list[str], told: list[str]) -> None:
    assert KindSet().nearest(parts) == told
