"""Tokens back to what they say: image blocks to codes, documents to readable text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.documents.tokenizers import TextTokenizer
from model.vocabulary import Vocabulary

_GRID = re.compile(r"([1-9]\d{0,3})\*([1-9]\d{0,3})")


class MalformedImageError(ValueError):
    """Tokens that begin with BOI and do not go on as an image block."""


@dataclass(frozen=True)
class ImageBlock:
    codes: np.ndarray  # int64 [h, w]
    num_tokens: int  # BOI to EOI

    @property
    def grid(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]


@dataclass(frozen=True)
class StructureToken:
    name: str


Item = str | ImageBlock | StructureToken


def parse_image_block(
    tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary, text_tokenizer: TextTokenizer
) -> ImageBlock:
    """The image block that `tokens` begins with, in either format; more may follow it.

    Raises `MalformedImageError` saying what is not as it should be.
    """
    ids = np.asarray(tokens, np.int64)
    if not len(ids) or ids[0] != vocabulary.boi:
        raise MalformedImageError("does not begin with BOI")
    marks = np.flatnonzero(ids[:16] == vocabulary.img)
    if not len(marks):
        raise MalformedImageError("no IMG after the size")
    head = ids[1 : marks[0]]
    if (head >= vocabulary.text_size).any():
        raise MalformedImageError("the size is not text")
    height, width = grid_of_header(head.tolist(), text_tokenizer)
    start = int(marks[0]) + 1
    num_body = height * (width + 1) - 1
    body = ids[start : start + num_body]
    if len(body) < num_body:
        raise MalformedImageError(f"ends after {len(body)} of {num_body} tokens of {height}*{width}")
    rows = np.append(body, vocabulary.eol).reshape(height, width + 1)
    if (rows[:, width] != vocabulary.eol).any() or not vocabulary.is_visual(rows[:, :width]).all():
        raise MalformedImageError(f"rows of {height}*{width} are not codes with EOL between")
    tail = ids[start + num_body : start + num_body + 3].tolist()
    for ending in ([vocabulary.eoi], [vocabulary.eol, vocabulary.eof, vocabulary.eoi]):
        if tail[: len(ending)] == ending:
            codes = vocabulary.ids_to_codes(rows[:, :width])
            return ImageBlock(codes, start + num_body + len(ending))
    raise MalformedImageError("no EOI after the last row")


def grid_of_header(ids: Sequence[int], text_tokenizer: TextTokenizer) -> tuple[int, int]:
    """(height, width) that the text between BOI and IMG says. Raises `MalformedImageError`."""
    text = text_tokenizer.decode(list(ids))
    match = _GRID.fullmatch(text)
    if match is None:
        raise MalformedImageError(f"not a size: {text!r}")
    return int(match[1]), int(match[2])


def read_items(tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> list[Item]:
    """Structure tokens, texts and image blocks in order. Never fails: what cannot be read as an
    image block stands as its single tokens, an id without meaning as `?id`."""
    ids = np.asarray(tokens, np.int64)
    names = {index: name for name, index in vocabulary.structure.items()}
    items: list[Item] = []
    position = 0
    while position < len(ids):
        if ids[position] == vocabulary.boi:
            try:
                block = parse_image_block(ids[position:], vocabulary, text_tokenizer)
            except MalformedImageError:
                items.append(StructureToken("boi"))
                position += 1
            else:
                items.append(block)
                position += block.num_tokens
        elif 0 <= ids[position] < text_tokenizer.size:
            others = np.flatnonzero((ids[position:] < 0) | (ids[position:] >= text_tokenizer.size))
            end = position + int(others[0]) if len(others) else len(ids)
            items.append(text_tokenizer.decode(ids[position:end].tolist()))
            position = end
        else:
            index = int(ids[position])
            code = f"code {index - vocabulary.visual_start}"
            unnamed = code if vocabulary.is_visual(index) else f"?{index}"
            items.append(StructureToken(names.get(index, unnamed)))
            position += 1
    return items


def split_parts(
    tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary, text_tokenizer: TextTokenizer
) -> list[np.ndarray]:
    """Text ids [n] and whole images as codes [h, w], in order. Other structure is left out.

    So is an image that is cut short or malformed, to its EOI or to the end.
    """
    ids = np.asarray(tokens, np.int64)
    parts: list[np.ndarray] = []
    position = 0
    while position < len(ids):
        starts = np.flatnonzero(ids[position:] == vocabulary.boi)
        start = position + int(starts[0]) if len(starts) else len(ids)
        text = ids[position:start]
        parts.append(text[text < vocabulary.text_size])
        position = start
        if start < len(ids):
            try:
                block = parse_image_block(ids[start:], vocabulary, text_tokenizer)
            except MalformedImageError:
                ends = np.flatnonzero(ids[start:] == vocabulary.eoi)
                position = start + int(ends[0]) + 1 if len(ends) else len(ids)
            else:
                parts.append(block.codes)
                position += block.num_tokens
    return [part for part in parts if part.size]


def describe(tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> str:
    """One readable line: `<bos> a red circle <image 6*6> <eos>`."""
    words = []
    for item in read_items(tokens, vocabulary, text_tokenizer):
        if isinstance(item, ImageBlock):
            words.append(f"<image {item.grid[0]}*{item.grid[1]}>")
        elif isinstance(item, StructureToken):
            words.append(f"<{item.name}>")
        else:
            words.append(item.strip())
    return " ".join(words)
