"""Texts encoded many at a time, in threads: the same bytes, and a text that is refused is its own sample's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import tokenize as tokenize_module
from data_pipeline.documents import batches, encoding_ahead
from data_pipeline.documents.encoding_ahead import EncodingAhead, grouped
from data_pipeline.documents.tokenizers import TextTokenizer, train_sentencepiece
from data_pipeline.storage.read_ahead import Readers
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig

TEXTS = ["hello world", "a refused text", "\u2581 blocks", "", "\u7ea2\u8272", *sorted(topics.values())[:40]]
VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=310, visual_size=64))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_sentencepiece(TEXTS * 2, tmp_path_factory.mktemp("text") / "text_tokenizer", 310)


class Refusing(TextTokenizer):
    """Raises for texts that say so. Keeps the number of texts of each call, and the threads."""

    fingerprint = "refusing"

    def __init__(self, tokenizer: TextTokenizer, error: type[Exception] = RuntimeError):
        self.tokenizer, self.size, self.error = tokenizer, tokenizer.size, error
        self.calls: list[int] = []
        self.threads: set[str] = set()

    def encode(self, text: str) -> list[int]:
        if "refused" in text:
            raise self.error("no such text")
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.calls.append(len(texts))
        self.threads.add(threading.current_thread().name)
        return super().encode_arrays(texts)


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for number, text in enumerate(texts):
            writer.write({"__key__": f"{number:04d}", "txt": text})
    return path


def files_of(folder: Path, shard: Path, tokenizer: TextTokenizer, num_threads: int = 1) -> dict[str, bytes]:
    config = TokenizeConfig(source="texts")
    ShardTokenizer(config, VOCABULARY, tokenizer, None, num_threads=num_threads).tokenize(shard, folder / "000000")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_bytes_do_not_depend_on_calls_and_threads(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_texts(tmp_path / "0.tar", TEXTS)
    usual = files_of(tmp_path / "usual", shard, tokenizer)
    lines = [json.loads(line) for line in usual["000000.quarantine.jsonl"].splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [("0003", "empty_text")]
    monkeypatch.setattr(tokenize_module, "_WINDOW_SAMPLES", 16)
    monkeypatch.setattr(batches, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(encoding_ahead, "TEXTS_AT_ONCE", 5)
    seen = Refusing(tokenizer)
    seen.fingerprint = tokenizer.fingerprint
    shard_of_good = write_texts(tmp_path / "0.tar", [text for text in TEXTS if "refused" not in text])
    good = files_of(tmp_path / "good", shard_of_good, tokenizer)
    assert files_of(tmp_path / "threads", shard_of_good, seen, num_threads=3) == good
    assert max(seen.calls) == 5
    assert len(seen.calls) >= 9
    assert all(name.startswith("encode") for name in seen.threads)
    seen.threads.clear()
    assert files_of(tmp_path / "no_threads", shard_of_good, seen) == good
    assert seen.threads == {threading.current_thread().name}


def test_a_text_that_the_tokenizer_refuses_is_its_samples_and_spoils_no_other(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    shard = write_texts(tmp_path / "0.tar", TEXTS)
    refusing = Refusing(tokenizer)
    files = files_of(tmp_path / "tokens", shard, refusing)
    lines = [json.loads(line) for line in files["000000.quarantine.jsonl"].splitlines()]
    refused = {"shard": "0.tar", "key": "0001", "reason": "unexpected_RuntimeError", "detail": "no such text"}
    assert refused in lines
    assert len(lines) == 1 + 1 + sum("refused" in text for text in TEXTS[5:])
    assert json.loads(files["000000.json"])["num_documents"] == len(TEXTS) - len(lines)
    with pytest.raises(UserError, match="no such text"):  # the user's mistake ends it, as ever
        files_of(tmp_path / "user", shard, Refusing(tokenizer, UserError))
    assert not list((tmp_path / "user").iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("encode", "decode"))]


@pytest.mark.parametrize("num_threads", [0, 1])
def test_only_the_text_itself_is_known(tokenizer: TextTokenizer, num_threads: int) -> None:
    seen = Refusing(tokenizer)
    ahead, threads = EncodingAhead(seen), Readers(num_threads, "encode")
    texts = [["hello world", "a text"], ["another text"]]
    for group, _ in zip(texts, ahead.ahead(texts, threads if num_threads else None), strict=True):
        assert all(ahead._known[id(text)][0] is text for text in group)
        for text in (*group, "some text that nobody announced"):
            assert ahead.encode_array(text).tolist() == tokenizer.encode(text)
    assert ahead._known == {}
    threads.close()


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=30))
def test_groups_hold_every_sample_once_and_as_much_as_a_call(sizes: list[list[int]]) -> None:
    texts = [["x" * size for size in one] for one in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_ahead, "TEXTS_AT_ONCE", 6)
        patch.setattr(encoding_ahead, "CHARACTERS_AT_ONCE", 20)
        counts = list(grouped(texts))
    assert sum(counts) == len(texts)
    first = 0
    for count in counts[:-1]:
        assert count > 0
        group = [text for one in texts[first : first + count] for text in one]
        without_last = [text for one in texts[first : first + count - 1] for text in one]
        assert len(group) >= 6 or len("".join(group)) >= 20
        assert len(without_last) < 6
        assert len("".join(without_last)) < 20
        first += count
