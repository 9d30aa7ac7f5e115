"""One raw shard in, one token file out: idempotent, atomic; bad samples go to a quarantine list.

Pictures are encoded in batches of one size and texts many at a time, in threads, over a window of samples, while a thread
decodes the next window; documents are written in the order of their samples, so that the same shard, tokenizers and
configuration give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.documents.batches import batches
from data_pipeline.documents.builder import Document, DocumentBuilder, Part, Picture
from data_pipeline.documents.encoding_ahead import EncodingAhead, grouped
from data_pipeline.documents.templates import FORMATS, DocumentLayout, LayoutConfig
from data_pipeline.documents.tokenizers import TextTokenizer
from data_pipeline.filters.base import FilterChain, FilterConfig
from data_pipeline.filters.record import FilterRecord
from data_pipeline.kinds.base import Pixels, PreparedSample
from data_pipeline.kinds.guarded import GuardedDecoder
from data_pipeline.kinds.named_parts import PartsConfig
from data_pipeline.kinds.registry import KINDS, SPOKEN, KindSet, read_shard
from data_pipeline.kinds.videos import SpokenVideo
from data_pipeline.sources import BadSample, Sample
from data_pipeline.sources.image import ImageConfig
from data_pipeline.sources.inputs import Shard, describe_input, is_unchanged
from data_pipeline.sources.samples import unusable
from data_pipeline.storage.atomic import atomic_write_bytes, encode_json
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from data_pipeline.storage.format import TOKENIZER_PATHS, encode_array, read_manifest, suffixed
from data_pipeline.storage.read_ahead import Readers, one_ahead
from data_pipeline.storage.segments import count_classes
from data_pipeline.storage.signatures import SETTINGS_KEY as SIGNATURES_KEY
from data_pipeline.storage.signatures import SUFFIX as SIGNATURES_SUFFIX
from data_pipeline.storage.token_files import TokenFileWriter
from data_pipeline.video.keyframes import VideoConfig
from data_pipeline.video.speech import SpeechConfig, recognizer_of
from model.errors import Problems, UserError
from model.vocabulary import Vocabulary

# Part of every fingerprint: raised when the same input would give other tokens than before.
CODE_VERSION = 2

FILTERS_SUFFIX = ".filters.jsonl"  # what the filters said of a shard (`FilterRecord`)
_WINDOW_PICTURES = 128  # pictures held back so that they are encoded together
_WINDOW_SAMPLES = 1024  # samples held back at most
_WINDOW_PIXELS = 32 * 1024 * 1024  # pixels held back, a limit on memory: two windows are there at a time


class VisionTokenizer(Protocol):
    """What the pipeline asks of a vision tokenizer (`model.vision_tokenizer`)."""

    factor: int  # pixels of a visual token's side
    codebook_size: int
    fingerprint: str

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> int64 [B, H / factor, W / factor]."""
        ...


@dataclass
class TokenizeConfig:
    """What decides the tokens, beside the input and the tokenizers."""

    source: str = ""  # name of the dataset; part of every document's id
    format: str = "pretrain"  # pretrain | chat
    seed: int = 0  # of what is drawn by chance in a document
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    kinds: list[str] = field(default_factory=list)  # of samples that the input may hold: names or paths; empty: ours
    parts: PartsConfig = field(default_factory=PartsConfig)  # which files count, where captions stand
    asr: SpeechConfig = field(default_factory=SpeechConfig)  # speech recognition where a video has no transcript
    filters: list[FilterConfig] = field(default_factory=list)  # in this order; the first that refuses counts

    def validate_tokenize(self, problems: Problems) -> None:
        problems.check(
            self.format in FORMATS, "format", f"unknown format {self.format!r}", f"format={' or '.join(FORMATS)}"
        )
        self.layout.validate(problems, "layout")
        problems.check(self.image.max_area > 0, "image.max_area", "must be positive")
        problems.check(
            self.image.resize in ("bounded", "emu35"), "image.resize", "unknown value", "image.resize=bounded"
        )
        problems.check(
            0 <= self.image.min_area <= self.image.max_area, "image.min_area", "must be in [0, image.max_area]"
        )
        problems.check(self.video.keyframe_seconds > 0, "video.keyframe_seconds", "must be positive")
        problems.check(self.video.max_keyframes >= 0, "video.max_keyframes", "must not be negative")
        self.asr.validate(problems, "asr")
        for number, config in enumerate(self.filters):
            config.validate(problems, f"filters[{number}]")


