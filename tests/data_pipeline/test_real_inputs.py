"""Inputs as people really have them, made here after public reports, and what is right for each."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pysubs2
import pytest
import webdataset
from hang_guard import ends_within
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline.documents.prompts import EMPTY_PROMPTS
from data_pipeline.documents.tokenizers import HuggingFaceTokenizer, train_sentencepiece
from data_pipeline.sources import SampleError
from data_pipeline.sources.image import decode_image
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from data_pipeline.video import cues
from data_pipeline.video.keyframes import VideoConfig, extract_key_frames
from data_pipeline.video.transcript import Speech, Word, interleave, join_words, parse_transcript
from model.vocabulary import Vocabulary, VocabularyConfig

BLANK = " "  # a line of one space, which does not end a cue
YOUTUBE = """WEBVTT
Kind: captions
Language: en

00:00:00.400 --> 00:00:02.900 align:start position:0%
{blank}
good<00:00:00.800><c> morning</c><00:00:01.200><c> everyone</c><00:00:01.700><c> today</c>

00:00:02.900 --> 00:00:02.910 align:start position:0%
good morning everyone today
{blank}

00:00:02.910 --> 00:00:05.600 align:start position:0%
good morning everyone today
we<00:00:03.300><c> are</c><00:00:03.700><c> going</c><00:00:04.200><c> to</c><00:00:04.800><c> bake</c>

00:00:05.600 --> 00:00:05.610 align:start position:0%
we are going to bake
{blank}

00:00:05.610 --> 00:00:09.000 align:start position:0%
we are going to bake
a<00:00:06.000><c> loaf</c><00:00:06.500><c> of</c><00:00:07.100><c> bread</c>

