"""Transcripts: formats, and where their text stands between key frames."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources import SampleError
from data_pipeline.video.transcript import Speech, Word, interleave, join_words, parse_transcript

VTT = """WEBVTT - a title

NOTE nothing to see

intro
00:01.000 --> 00:03.000 align:start
<v Anna>Hello <b>there</b></v>

01:00:02.500 --> 01:00:04.500
fish &amp; chips
on two lines
"""
SRT = "1\n00:00:01,000 --> 00:00:03,000\nHello there\n\n2\n00:00:03,500 --> 00:00:04,000\n<i>again</i>\n"


def test_word_timed_json() -> None:
    text = json.dumps(
        [
            {"word": " world", "start": 1.5, "end": 2.0},
            {"word": " Hello", "start": 1.0, "end": 1.5, "probability": 0.9},
            {"word": " ", "start": 3.0, "end": 3.0},
        ]
    )
    words = parse_transcript("words.json", text)
    assert words == [Word(" Hello", 1.0, 1.5), Word(" world", 1.5, 2.0)]
    assert join_words(words) == "Hello world"


def test_webvtt() -> None:
    words = parse_transcript("vtt", VTT)
    assert [word.text for word in words] == ["Hello", " there", " fish", " &", " chips", " on", " two", " lines"]
    assert words[0].start_seconds == 1.0
    assert words[1] == Word(" there", 2.0, 3.0)
    assert words[2].start_seconds == 3602.5
    assert words[-1].end_seconds == 3604.5


def test_srt() -> None:
    words = parse_transcript("srt", SRT)
    assert [word.text for word in words] == ["Hello", " there", " again"]
    assert words[-1] == Word(" again", 3.5, 4.0)


def test_a_subtitle_in_chinese_is_split_between_characters() -> None:
    words = parse_transcript("srt", "00:00:00,000 --> 00:00:04,000\n红色的圆 circle\n")
    assert [word.text for word in words] == ["红", "色", "的", "圆", " circle"]
    assert interleave(words, [1.0]) == [Speech("红色的", 0.0), 0, Speech("圆 circle", 1.2)]


@pytest.mark.parametrize(
    ("extension", "text"),
    [
        ("words.json", "{not json"),
        ("words.json", "[]"),
        ("words.json", '[{"word": "a"}]'),
        ("words.json", '[{"word": "a", "start": "x", "end": 1}]'),
        ("words.json", '[{"word": "a", "start": NaN, "end": 1}]'),
        ("words.json", "[1, 2]"),
        ("words.json", '{"a": 1}'),
        ("vtt", "WEBVTT\n\n"),
        ("vtt", "WEBVTT\n\nsoon --> later\ntext\n"),
        ("srt", "no times here"),
    ],
)
def test_bad_transcripts_are_named(extension: str, text: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_transcript(extension, text)
    assert caught.value.reason == "bad_transcript"


def test_text_stands_before_the_frame_it_precedes() -> None:
    words = [Word("one", 0.1, 0.4), Word("two", 0.9, 1.3), Word("three", 1.0, 1.5), Word("four", 5, 6)]
    assert interleave(words, [1.0, 2.0, 3.0]) == [
        Speech("one two", 0.1),
        0,
        Speech("three", 1.0),
        1,
        2,
        Speech("four", 5),
    ]


@given(
    starts=st.lists(st.integers(0, 40), max_size=20).map(sorted),
    frames=st.lists(st.integers(0, 40), max_size=10, unique=True).map(sorted),
)
def test_interleaving_against_a_plain_sort(starts: list[int], frames: list[int]) -> None:
    words = [Word(f"w{number}", start, start) for number, start in enumerate(starts)]
    # At equal times the frame comes first.
    events = sorted(
        [(time, 0, f"frame{number}") for number, time in enumerate(frames)]
        + [(word.start_seconds, 1, word.text) for word in words],
        key=lambda event: event[:2],
    )
    flat: list[str] = []
    for item in interleave(words, frames):
        flat += item.text.split() if isinstance(item, Speech) else [f"frame{item}"]
    assert flat == [name for _, _, name in events]
