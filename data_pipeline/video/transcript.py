"""Transcripts: word-timed JSON and subtitles; their text laid between the key frames."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipeline.sources.samples import SampleError
from data_pipeline.video.cues import Cue, read_cues

MAX_CHARACTERS = 20_000_000  # of a transcript file
ECHO_SECONDS = 0.05  # rolling captions show a finished line once more for 10 ms
_CONTIGUOUS_SECONDS = 0.5  # between two cues of rolling captions

_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2}(?:\.\d{1,9})?)")  # of WebVTT, inside of a cue
# No character stands in two repeats at once: the time is that of one pass, whatever the text.
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")
_INNER_TIME = re.compile(r"<([0-9:.]+)>")
# Scripts written without spaces: kana, CJK ideographs and their punctuation, full-width forms.
_UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef]")
_WORDS = re.compile(rf"\s*(?:{_UNSPACED.pattern}|(?:(?!{_UNSPACED.pattern})\S)+)")


@dataclass(frozen=True)
class Word:
    text: str
    start_seconds: float
    end_seconds: float
    own_spaces: bool = field(default=False, compare=False)  # is the text joined to the one before as it is?


@dataclass(frozen=True)
class Speech:
    """What is said between two key frames. `time_seconds` is the first word's."""

    text: str
    time_seconds: float


def parse_transcript(extension: str, text: str) -> list[Word]:
    """Words in order of time. `extension` is one of `TRANSCRIPT_EXTENSIONS`.

    A subtitle has one time for many words: they are spread over it by their length, so that a key
    frame in its middle splits it. Raises `SampleError`: `bad_transcript`, `corrupt_text`.
    """
    if len(text) > MAX_CHARACTERS:
        raise SampleError("bad_transcript", f"{len(text):,} characters, more than {MAX_CHARACTERS:,}")
    try:
        words = _parse_words(text) if extension == "words.json" else _parse_cues(extension, text)
        for word in words:
            word.text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("corrupt_text", str(error)) from error
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, AttributeError) as error:
        raise SampleError("bad_transcript", f"{type(error).__name__}: {error}") from error
    if not words:
        raise SampleError("bad_transcript", "no words")
    return words


def _parse_words(text: str) -> list[Word]:
    """A list of `{"word", "start", "end"}`, or Whisper's and WhisperX's `{"segments": [{"words": [...]}]}`.

    Other tools of the family say `text` for `word`.

    Words without times (WhisperX cannot align numerals) have them from their neighbours.
    """
    entries = json.loads(text)
    if isinstance(entries, dict):
        entries = [word for segment in entries["segments"] for word in _words_of_segment(segment)]
    timed = [(str(_said(entry)), _time(entry, "start"), _time(entry, "end")) for entry in entries]
    timed = [entry for entry in timed if entry[0].strip()]
    if timed and all(start is None for _, start, _ in timed):
        raise SampleError("bad_transcript", "no word has a time")
    own_spaces = any(text[:1].isspace() or text[-1:].isspace() for text, _, _ in timed)
    words: list[Word] = []
    later = _next_times([start for _, start, _ in timed])
    for (word, start, end), following in zip(timed, later, strict=True):
        known = [time for time in (words[-1].end_seconds if words else None, following) if time is not None]
        begin = start if start is not None else min(known)
        finish = end if end is not None else begin
        words.append(Word(word, begin, max(begin, finish), own_spaces))
    return sorted(words, key=lambda word: word.start_seconds)


def _words_of_segment(segment: dict[str, Any]) -> list[dict[str, Any]]:
    if segment.get("words"):
        return list(segment["words"])
    return [{"word": segment["text"], "start": segment.get("start"), "end": segment.get("end")}]


def _said(entry: dict[str, Any]) -> Any:
    return entry["word"] if "word" in entry else entry["text"]


def _time(entry: dict[str, Any], name: str) -> float | None:
    """Seconds, None where the entry has no such time."""
    if entry.get(name) is None:
        return None
    seconds = float(entry[name])
    if not math.isfinite(seconds):
        raise SampleError("bad_transcript", f"time of {_said(entry)!r} is not finite")
    return seconds


def _next_times(starts: list[float | None]) -> list[float | None]:
    """For each word the start of the next word, from itself on, that has one."""
    found: list[float | None] = []
    following: float | None = None
    for start in reversed(starts):
        following = start if start is not None else following
        found.append(following)
    return found[::-1]