@dataclass
class _Window:
    """Samples that are encoded together, and those among them that cannot be used."""

    samples: list[PreparedSample] = field(default_factory=list)
    unusable: list[BadSample] = field(default_factory=list)
    num_pictures: int = 0
    num_pixels: int = 0

    def add(self, sample: PreparedSample) -> None:
        self.samples.append(sample)
        for picture in sample.pictures:
            self.num_pictures += 1
            self.num_pixels += picture.pixels.size // 3

    @property
    def is_full(self) -> bool:
        full = self.num_pictures >= _WINDOW_PICTURES or self.num_pixels >= _WINDOW_PIXELS
        return full or len(self.samples) >= _WINDOW_SAMPLES


@dataclass(frozen=True)
class ShardResult:
    manifest: dict[str, Any]
    skipped: bool  # was it there already?


class ShardTokenizer:
    """Tokenizes shards with one set of tokenizers. Without a vision tokenizer, texts only."""

    def __init__(
        self,
        config: TokenizeConfig,
        vocabulary: Vocabulary,
        text_tokenizer: TextTokenizer,
        vision_tokenizer: VisionTokenizer | None,
        tokenizer_paths: Mapping[str, str] | None = None,
        num_threads: int = 1,
    ):
        """`tokenizer_paths` are recorded: where a reader of the tokens finds them. `num_threads` encode texts."""
        self.config = config
        self.tokenizer_paths = dict(tokenizer_paths or {})
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.vision_tokenizer = vision_tokenizer
        factor = vision_tokenizer.factor if vision_tokenizer else 1
        self.decoder = GuardedDecoder(config.image, config.video, factor, config.asr)
        self.kinds = KindSet([*(config.kinds or KINDS), SPOKEN] if config.asr.engine else config.kinds, config.parts)
        self.filters = FilterChain(config.filters)
        self.num_threads = num_threads
        self.encoding = EncodingAhead(text_tokenizer)
        builder = DocumentBuilder(vocabulary, self.encoding, config.layout.image_format)
        self.layout = DocumentLayout(builder, config.format, config.layout, config.source, config.seed)
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        # A command's configuration has more fields; the others do not decide tokens.
        names = [entry.name for entry in dataclasses.fields(TokenizeConfig)]
        values = dataclasses.asdict(self.config)
        content = {
            "code_version": CODE_VERSION,
            "config": {name: values[name] for name in names if name not in ("kinds", "parts", "filters", "asr")}
            | {"filters": [_without_empty_options(one) for one in values["filters"]]},
            # What was tokenized before kinds and parts could be chosen is not done again.
            **({"parts": values["parts"]} if self.config.parts != PartsConfig() else {}),
            **(
                {"kinds": [[name, kind.version] for name, kind in self.kinds.by_name.items()]}
                if values["kinds"]
                else {}
            ),
            **({"asr": self._describe_speech()} if self.config.asr.engine else {}),
            **self._describe_tokenizers(),
        }
        return hashlib.blake2b(encode_json(content), digest_size=16).hexdigest()

    def _describe_speech(self) -> dict[str, Any]:
        asr = self.config.asr
        described = {"engine": asr.engine, "language": asr.language, "pause_seconds": asr.pause_seconds}
        return described | {"model": recognizer_of(asr).fingerprint, "kind": SpokenVideo.version}

    def _describe_tokenizers(self) -> dict[str, Any]:
        vision = self.vision_tokenizer
        return {
            "vocabulary": self.vocabulary.describe(),
            "text_tokenizer": self.text_tokenizer.fingerprint,
            "vision_tokenizer": vision.fingerprint if vision else None,
        }

    def is_done(self, shard: Shard, prefix: Path) -> bool:
        """Is the token file there, of this very shard, configuration and tokenizers?"""
        if not suffixed(prefix, ".json").is_file() or (isinstance(shard, Path) and not shard.is_file()):
            return False
        manifest = read_manifest(prefix, "tokens")
        return self.is_of(manifest, shard) and all(prefix.with_name(name).is_file() for name in manifest["outputs"])

    def is_of(self, manifest: dict[str, Any], shard: Shard) -> bool:
        """Is it the manifest of this very shard, configuration and tokenizers?"""
        inputs = manifest.get("inputs") or [{}]
        return manifest.get("config_fingerprint") == self.fingerprint and is_unchanged(shard, inputs[0])

    @file_errors_are_user_errors("the shard or the token file")
    def tokenize(self, shard: Shard, prefix: Path, name: str = "", copy: Path | None = None) -> ShardResult:
        """Write `prefix`.{bin,idx,seg.npy,crc.npy,signatures.npy,quarantine.jsonl,json}, the manifest last.

        Nothing is done where they exist for the same shard, configuration and tokenizers. `name` stands for the shard in
        its documents' ids, by default the name of its file. `copy`: where its bytes are, of a shard behind a URL.
        """
        path = shard if copy is None and isinstance(shard, Path) else copy
        assert path is not None, "a shard behind a URL is read from a copy"
        if self.is_done(shard, prefix):
            return ShardResult(read_manifest(prefix, "tokens"), skipped=True)
        started = time.monotonic()
        quarantine: list[BadSample] = []
        self.filters.record = FilterRecord(self.filters.names)
        duplicates = self.filters.duplicates
        if duplicates is not None:
            duplicates.taken()  # those of a shard that was not finished
        counts: Counter[str] = Counter()
        with TokenFileWriter(prefix, with_crc=True) as writer:
            with closing(self._documents(path, name or shard.name, quarantine)) as documents:
                for batch in batches(documents):
                    writer.add_all(*batch)
                    counts.update(count_classes(batch.tokens, batch.segments, self.vocabulary.visual_start))
            _write_lines(prefix, ".quarantine.jsonl", _quarantine_lines(shard, quarantine))
            _write_lines(prefix, FILTERS_SUFFIX, self.filters.record.lines())
            more = {SIGNATURES_SUFFIX: encode_array(duplicates.taken())} if duplicates is not None else {}
            if not more:
                suffixed(prefix, SIGNATURES_SUFFIX).unlink(missing_ok=True)
            manifest = writer.finish(
                {
                    "kind": "tokens",
                    "num_documents": len(writer),
                    "counts_by_class": dict(counts),
                    "sources": [self.config.source],
                    "config_fingerprint": self.fingerprint,
                    "inputs": [describe_input(shard, path)],
                    "quarantined": dict(Counter(bad.reason for bad in quarantine)),
                    **self._describe_tokenizers(),
                    TOKENIZER_PATHS: self.tokenizer_paths,
                    **({SIGNATURES_KEY: duplicates.describe()} if duplicates is not None else {}),
                },
                more,
            )
        _report_progress(self.config.source, shard, manifest, time.monotonic() - started)
        return ShardResult(manifest, skipped=False)

    def _documents(self, shard: Path, name: str, quarantine: list[BadSample]) -> Generator[Document, None, None]:
        """The shard's documents in order; what cannot become one is appended to `quarantine`."""
        # One core that encodes nothing but texts would only be taken away from one thread for the other.
        threads = Readers(self.num_threads, "encode") if self.num_threads > 1 or self.vision_tokenizer else None
        try:
            with closing(one_ahead(self._windows(shard), "decode")) as windows:
                for window in windows:
                    quarantine += window.unusable
                    yield from self._documents_of(self._filtered(window.samples, quarantine), name, quarantine, threads)
        finally:
            if threads is not None:
                threads.close()

    def _documents_of(
        self, samples: list[PreparedSample], name: str, quarantine: list[BadSample], threads: Readers | None
    ) -> Iterator[Document]:
        with closing(self._groups(samples, threads)) as groups:
            codes = self._encode([picture for sample in samples for picture in sample.pictures])
            for group in groups:
                for sample in group:
                    parts: list[Part] = [
                        Picture(next(codes), part.time_ms) if isinstance(part, Pixels) else part
                        for part in sample.parts
                    ]
                    try:
                        kind = self.kinds[sample.kind]
                        document = self.layout.build(kind, sample.key, parts, sample.metadata, name)
                    except Exception as error:
                        quarantine.append(unusable(sample.key, error))
                        continue
                    if self.filters.duplicates is not None:
                        self.filters.duplicates.note(sample)
                    yield document

    def _groups(
        self, samples: list[PreparedSample], threads: Readers | None
    ) -> Generator[list[PreparedSample], None, None]:
        """The samples in their order, of each group the texts encoded. A chat's are joined to others before: they are not."""
        if self.config.format != "pretrain":
            yield samples
            return
        texts = [sample.texts for sample in samples]
        ends = list(itertools.accumulate(grouped(texts)))
        bounds = list(itertools.pairwise([0, *ends]))
        calls = ([text for one in texts[first:end] for text in one] for first, end in bounds)
        with closing(self.encoding.ahead(calls, threads)) as encoded:
            for (first, end), _ in zip(bounds, encoded, strict=True):
                yield samples[first:end]

    def _prepare(self, item: Sample, quarantine: list[BadSample]) -> PreparedSample | None:
        try:
            parts = self.kinds[item.kind].prepare(item, self.decoder)
            sample = PreparedSample(item.key, item.kind, parts, item.metadata)
            self.filters.check(sample)
            return sample
        except Exception as error:
            quarantine.append(unusable(item.key, error))
        return None

    def _windows(self, shard: Path) -> Generator[_Window, None, None]:
        """Samples read, decoded and filtered; runs in a thread while the window before is encoded and written."""
        window = _Window()
        for item in read_shard(shard, self.kinds):
            if isinstance(item, BadSample):
                window.unusable.append(item)
                continue
            sample = self._prepare(item, window.unusable)
            if sample is not None:
                window.add(sample)
            if window.is_full:
                yield window
                window = _Window()
        yield window

    def _filtered(self, window: list[PreparedSample], quarantine: list[BadSample]) -> list[PreparedSample]:
        """Without those that the filters refuse which are asked about many samples at once."""
        kept = []
        for sample, refusal in zip(window, self.filters.check_batch(window), strict=True):
            if refusal is None:
                kept.append(sample)
            else:
                quarantine.append(BadSample(sample.key, refusal.reason, refusal.detail))
        return kept

    def _encode(self, pictures: list[Pixels]) -> Iterator[np.ndarray]:
        """Codes [h, w] of each picture, in order."""
        if not pictures:
            return iter(())
        vision = self.vision_tokenizer
        if vision is None:
            raise UserError(
                "the shards hold pictures, but no vision tokenizer is given",
                expected="text samples only, or a vision tokenizer",
                fix="vision_tokenizer=<folder>",
            )
        codes: dict[int, np.ndarray] = {}
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            by_size.setdefault(picture.pixels.shape, []).append(number)
        for shape, numbers in by_size.items():
            step = max(1, _WINDOW_PIXELS * 3 // math.prod(shape))  # a long video has more than a window's
            for first in range(0, len(numbers), step):
                batch = numbers[first : first + step]
                encoded = vision.encode(np.stack([pictures[number].pixels for number in batch]))
                codes.update(zip(batch, encoded, strict=True))
        return iter([codes[number] for number in range(len(pictures))])


def tokenize_shard(
    shard: str | Path,
    prefix: str | Path,
    config: TokenizeConfig,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    vision_tokenizer: VisionTokenizer | None = None,
) -> ShardResult:
    """Tokenize one raw shard into the token file `prefix`; see `ShardTokenizer.tokenize`."""
    tokenizer = ShardTokenizer(config, vocabulary, text_tokenizer, vision_tokenizer)
    return tokenizer.tokenize(Path(shard), Path(prefix))


def _quarantine_lines(shard: Shard, quarantine: list[BadSample]) -> list[str]:
    return [json.dumps({"shard": shard.name, **dataclasses.asdict(bad)}, ensure_ascii=False) for bad in quarantine]


def _write_lines(prefix: Path, suffix: str, lines: list[str]) -> None:
    """A file beside the token file; no file where there is nothing to list."""
    path = suffixed(prefix, suffix)
    if lines:
        atomic_write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)


def _without_empty_options(values: dict[str, Any]) -> dict[str, Any]:
    """A filter's configuration as it was before filters had options."""
    return {name: value for name, value in values.items() if name != "options" or value}


def _report_progress(source: str, shard: Shard, manifest: dict[str, Any], seconds: float) -> None:
    num_bad = sum(manifest["quarantined"].values())
    num_samples = manifest["num_documents"] + num_bad
    print(
        f"tokenize {source} {shard.name}: {manifest['num_documents']:,} documents, "
        f"{manifest['num_tokens']:,} tokens, {num_bad:,} quarantined, "
        f"{num_samples / max(seconds, 1e-9):,.0f} samples/s [{os.getpid()}]",
        file=sys.stderr,
        flush=True,
    )
