"""Transcripts: word-timed JSON, WebVTT and SRT; their text laid between the key frames."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.sources.samples import SampleError

_CUE_TIMES = re.compile(r"(\S+)\s+-->\s+(\S+)")
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")
# Scripts written without spaces: kana, CJK ideographs and their punctuation, full-width forms.
_UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef]")
_WORDS = re.compile(rf"{_UNSPACED.pattern}|(?:(?!{_UNSPACED.pattern})\S)+")


@dataclass(frozen=True)
class Word:
    text: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Speech:
    """What is said between two key frames. `time_seconds` is the first word's."""

    text: str
    time_seconds: float


def parse_transcript(extension: str, text: str) -> list[Word]:
    """Words in order of time. `extension` is `words.json`, `vtt` or `srt`.

    A subtitle has one time for many words: they are spread over it by their length, so that a key
    frame in its middle splits it. Raises `SampleError("bad_transcript")`.
    """
    words = _parse_words(text) if extension == "words.json" else _parse_cues(text)
    if not words:
        raise SampleError("bad_transcript", "no words")
    return sorted(words, key=lambda word: word.start_seconds)


def _parse_words(text: str) -> list[Word]:
    try:
        entries = json.loads(text)
        words = [Word(str(entry["word"]), float(entry["start"]), float(entry["end"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise SampleError("bad_transcript", f"{type(error).__name__}: {error}") from error
    for word in words:
        if not (math.isfinite(word.start_seconds) and math.isfinite(word.end_seconds)):
            raise SampleError("bad_transcript", f"time of {word.text!r} is not finite")
    return [word for word in words if word.text.strip()]


def _parse_cues(text: str) -> list[Word]:
    """WebVTT and SRT alike: blocks of lines, in each a line of times and the text after it."""
    words: list[Word] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().split("\n")
        numbered = ((number, _CUE_TIMES.match(line)) for number, line in enumerate(lines))
        found = next(((number, match) for number, match in numbered if match), None)
        if found is None:  # the WEBVTT header, NOTE, STYLE
            continue
        number, match = found
        start, end = _clock_seconds(match[1]), _clock_seconds(match[2])
        spoken = html.unescape(_MARKUP.sub("", " ".join(lines[number + 1 :])))
        words.extend(_spread(spoken, start, max(start, end)))
    return words


def _clock_seconds(clock: str) -> float:
    match = _CLOCK.fullmatch(clock)
    if match is None:
        raise SampleError("bad_transcript", f"not a time: {clock!r}")
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def _spread(text: str, start: float, end: float) -> list[Word]:
    """Words of a subtitle, each given a share of its time in proportion to its characters."""
    words = _WORDS.findall(text)
    total = sum(map(len, words))
    result, done = [], 0
    for word in words:
        begin = start + (end - start) * done / total
        done += len(word)
        result.append(Word(word, begin, start + (end - start) * done / total))
    return result


def join_words(words: Sequence[Word]) -> str:
    """The words as running text. Words that bring their own spaces (Whisper's do) keep them."""
    texts = [word.text for word in words]
    if any(text[:1].isspace() or text[-1:].isspace() for text in texts):
        return " ".join("".join(texts).split())
    joined = ""
    for text in texts:
        unspaced = not joined or (_UNSPACED.match(text) and _UNSPACED.match(joined[-1]))
        joined += text if unspaced else f" {text}"
    return joined


def interleave(words: Sequence[Word], frame_times: Sequence[float]) -> list[Speech | int]:
    """Speech and frame numbers in order of time: what begins before a frame stands before it.

    Frame number i appears exactly once; speech between two frames is one `Speech`.
    """
    items: list[Speech | int] = []
    position = 0
    for number, frame_time in enumerate([*frame_times, math.inf]):
        begin = position
        while position < len(words) and words[position].start_seconds < frame_time:
            position += 1
        if position > begin:
            spoken = words[begin:position]
            items.append(Speech(join_words(spoken), spoken[0].start_seconds))
        if number < len(frame_times):
            items.append(number)
    return items
