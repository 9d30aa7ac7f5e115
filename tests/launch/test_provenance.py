"""From a text to the documents that hold it, to rows without them; evaluation prompts that stand in the data."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.documents.builder import DocumentBuilder, Picture, Text, document_id
from data_pipeline.documents.tokenizers import load_text_tokenizer, train_sentencepiece
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.packing.removed import read_removed
from data_pipeline.storage.format import read_manifest
from data_pipeline.storage.token_files import TokenFileWriter
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from launch.command_line import cli
from launch.inspection.contents import vocabulary_of
from launch.inspection.provenance import sequences
from launch.inspection.row_page import write_rows
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig

TEXTS = {
    "fox": "the quick brown fox jumps over the lazy dog",
    "cat": "a cat sleeps, and the Quick-Brown fox looks on",
    "chinese": "红色的圆在左边",
    "long": " ".join(f"word{number}" for number in range(60)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        for key, text in TEXTS.items():
            writer.write({"__key__": key, "txt": text})
    tokenizer = train_sentencepiece(
        [*TEXTS.values(), *dir(json), *dir(Path), *dir(pytest)] * 20, folder / "tokenizer", 400
    )
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=tokenizer.size, visual_size=64))
    ShardTokenizer(TokenizeConfig("notes"), vocabulary, tokenizer, None).tokenize(
        folder / "0.tar", folder / "tokens" / "000000"
    )
    pack({"notes": folder / "tokens"}, folder / "packed", PackConfig(sequence_length=64, window_rows=2))
    return folder


def look(capsys: pytest.CaptureFixture[str], world: Path, name: str, *asked: str) -> dict:
    tokenizer = f"text_tokenizer={world / 'tokenizer'}"
    assert cli.main(["inspect", str(world / name), tokenizer, *asked, "json=true"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["tokens", "packed"])
def test_documents_are_found_by_text_and_by_id(world, capsys, name):
    found = look(capsys, world, name, "contains=fox")["samples"]
    assert {place["document"] for place in found} == {document_id("notes", key, "0.tar") for key in ("fox", "cat")}
    assert {place["source"] for place in found} == {"notes"}
    assert all("fox" in place["text"] for place in found)
    (one,) = look(capsys, world, name, f"document={document_id('notes', 'chinese', '0.tar')}")["samples"]
    assert TEXTS["chinese"] in one["text"]
    assert look(capsys, world, name, "contains=elephant")["num_found"] == 0


def test_what_was_found_can_be_removed(world, capsys, tmp_path):
    lines = [json.dumps(place) for place in look(capsys, world, "packed", "contains=lazy")["samples"]]
    lines += ["", json.dumps({"source": "notes", "shard": "0.tar", "key": "long"}), json.dumps({"document": 7})]
    (tmp_path / "removed.jsonl").write_text("\n".join(lines))
    arguments = [f"tokens.notes={world / 'tokens'}", "sequence_length=64", "window_rows=2"]
    removed = f"removed={tmp_path / 'removed.jsonl'}"
    assert cli.main(["pack", *arguments, removed, f"target={tmp_path / 'packed'}", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["quarantined"] == {"removed": 2}
    (tmp_path / "tokenizer").symlink_to(world / "tokenizer")
    assert look(capsys, tmp_path, "packed", "contains=lazy")["num_found"] == 0
    assert look(capsys, tmp_path, "packed", "contains=cat")["num_found"] == 1
    # Rows of another list are never taken for finished ones.
    assert cli.main(["pack", *arguments, removed, f"target={world / 'packed'}"]) == 2
    assert "another configuration" in capsys.readouterr().err
    pack({"notes": world / "tokens"}, world / "packed", PackConfig(sequence_length=64, window_rows=2))


def test_prompts_that_stand_in_the_rows(world, capsys, tmp_path):
    prompts = [
        "The QUICK brown fox!",
        '{"prompt": "红色的圆"}',
        "the slow brown fox",
        "lazy dog jumps",
        "word7 word8 word9 word10 word11",
    ]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    answer = look(capsys, world, "packed", f"overlap={tmp_path / 'prompts.txt'}", "overlap_words=4")
    assert (answer["num_prompts"], answer["num_overlapping"]) == (5, 3)
    found = {hit["prompt"]: hit["num_documents"] for hit in answer["samples"]}
    assert found.pop("word7 word8 word9 word10 word11") >= 1
    assert found == {"The QUICK brown fox!": 1, "红色的圆": 1}


def test_word_sequences():
    assert list(sequences("A b, c-d", 3)) == [("a", "b", "c"), ("b", "c", "d")]
    assert list(sequences("红色 cat", 9)) == [("红", "色", "cat")]
    assert list(sequences("?!", 2)) == []


@pytest.mark.parametrize("line", ["7", "{", '{"document": -1}', '{"document": "7"}', '{"source": "a", "key": "b"}'])
def test_a_line_that_names_no_document_is_told(tmp_path, line):
    (tmp_path / "removed.jsonl").write_text(f'{{"document": 1}}\n{line}\n')
    with pytest.raises(UserError, match="names no document") as caught:
        read_removed(tmp_path / "removed.jsonl")
    assert caught.value.where.endswith("removed.jsonl:2")


class Painter:
    """Every code is one grey pixel."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes[..., None], 3, axis=-1).astype(np.uint8)


def test_rows_are_a_page_with_thumbnails_and_origins(world, tmp_path):
    tokenizer = load_text_tokenizer(world / "tokenizer")
    vocabulary = vocabulary_of(read_manifest(world / "tokens" / "000000"))
    builder = DocumentBuilder(vocabulary, tokenizer, "emu35")
    documents = [
        builder.interleaved(7, [Text("<b>a fox</b>"), Picture(np.array([[3, 60]]))]),
        builder.interleaved(8, [Text("another")]),
    ]
    described = {"kind": "tokens", "num_documents": 2, "sources": ["pairs"], "vocabulary": vocabulary.describe()}
    with TokenFileWriter(tmp_path / "000000") as writer:
        for document in documents:
            writer.add(document.tokens, document.segments)
        writer.finish(described)
    page = tmp_path / "page.html"
    answer = write_rows([tmp_path / "000000"], 0, 5, page, tokenizer, Painter())
    assert (answer["num_shown"], answer["num_rows"]) == (2, 2)
    shown = page.read_text()
    assert "pairs, document 7" in shown
    assert "pairs, document 8" in shown
    assert "&lt;b&gt;a fox&lt;/b&gt;" in shown
    (data,) = re.findall(r"data:image/png;base64,([^\"]+)", shown)
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 0].tolist() == [[3, 60]]
    write_rows([tmp_path / "000000"], 1, 1, page, tokenizer, None)
    assert "document 7" not in page.read_text()
    assert "document 8" in page.read_text()
    with pytest.raises(UserError, match="no such row"):
        write_rows([tmp_path / "000000"], 2, 1, page, tokenizer, None)


def test_the_command_writes_a_page_of_packed_rows(world, capsys, tmp_path):
    answer = look(capsys, world, "packed", f"page={tmp_path / 'rows.html'}", "num_samples=1", "first=1")
    assert (answer["num_shown"], answer["first"]) == (1, 1)
    assert "notes, document" in (tmp_path / "rows.html").read_text()


def test_prompts_that_are_no_text_are_one_message(tmp_path):
    from launch.inspection.provenance import read_prompts

    (tmp_path / "prompts.txt").write_bytes(b"\xdf\x00")
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_prompts(tmp_path / "prompts.txt")
