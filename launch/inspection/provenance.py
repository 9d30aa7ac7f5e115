"""Which documents of token or packed files hold a text, have an id, or share word sequences with evaluation prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.documents.tokenizers import TextTokenizer
from data_pipeline.documents.words import WORD
from data_pipeline.storage.format import read_manifest
from data_pipeline.storage.packed_files import check_listed_shard
from data_pipeline.storage.segments import Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader
from model.errors import UserError

_EXCERPT_CHARACTERS = 200


class Place(NamedTuple):
    """A document, or the piece of one that a row holds."""

    document: int  # its id
    source: str
    file: str
    number: int  # of the document in a token file, of the row in a packed one
    start: int  # first token
    num_tokens: int
    tokens: np.ndarray  # int32 [num_tokens]
    segments: np.ndarray  # SEGMENT_DTYPE, starts counted from the row

    def text(self, tokenizer: TextTokenizer) -> str:
        """What is written in it, its parts one a line."""
        written = self.segments[np.isin(self.segments["kind"], (Kind.TEXT, Kind.TRANSCRIPT))]
        spans = (self.tokens[int(one["start"]) - self.start :][: int(one["length"])] for one in written)
        return "\n".join(
            tokenizer.decode([token for token in span.tolist() if token < tokenizer.size]) for span in spans
        )

    def describe(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._fields[:6]}


def places(prefixes: list[Path]) -> Iterator[Place]:
    """Every document of the token or packed files, in their order; all that is read is verified."""
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        check_listed_shard(prefix, manifest)
        reader = TokenFileReader(prefix)
        for index in range(len(reader)):
            yield from places_of(prefix, manifest, reader, index)


def places_of(prefix: Path, manifest: dict[str, Any], reader: TokenFileReader, index: int) -> Iterator[Place]:
    """What one row, or one document of a token file, holds."""
    tokens, segments = reader.tokens(index), reader.segments(index)
    segments = segments[segments["kind"] != Kind.PAD]
    starts = np.flatnonzero((segments["flags"] & Flag.DOCUMENT_START) != 0).tolist()
    for first, end in zip(starts, [*starts[1:], len(segments)], strict=True):
        part = segments[first:end]
        start, length = int(part["start"][0]), int(part["length"].sum())
        source = manifest["sources"][int(part["source"][0])]
        span = tokens[start : start + length]
        yield Place(int(part["document"][0]), source, prefix.name, index, start, length, span, part)


def find_documents(
    prefixes: list[Path], tokenizer: TextTokenizer | None, contains: str | None, document: int | None
) -> dict[str, Any]:
    """Documents that hold the text `contains` or have the id `document`; each is a line for `nextstate pack removed=`."""
    found = []
    for place in places(prefixes):
        text = place.text(tokenizer) if tokenizer is not None else ""
        if place.document == document or (contains is not None and contains in text):
            at = max(0, text.find(contains or "") - _EXCERPT_CHARACTERS // 2)
            found.append(place.describe() | {"text": text[at : at + _EXCERPT_CHARACTERS]})
    return {"kind": "documents", "num_found": len(found), "samples": found}


def find_overlap(prefixes: list[Path], tokenizer: TextTokenizer, prompts: Path, num_words: int) -> dict[str, Any]:
    """Prompts of which `num_words` words in a row, or all words of a shorter one, stand in some document.

    Words are compared in lower case and without punctuation; every character of Chinese, Japanese and Thai is a word.
    """
    asked = read_prompts(prompts)
    wanted: dict[tuple[str, ...], list[int]] = {}
    for number, prompt in enumerate(asked):
        for words in sequences(prompt, num_words):
            wanted.setdefault(words, []).append(number)
    lengths = sorted({len(words) for words in wanted})
    hits: dict[int, dict[str, Any]] = {}
    for place in places(prefixes):
        text = place.text(tokenizer)
        for length in lengths:
            for words in sequences(text, length):
                for number in wanted.get(words, ()):
                    hit = hits.setdefault(
                        number, {"prompt": asked[number], "num_documents": 0, "words": " ".join(words)}
                    )
                    if hit.get("last") != place[:5]:
                        hit["last"] = place[:5]
                        hit["num_documents"] += 1
                        hit.setdefault("first_document", place.describe())
    for hit in hits.values():
        del hit["last"]
    return {
        "kind": "overlap",
        "num_prompts": len(asked),
        "num_overlapping": len(hits),
        "words_in_a_row": num_words,
        "samples": [hits[number] for number in sorted(hits)],
    }


def sequences(text: str, num_words: int) -> Iterator[tuple[str, ...]]:
    """Every `num_words` words in a row; all words where there are fewer."""
    words = WORD.findall(text.lower())
    for first in range(max(1, len(words) - num_words + 1)):
        if words:
            yield tuple(words[first : first + num_words])


def read_prompts(path: Path) -> list[str]:
    """One prompt a line: text, or a JSON object with a `prompt`."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError("the file of prompts is no text in UTF-8", where=str(path), got=str(error)) from error
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("{"):
            try:
                prompts.append(str(json.loads(line)["prompt"]))
            except (ValueError, KeyError, RecursionError) as error:
                raise UserError(
                    "a line holds no prompt",
                    where=f"{path}:{number}",
                    expected='text, or {"prompt": "..."}',
                    got=line[:200],
                ) from error
        elif line.strip():
            prompts.append(line.strip())
    if not prompts:
        raise UserError("there is no prompt", where=str(path))
    return prompts
