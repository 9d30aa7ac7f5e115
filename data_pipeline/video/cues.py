"""Cues of subtitle files, as FFmpeg (WebVTT, SRT) and pysubs2 (ASS, SSA, TTML) read them, and a check that nothing is lost.

Both libraries pass over what they cannot read without a word. So every line of times must have become a cue, and every line
of text must stand in one; else the file is refused.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import av

from data_pipeline.sources.samples import SampleError

_DEMUXERS = {"vtt": "webvtt", "srt": "srt"}
_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,9}))?")
_NO_CUES = ("WEBVTT", "NOTE", "STYLE", "REGION")  # what blocks of WebVTT without text begin with
_EVENTS = {"ass": re.compile(r"^Dialogue:", re.MULTILINE), "ttml": re.compile(r"<(?:\w+:)?p[\s>]")}
_DRAWING_TAG = re.compile(r"\\p[0-9]|\\r(?![a-zA-Z_0-9 ])")
_CUT_EVENT = re.compile(r"^Dialogue:(?!(?:[^,\n]*,){9}).*", re.MULTILINE)


@dataclass
class Cue:
    start: float  # seconds
    end: float
    lines: list[str]  # with their markup


def read_cues(extension: str, text: str) -> list[Cue]:
    """The cues of a file in order of time. Raises `SampleError`, and what the libraries raise."""
    return _by_ffmpeg(extension, text) if extension in _DEMUXERS else _by_pysubs2(extension, text)


def _by_ffmpeg(extension: str, text: str) -> list[Cue]:
    lines = [_canonical_times(line, extension) or line for line in text.split("\n")]
    _check_lines_of_times(extension, lines)
    data = io.BytesIO("\n".join(lines).encode())
    # Text only: nothing is decoded, and nothing else is opened.
    with av.open(
        data, mode="r", format=_DEMUXERS[extension], container_options={"protocol_whitelist": ""}
    ) as container:
        stream = container.streams.subtitles[0]
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        unit = float(stream.time_base or 0)
        cues = [
            Cue(packet.pts * unit, (packet.pts + (packet.duration or 0)) * unit, bytes(packet).decode().split("\n"))
            for packet in packets
            if packet.pts is not None
        ]
    num_times = len({line[: line.index("-->") + 16] for line in lines if _canonical_times(line, extension)})
    if len(cues) < num_times:
        raise SampleError("bad_transcript", f"{len(cues)} of {num_times} cues can be read")
    kept = {line.strip() for cue in cues for line in cue.lines}
    for line in _lines_of_text(extension, lines):
        if line.strip() not in kept:
            raise SampleError("bad_transcript", f"a line would be lost: {line[:80]!r}")
    return cues


def _canonical_times(line: str, extension: str) -> str | None:
    """A line of times as the standards write it, None for another line: people leave hours, blanks and digits out."""
    left, arrow, right = line.partition("-->")
    end, _, rest = right.strip().partition(" ")
    clocks = [_CLOCK.fullmatch(clock) for clock in (left.strip(), end)] if arrow else [None]
    if not all(clocks):
        return None
    written = []
    for match in clocks:
        assert match is not None
        hours, minutes, seconds, fraction = match.groups(default="0")
        point = "," if extension == "srt" else "."
        written.append(f"{int(hours):02}:{int(minutes):02}:{int(seconds):02}{point}{fraction:0<3.3}")
    return f"{written[0]} --> {written[1]} {rest}".rstrip()


def _check_lines_of_times(extension: str, lines: Sequence[str]) -> None:
    """An arrow where a cue begins must be one of times; a number inside of a cue must not look like a cue's."""
    number = 0
    for position, line in enumerate(lines):
        before, following = (lines[at] if 0 <= at < len(lines) else "" for at in (position - 1, position + 1))
        begins = not before or (before.strip().isdecimal() and (position < 2 or not lines[position - 2]))
        if "-->" in line and _canonical_times(line, extension) is None and (begins or extension == "vtt"):
            raise SampleError("bad_transcript", f"not a line of times: {line[:80]!r}")
        if line.strip().isdecimal() and _canonical_times(following, extension):
            value = int(line.strip()[:9])
            if extension == "srt" and before and position and value != number + 1:
                raise SampleError("bad_transcript", f"a number or the last line of a cue: {line[:80]!r}")
            number = value


def _lines_of_text(extension: str, lines: Sequence[str]) -> list[str]:
    """What must stand in a cue: all behind the first line of times, but numbers and names of cues, notes, styles."""
    texts: list[str] = []
    in_cue = started = False  # was there no empty line since the times? any times yet?
    for position, line in enumerate(lines):
        following = lines[position + 1] if position + 1 < len(lines) else ""
        if _canonical_times(line, extension):
            in_cue = started = True
        elif not line:
            in_cue = in_cue and extension == "srt"
        elif _canonical_times(following, extension) and (not in_cue or line.strip().isdecimal()):
            continue  # the next cue's number or name
        elif started and line.strip() and in_cue and not (extension == "vtt" and line.startswith(_NO_CUES)):
            texts.append(line)
    return texts


def _by_pysubs2(extension: str, text: str) -> list[Cue]:
    import pysubs2

    if "<!" in text.replace("<!--", ""):  # entities that grow; no subtitle file has any
        raise SampleError("bad_transcript", "a document type")
    if (cut := _CUT_EVENT.search(text)) and extension != "ttml":
        raise SampleError("bad_transcript", f"an event with too few fields: {cut[0][:80]!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # it makes 0 of a time that is none
            file = pysubs2.SSAFile.from_string(text, format_=extension)
    except (pysubs2.exceptions.Pysubs2Error, RuntimeWarning, SyntaxError, NotImplementedError) as error:
        # ElementTree's errors are SyntaxErrors.
        raise SampleError("bad_transcript", f"{type(error).__name__}: {error}") from error
    events = [event for event in file if not event.is_comment]
    expected = len(_EVENTS.get(extension, _EVENTS["ass"]).findall(text))
    if len(events) != expected:
        raise SampleError("bad_transcript", f"{len(events)} of {expected} cues can be read")
    cues = []
    for event in events:
        plain, overrides = _split_overrides(event.text)
        if not _draws(overrides):
            lines = [html.escape(line, quote=False) for line in _plain_lines(plain)]
            cues.append(Cue(event.start / 1000, event.end / 1000, lines))
    return cues


def _plain_lines(text: str) -> list[str]:
    return text.replace(r"\h", " ").replace(r"\n", "\n").replace(r"\N", "\n").split("\n")


def _split_overrides(text: str) -> tuple[str, list[str]]:
    """The text of an event without its `{...}`, and these. pysubs2's own pattern takes the square of the length."""
    pieces, overrides, position = [], [], 0
    while (start := text.find("{", position)) >= 0 and (end := text.find("}", start)) >= 0:
        pieces.append(text[position:start])
        overrides.append(text[start + 1 : end])
        position = end + 1
    return "".join([*pieces, text[position:]]), overrides


def _draws(overrides: Sequence[str]) -> bool:
    """Is any of the text a drawing (behind `\\p1`, before `\\p0` or `\\r`), as pysubs2's `is_drawing` has it?"""
    drawing = False
    for override in overrides:
        for tag in _DRAWING_TAG.findall(override):
            drawing = tag.startswith(r"\p") and tag != r"\p0"
        if drawing:
            return True
    return False
