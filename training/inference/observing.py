"""An answer seen while it is made: text as it comes, pictures row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.documents.reading import grid_of_header
from data_pipeline.documents.tokenizers import TextTokenizer
from model.generation.ar import Decoder
from model.vocabulary import Vocabulary

MAX_HELD_TOKENS = 8  # of text whose bytes are no whole character yet


@dataclass(frozen=True)
class TextPiece:
    text: str


@dataclass(frozen=True)
class Rows:
    """What a picture has so far."""

    codes: np.ndarray  # int64 [finished rows, w]
    grid: tuple[int, int]  # rows and columns that it will have

    @property
    def is_whole(self) -> bool:
        return len(self.codes) == self.grid[0]


@dataclass(frozen=True)
class Refined:
    """A picture that is decoded as a whole, before one of its steps."""

    codes: np.ndarray  # int64 [h, w]
    step: int
    num_steps: int


Event = TextPiece | Rows | Refined


class Progress:
    """Reads the tokens of one answer, in order."""

    def __init__(self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer) -> None:
        self.vocabulary, self.text_tokenizer = vocabulary, text_tokenizer
        self.num_read = 0
        self._text: list[int] = []  # ids that are not told yet
        self._header: list[int] | None = None  # between BOI and IMG
        self._grid: tuple[int, int] | None = None  # of the open picture
        self._codes: list[int] = []

    def read(self, token: int) -> list[Event]:
        """What is new with one more token."""
        self.num_read += 1
        if self._grid is not None:
            return self._read_code(token, self._grid)
        if self._header is not None:
            if token == self.vocabulary.img:
                self._grid = grid_of_header(self._header, self.text_tokenizer)
                self._header, self._codes = None, []
            else:
                self._header.append(token)
            return []
        if token < self.vocabulary.text_size:
            self._text.append(token)
            return self._told(whole_characters=True)
        if token == self.vocabulary.boi:
            self._header = []
        return self._told(whole_characters=False)

    def end(self) -> list[Event]:
        """What was held back."""
        return self._told(whole_characters=False)

    def _read_code(self, token: int, grid: tuple[int, int]) -> list[Event]:
        if token == self.vocabulary.eoi:
            self._grid = None
        if not self.vocabulary.is_visual(np.int64(token)):
            return []
        self._codes.append(token - self.vocabulary.visual_start)
        if len(self._codes) % grid[1]:
            return []
        return [Rows(np.array(self._codes, np.int64).reshape(-1, grid[1]), grid)]

    def _told(self, *, whole_characters: bool) -> list[Event]:
        """The text that is held, unless it ends within a character and `whole_characters` are asked for."""
        if not self._text:
            return []
        text = self.text_tokenizer.decode(self._text)
        if whole_characters and text.endswith("\ufffd") and len(self._text) < MAX_HELD_TOKENS:
            return []
        self._text = []
        return [TextPiece(text)] if text else []


def codes_of_copy(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray | None:
    """int64 [h, w] of a noisy copy, from IMG to its last code; None while codes are masked."""
    body: np.ndarray = np.append(tokens[1:], vocabulary.eol)
    rows = body.reshape(-1, int(np.argmax(body == vocabulary.eol)) + 1)[:, :-1]
    return vocabulary.ids_to_codes(rows) if vocabulary.is_visual(rows).all() else None


class ObservedDecoder:
    """A decoder that counts its forward passes and shows the ids that go into it; all else is the decoder's own.

    `see` is given the ids of each step (of the conditional rows too: those that generation reads twice come last).
    """

    def __init__(self, decoder: Decoder, see: Callable[[Sequence[int]], None] | None = None) -> None:
        self.decoder, self.see = decoder, see
        self.num_forwards = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        self.num_forwards += 1
        return self.decoder.start(prompts, max_new_tokens)

    def step(
        self, ids: torch.Tensor, advances: torch.Tensor | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        self.num_forwards += 1
        if self.see is not None:
            for one in ids.view(len(ids), -1).unbind(1):
                self.see(one.tolist())
        return self.decoder.step(ids, advances, columns)