00:00:09.000 --> 00:00:09.010 align:start position:0%
a loaf of bread
{blank}
""".replace("{blank}", BLANK)


def said(extension: str, text: str) -> str:
    return join_words(parse_transcript(extension, text))


def test_rolling_captions_are_said_once_at_their_own_times() -> None:
    words = parse_transcript("vtt", YOUTUBE)
    assert join_words(words) == "good morning everyone today we are going to bake a loaf of bread"
    assert [item for item in interleave(words, [2.9, 5.6]) if isinstance(item, Speech)] == [
        Speech("good morning everyone today", 0.4),
        Speech("we are going to bake", 2.91),
        Speech("a loaf of bread", 5.61),
    ]
    assert interleave(words, [1.0])[0] == Speech("good morning", 0.4)
    plain = "\n".join(line for line in YOUTUBE.split("\n") if "<" not in line or line.startswith("00"))
    rolling = "".join(
        f"{number}\n00:00:{number:02},000 --> 00:00:{number + 1:02},000\nline {number}\nline {number + 1}\n\n"
        for number in range(1, 6)
    )
    assert said("srt", rolling) == "line 1 line 2 line 3 line 4 line 5 line 6"
    assert "good morning everyone today" in said("vtt", plain)


def test_what_was_said_twice_stays_twice() -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\nNo!\n\n2\n00:00:02,000 --> 00:00:03,000\nNo!\n"
    assert said("srt", text) == "No! No!"
    dialogue = "1\n00:00:01,000 --> 00:00:02,000\n- Yes.\n- No.\n\n2\n00:00:02,000 --> 00:00:03,000\n- No.\n- Stop.\n"
    assert said("srt", dialogue) == "- Yes. - No. - No. - Stop."


@pytest.mark.parametrize(
    ("extension", "text", "expected"),
    [
        ("vtt", "WEBVTT\n\n00:00.500 --> 00:02.000\n \nafter a blank\n\n00:05.000 --> 00:08.000\nsecond\n", "after a blank second"),
        (
            "srt",
            "1\n00:00:00,500 --> 00:00:02,000\nfirst line\n2\n00:00:02,000 --> 00:00:04,000\nsecond line\n\n3\n"
            "00:00:06,000 --> 00:00:08,000\nthird line\n",
            "first line second line third line",
        ),
        ("srt", "1\n00:00:00,500-->00:00:02,000\nno space\n\n2\n00:00:05,000 --> 00:00:08,000\nnormal\n", "no space normal"),
        (
            "srt",
            "1\n00:00:00,500 --> 00:00:02,000\n你好 我是小明\n\n2\n00:00:05,000 --> 00:00:05,200\n"
            "他说：“真的……吗？”——是的\n",
            "你好 我是小明他说：“真的……吗？”——是的",
        ),
        ("srt", "1\n00:00:00,500 --> 00:00:02,000\n全角　空格\n", "全角　空格"),
        ("srt", "1\n00:00:01,000 --> 00:00:02,000\nabove\n\nbelow\n\n2\n00:00:03,000 --> 00:00:04,000\nend\n", "above below end"),
        ("srt", "1\n00:00:01,000 --> 00:00:02,000\nx --> y\n", "x --> y"),
        ("vtt", "WEBVTT\n\nNOTE not said\nnor this\n\n00:01.000 --> 00:02.000\nsaid\n\nSTYLE\n::cue {}\n", "said"),
    ],
)  # fmt: skip
def test_the_cues_own_text(extension: str, text: str, expected: str) -> None:
    assert said(extension, text) == expected


ASS = """[Script Info]
ScriptType: v4.00+

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,{\\i1}second{\\i0}, with a comma\\Nand a line <3
Comment: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,not said
Dialogue: 0,0:00:01.50,0:00:02.00,Default,,0,0,0,,first
Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,{\\p1}m 0 0 l 9 9{\\p0}
"""
TTML = (
    '<tt xmlns="http://www.w3.org/ns/ttml"><body><div><p begin="00:00:01.500" end="00:00:02.000">first</p>'
    '<p begin="00:00:03.000" end="00:00:04.000">second &amp;<br/><span>last</span></p>{}</div></body></tt>'
)


def test_subtitles_of_other_formats() -> None:
    words = parse_transcript("ass", ASS)
    assert join_words(words) == "first second, with a comma and a line <3"
    assert [words[0].start_seconds, words[-1].end_seconds] == [1.5, 4.0]
    assert said("ttml", TTML.format("")) == "first second & last"


@pytest.mark.parametrize(
    ("extension", "text"),
    [
        ("ttml", TTML.format("<div><p begin='00:00:05.0' end='00:00:06.0'>in another div</p></div>")),
        ("ttml", "<!DOCTYPE tt [<!ENTITY a 'aaaa'>]>" + TTML.format("")),
        ("ttml", TTML.format("")[:-10]),
        ("ass", ASS + "Dialogue: broken\n"),
        ("ass", ASS.replace("0:00:03.00", "soon")),
        # FFmpeg passes over what follows a broken cue, and drops the last line here; both would be trained as silence.
        ("vtt", "WEBVTT\n\n00:01.000 --> 00:02.000\nsaid\n\nsoon --> later\nx\n\n00:03.000 --> 00:04.000\nlost\n"),
        ("srt", "1\n00:00:01,000 --> 00:00:02,000\nthe answer is\n42\n00:00:03,000 --> 00:00:04,000\nright\n"),
        ("srt", "1\n00:00:01,000 --> 00:00:02,000\nI have\n10 apples\n00:00:03,000 --> 00:00:04,000\nright\n"),
        ("srt", "1\n00:00:01,000 --> 00:00:02,000\nx\0y\n"),
    ],
)
def test_what_a_library_would_drop_is_a_reason(extension: str, text: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_transcript(extension, text)
    assert caught.value.reason == "bad_transcript"


def test_times_as_people_write_them() -> None:
    words = parse_transcript("srt", "1\n1:01.5-->1:02,25\none\n\n00:02:00,000 --> 00:02:01,000\ntwo\n")
    assert [(word.text.strip(), word.start_seconds, word.end_seconds) for word in words] == [
        ("one", 61.5, 62.25),
        ("two", 120.0, 121.0),
    ]


def test_overlapping_cues_are_not_mixed_word_by_word() -> None:
    text = "00:00:00,000 --> 00:00:10,000\none two three four\n\n00:00:02,000 --> 00:00:04,000\nfive six\n"
    words = parse_transcript("srt", text)
    assert join_words(words) == "one two three four five six"
    assert [word.start_seconds for word in words] == sorted(word.start_seconds for word in words)


def test_words_without_times_have_those_of_their_neighbours() -> None:
    entries = [
        {"word": "we", "start": 0.5, "end": 0.7},
        {"word": "paid", "start": 0.8, "end": 1.1},
        {"word": "$43,000."},
        {"word": "Then", "start": 7.4, "end": 7.6},
        {"word": "left"},
    ]
    words = parse_transcript("words.json", json.dumps(entries))
    assert words[2] == Word("$43,000.", 1.1, 1.1)
    assert words[4] == Word("left", 7.6, 7.6)
    assert said("words.json", json.dumps(entries)) == "we paid $43,000. Then left"
    whisper = {
        "segments": [{"words": [{"word": " Hello", "start": 1, "end": 2}]}, {"text": " you", "start": 3, "end": 4}]
    }
    assert said("words.json", json.dumps(whisper)) == "Hello you"
    timestamped = {"segments": [{"words": [{"text": "Hello", "start": 1, "end": 2, "confidence": 0.9}]}]}
    assert said("words.json", json.dumps(timestamped)) == "Hello"
    first = [{"word": "20"}, {"word": "men", "start": 3.0, "end": 3.2}]
    assert parse_transcript("words.json", json.dumps(first))[0] == Word("20", 3.0, 3.0)


@settings(max_examples=60, deadline=None)
@given(
    head=st.sampled_from(["", "WEBVTT\n\n", "1\n00:00:00,000 --> 00:00:01,000\n"]),
    piece=st.text("<>&#-0123456789:.,; \n{}\\a红", min_size=1, max_size=6),
    count=st.sampled_from([1, 1000]),
    extension=st.sampled_from(["vtt", "srt", "words.json"]),
)
def test_any_transcript_is_words_or_a_reason(head: str, piece: str, count: int, extension: str) -> None:
    try:
        words = parse_transcript(extension, head + piece * count)
    except SampleError:
        return
    starts = [word.start_seconds for word in words]
    assert starts == sorted(starts)


@pytest.mark.parametrize("piece", ["<", "&#", "<0:", "a\n", "<>\n", "\n \n", "00:00 --> 00:01\n", "-->", "{\\"])
def test_the_work_grows_with_the_length_and_no_faster(piece: str) -> None:
    """Work is counted, not timed: calls of Python's own and of the regular expressions' functions."""
    import sys

    def work(length: int) -> int:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        text = "1\n00:00:00,000 --> 00:00:01,000\n" + piece * (length // len(piece))
        sys.setprofile(count)
        try:
            parse_transcript("srt", text)
        except SampleError:
            pass
        finally:
            sys.setprofile(None)
        return calls

    assert work(8000) < 3 * work(4000) + 1000


ASS_HEAD = (
    "[Script Info]\nScriptType: v4.00+\n\n[Events]\n"
    "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
    "Dialogue: 0,0:00:00.00,0:00:01.00,Default,,0,0,0,,"
)


@pytest.mark.parametrize("piece", ["{\\p1}", "{", "{\\"])
def test_300_kilobytes_of_overrides_take_no_square_of_their_length(piece: str) -> None:
    """pysubs2's own functions for the text of an event and for drawings take minutes and half an hour here."""
    with ends_within(60), contextlib.suppress(SampleError):
        parse_transcript("ass", ASS_HEAD + piece * (300_000 // len(piece)))


@given(
    st.lists(st.sampled_from(["{", "}", "\\p1", "\\p0", "\\r", "\\rx", "\\i1", "\\N", "\\h", "a", " "]), max_size=12)
)
def test_overrides_mean_what_they_mean_to_pysubs2(pieces: list[str]) -> None:
    event = pysubs2.SSAEvent(text="".join(pieces))
    plain, overrides = cues._split_overrides(event.text)
    assert cues._plain_lines(plain) == event.plaintext.split("\n")
    assert cues._draws(overrides) == event.is_drawing


# Pictures and video


def png(picture: Image.Image, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def test_pictures_of_many_bits_keep_their_ramp() -> None:
    ramp = np.linspace(0, 65_535, 48).astype(np.uint16)[None, :].repeat(2, axis=0)
    expected = (ramp >> 8).astype(np.uint8)
    for picture in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        assert np.array_equal(decode_image(png(picture, "tiff")), expected[:, :, None].repeat(3, axis=2))
    assert np.array_equal(decode_image(png(Image.fromarray(ramp)))[:, :, 0], expected)
    floats = Image.fromarray((ramp / 65_535).astype(np.float32))
    assert np.abs(decode_image(png(floats, "tiff"))[:, :, 0].astype(int) - expected).max() <= 1


def film(seconds: float, rate: int = 4, *, delay: int = 0, jump: int = 0, aspect: Fraction | None = None) -> bytes:
    """Matroska; the sound begins at 0, the video `delay` seconds later; half of the frames come `jump` seconds late."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as output:
        video = output.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 90, 72, "yuv420p"
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        sound = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.sample_rate, samples.pts = 8000, 0
        output.mux(sound.encode(samples))
        num_frames = int(seconds * rate)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((72, 90, 3), number % 256, np.uint8), format="rgb24")
            frame.pts = number + delay * rate + (jump * rate if number >= num_frames // 2 else 0)
            frame.time_base = Fraction(1, rate)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    return stream.getvalue()


ONE_SCENE = VideoConfig(detect_scenes=False)


def test_frames_have_their_times_of_presentation() -> None:
    (on_time,) = extract_key_frames(film(5), ONE_SCENE)
    (late,) = extract_key_frames(film(5, delay=5), ONE_SCENE)
    assert late.time_seconds == pytest.approx(on_time.time_seconds + 5, abs=0.01)


def test_pixels_that_are_not_square_are_shown_as_they_should_be() -> None:
    assert extract_key_frames(film(5, aspect=Fraction(64, 45)), ONE_SCENE)[0].pixels.shape == (72, 128, 3)
    assert extract_key_frames(film(5, aspect=Fraction(1, 2)), ONE_SCENE)[0].pixels.shape == (144, 90, 3)
    assert extract_key_frames(film(5), ONE_SCENE)[0].pixels.shape == (72, 90, 3)


def test_a_jump_of_time_stamps_is_a_reason() -> None:
    with pytest.raises(SampleError, match="bad_time_stamps"):
        extract_key_frames(film(5, jump=1_700_000), ONE_SCENE)


# A job over all of them


def test_no_sample_ends_a_job_and_each_is_named(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece([*dir(np), *EMPTY_PROMPTS] * 20, tmp_path / "tokenizer", 420)
    clip = film(4)
    samples = {
        "surrogate": {"mkv": clip, "words.json": b'[{"word": "ok \\ud83d", "start": 0.5, "end": 1}]'},
        "epoch": {"mkv": clip, "words.json": b'[{"word": "hello", "start": 1715000000.5, "end": 1715000001}]'},
        "codec": {"mkv": clip.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/ZZZ"), "txt": b"a clip"},
        "jump": {"mkv": film(4, jump=1_700_000), "txt": b"a clip"},
        "digits": {"mkv": clip, "words.json": b'[{"word": "a", "start": 1' + b"0" * 5000 + b', "end": 1}]'},
        "deep": {"mkv": clip, "words.json": b"[" * 100_000},
        "good": {"mkv": clip, "words.json": b'[{"word": "hello", "start": 0.5, "end": 1}]'},
    }
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key, **parts})
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=tokenizer.size, visual_size=64))

    class Grey:
        factor, codebook_size, fingerprint = 8, 64, "grey"

        def encode(self, images: np.ndarray) -> np.ndarray:
            return np.zeros((len(images), images.shape[1] // 8, images.shape[2] // 8), np.int64)

    worker = ShardTokenizer(TokenizeConfig("real"), vocabulary, tokenizer, Grey())
    manifest = worker.tokenize(tmp_path / "0.tar", tmp_path / "out" / "000000").manifest
    assert manifest["num_documents"] == 1
    lines = (tmp_path / "out" / "000000.quarantine.jsonl").read_text().splitlines()
    reasons = {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons == {
        "surrogate": "corrupt_text",
        "epoch": "bad_transcript",
        "codec": "undecodable_video",
        "jump": "bad_time_stamps",
        "digits": "bad_transcript",
        "deep": "bad_transcript",
    }
    assert manifest["quarantined"] == dict(Counter(reasons.values()))


def test_what_nobody_foresaw_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.kinds.text import PlainText

    tokenizer = train_sentencepiece([*dir(np), *EMPTY_PROMPTS] * 20, tmp_path / "tokenizer", 420)
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=tokenizer.size, visual_size=64))
    document = PlainText.document

    def fail(self: PlainText, sample: object, layout: object) -> object:
        if sample.key == "odd":  # type: ignore[attr-defined]
            raise ZeroDivisionError("nobody thought of it")
        return document(self, sample, layout)  # type: ignore[arg-type]

    monkeypatch.setattr(PlainText, "document", fail)
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key in ("odd", "even"):
            writer.write({"__key__": key, "txt": b"numpy"})
    worker = ShardTokenizer(TokenizeConfig("real"), vocabulary, tokenizer, None)
    manifest = worker.tokenize(tmp_path / "0.tar", tmp_path / "out" / "000000").manifest
    assert manifest["num_documents"] == 1
    assert manifest["quarantined"] == {"unexpected_ZeroDivisionError": 1}


# Tokenizers


def definition(vocabulary: dict[str, int], *, truncation: int = 0, padding: int = 0) -> bytes:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if truncation:
        tokenizer.enable_truncation(truncation)
    if padding:
        tokenizer.enable_padding(length=padding)
    return tokenizer.to_str().encode()


def test_saved_truncation_and_padding_are_switched_off() -> None:
    vocabulary = {"?": 0, "a": 1, "b": 2}
    text = "a b " * 50
    for options in ({}, {"truncation": 8}, {"padding": 128}, {"truncation": 8, "padding": 8}):
        assert HuggingFaceTokenizer(definition(vocabulary, **options)).encode(text) == [1, 2] * 50


def test_a_vocabulary_with_holes_ends_behind_its_largest_id() -> None:
    tokenizer = HuggingFaceTokenizer(definition({"?": 0, "a": 1, "b": 900}))
    assert tokenizer.size == 901
    assert max(tokenizer.encode("a b c")) < tokenizer.size