def _parse_cues(extension: str, text: str) -> list[Word]:
    cues = sorted(read_cues(extension, text), key=lambda cue: cue.start)
    cues = _without_repeats(cues)
    words: list[Word] = []
    for number, cue in enumerate(cues):
        # Where the next cue begins before this one ends, this one is said first: cues are never mixed word by word.
        following = cues[number + 1].start if number + 1 < len(cues) else math.inf
        said = _spread(cue.lines, cue.start, max(cue.start, min(cue.end, following)))
        if words and said and not _glued(words[-1].text, said[0].text):
            said[0] = replace(said[0], text=f" {said[0].text}")
        words.extend(said)
    # Inner time stamps may be anything; speech stays in order of its cues.
    ordered: list[Word] = []
    for word in words:
        start = max(word.start_seconds, ordered[-1].start_seconds if ordered else word.start_seconds)
        ordered.append(replace(word, start_seconds=start, end_seconds=max(start, word.end_seconds)))
    return ordered


def _clock_seconds(match: re.Match[str]) -> float:
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def _plain(line: str) -> str:
    return html.unescape(_MARKUP.sub("", line)).strip()


def _without_repeats(cues: list[Cue]) -> list[Cue]:
    """Rolling captions say each line once: not the lines that stay on display, nor echoes.

    A track rolls when it has echoes (a cue of `ECHO_SECONDS` at most that repeats the one before), or when most of its
    cues with several lines begin with the last lines of the cue before. In other tracks a repeated line was said twice.
    """
    texts = [[text for line in cue.lines if (text := _plain(line))] for cue in cues]
    repeats = [0] * len(cues)
    num_echoes = num_rolling = num_several = 0
    for number in range(1, len(cues)):
        if cues[number].start - cues[number - 1].end > _CONTIGUOUS_SECONDS:
            continue
        before, lines = texts[number - 1], texts[number]
        repeats[number] = _overlap(before, lines)
        is_echo = cues[number].end - cues[number].start <= ECHO_SECONDS
        num_echoes += bool(lines) and repeats[number] == len(lines) and is_echo
        num_several += len(lines) > 1
        num_rolling += 0 < repeats[number] < len(lines)
    rolls = num_echoes > 0 or (num_rolling >= 2 and 2 * num_rolling > num_several)
    if not rolls:
        return cues
    kept = []
    for cue, repeated in zip(cues, repeats, strict=True):
        lines = [line for line in cue.lines if _plain(line)][repeated:]
        if lines:
            kept.append(Cue(cue.start, cue.end, lines))
    return kept


def _overlap(before: list[str], lines: list[str]) -> int:
    """The most lines that `before` ends and `lines` begins with; two or three lines stand on a screen."""
    longest = min(len(before), len(lines), 8)
    return next((count for count in range(longest, 0, -1) if before[-count:] == lines[:count]), 0)


def _spread(lines: list[str], start: float, end: float) -> list[Word]:
    """Words of a subtitle with the spaces before them, each given a share of its time in proportion to its characters.

    Time stamps inside the text (`<00:00:01.200>`) divide the time between them.
    """
    spans: list[tuple[float, list[str]]] = [(start, [])]  # time from which on, pieces of text
    last = ""  # character of the text so far
    for line in lines:
        pieces = _INNER_TIME.split(line)
        text = html.unescape(_MARKUP.sub("", pieces[0])).strip()
        spans[-1][1].append(text if not text or not last or _glued(last, text) else f" {text}")
        last = text[-1:] or last
        for clock, inner in zip(pieces[1::2], pieces[2::2], strict=True):
            match = _CLOCK.fullmatch(clock)
            time = min(end, max(spans[-1][0], _clock_seconds(match))) if match else spans[-1][0]
            spans.append((time, [html.unescape(_MARKUP.sub("", inner))]))
            last = spans[-1][1][0][-1:] or last
    words: list[Word] = []
    for (begin, texts), finish in zip(spans, [*(span[0] for span in spans[1:]), end], strict=True):
        found = _WORDS.findall("".join(texts))
        total = sum(len(word.strip()) for word in found)
        done = 0
        for word in found:
            since = begin + (finish - begin) * done / total
            done += len(word.strip())
            words.append(Word(word, since, begin + (finish - begin) * done / total, own_spaces=True))
    if words:
        words[0] = replace(words[0], text=words[0].text.lstrip())
    return words


def _glued(before: str, after: str) -> bool:
    """Does the script have no space between the two? (Or is one there already?)"""
    if before[-1:].isspace() or after[:1].isspace():
        return True
    return bool(_UNSPACED.match(before[-1:]) and _UNSPACED.match(after))


def join_words(words: Sequence[Word]) -> str:
    """The words as running text. Words that bring their own spaces (Whisper's, those of cues) keep them."""
    joined: list[str] = []
    last = ""
    for word in words:
        glued = word.own_spaces or not last or (_UNSPACED.match(word.text) and _UNSPACED.match(last))
        joined.append(word.text if glued else f" {word.text}")
        last = word.text[-1:]
    return "".join(joined).strip()


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
