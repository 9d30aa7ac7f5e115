"""What is said in a film that has no transcript: a recognizer's words with their times, and the phrases that they make."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.storage.format import checksum_file
from data_pipeline.video.transcript import Word, join_words
from model.errors import Problems, UserError
from model.registry import find_class, made_with

RECOGNIZERS = {"faster_whisper": "data_pipeline.video.speech.FasterWhisper"}
_SENTENCE_END = re.compile("[.!?…。！？；;][\"'”’»」』)）]*$")
_CLAUSE_END = re.compile("[,:，、：]$")
_LONG_SECONDS = 5.0  # a phrase as long ends at a comma too


@dataclass
class SpeechConfig:
    """Films without a transcript, a file `KEY.mp4` alone, become samples when there is an engine."""

    engine: str | None = None  # faster_whisper, or the dotted path of a class like `Recognizer`; null: none
    model: str = ""  # folder of its model: of faster_whisper one that CTranslate2 reads; nothing is downloaded
    language: str | None = None  # of all films, ISO 639-1; null: told from each film's first words
    pause_seconds: float = 0.6  # a pause as long ends a phrase
    threads: int = 1  # of one worker, on a CPU

    def validate(self, problems: Problems, key: str) -> None:
        engine = self.engine
        if engine is None:
            for name, value in asdict(SpeechConfig()).items():
                fine = getattr(self, name) == value
                problems.check(
                    fine, f"{key}.{name}", f"has no effect without {key}.engine", f"{key}.engine=faster_whisper"
                )
            return
        known = engine in RECOGNIZERS or "." in engine
        names = f"{', '.join(RECOGNIZERS)}, or the dotted path of a class"
        problems.check(known, f"{key}.engine", f"unknown engine {engine!r}", names)
        needed = engine != "faster_whisper" or Path(self.model, "model.bin").is_file()
        fix = f"{key}.model=<folder of a model converted for CTranslate2>"
        problems.check(needed, f"{key}.model", f"no model.bin in {self.model!r}", fix)
        problems.check(self.pause_seconds > 0, f"{key}.pause_seconds", "must be positive")
        problems.check(self.threads > 0, f"{key}.threads", "must be positive")


class Recognizer(Protocol):
    """Made with `model`, `language` and `threads` of the configuration. `fingerprint` tells one model from another."""

    fingerprint: str

    def words(self, samples: np.ndarray) -> list[Word]:
        """What is said in samples int16 [n], `sound.SAMPLE_RATE` a second; times in seconds from the first one."""
        ...


class FasterWhisper:
    """Whisper on CTranslate2 (`pip install 'nextstate[asr]'`), without chance: the likeliest words by beam search, each window alone."""

    def __init__(self, model: str, language: str | None, threads: int):
        self.folder, self.language, self.threads = Path(model), language, threads
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            digest.update(f"{path.name} {checksum_file(path)}\n".encode())
        self.fingerprint = digest.hexdigest()

    @functools.cached_property
    def _model(self) -> Any:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise UserError(
                "asr.engine=faster_whisper needs faster-whisper", got=str(error), fix="pip install 'nextstate[asr]'"
            ) from error
        return WhisperModel(str(self.folder), device="auto", cpu_threads=self.threads, local_files_only=True)

    def words(self, samples: np.ndarray) -> list[Word]:
        segments, _ = self._model.transcribe(
            samples.astype(np.float32) / 32768.0,
            language=self.language,
            temperature=0.0,  # above 0 it would draw words by chance
            condition_on_previous_text=False,  # one window's mistake is not the next one's
            word_timestamps=True,
            vad_filter=True,  # of music and silence Whisper makes words
        )
        found = [word for segment in segments for word in segment.words or []]
        return [Word(word.word, float(word.start), float(word.end), own_spaces=True) for word in found]


def recognizer_of(config: SpeechConfig) -> Recognizer:
    """One for the process and the configuration. Raises `UserError` for what is no recognizer."""
    found: Recognizer = _recognizer(*astuple(config))
    return found


@functools.cache
def _recognizer(engine: str, model: str, language: str | None, pause_seconds: float, threads: int) -> Any:
    found = find_class("recognizer", engine, RECOGNIZERS, "asr.engine")
    made = made_with(found, "recognizer", {"model": model, "language": language, "threads": threads}, "asr.engine")
    missing = [member for member in ("words", "fingerprint") if not hasattr(made, member)]
    if missing:
        expected = "a class like data_pipeline.video.speech.Recognizer"
        raise UserError("not a recognizer", where=engine, expected=expected, got=f"without {', '.join(missing)}")
    return made


def phrases(words: Sequence[Word], pause_seconds: float) -> list[Word]:
    """The words joined to phrases, which stand whole between pictures, each with the time from its first word to its last.

    A phrase ends with a sentence, at a pause of `pause_seconds`, and at a comma once it is long.
    """
    found: list[Word] = []
    part: list[Word] = []
    for word, following in zip(words, [*words[1:], None], strict=False):
        part.append(word)
        said = word.text.rstrip()
        is_long = word.end_seconds - part[0].start_seconds >= _LONG_SECONDS
        pause = following is None or following.start_seconds - word.end_seconds >= pause_seconds
        if pause or _SENTENCE_END.search(said) or (is_long and _CLAUSE_END.search(said)):
            found.append(Word(join_words(part), part[0].start_seconds, word.end_seconds))
            part = []
    return found
