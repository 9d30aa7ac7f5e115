"""Damaged pictures, videos and transcripts through `tokenize`: no job ends, nothing costs more than its size deserves.

    python -m benchmarks.fuzz_data --media 20000 --transcripts 2000 [--seed 0]

Every file is a mutant of a good one (bytes flipped, cut out, repeated, inserted, cut off, swapped for another file's, fields set
to extremes) and a sample of a shard of 500, beside a good sample that must come out. Printed: jobs that ended, shards without
their good sample, samples by reason, the largest memory of this process and of the one that decodes (peak resident), the
slowest sample (wall time). Exit code 1 when a job ended, a good sample is missing, or a peak is above 1 GiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipeline.documents.prompts import EMPTY_PROMPTS
from data_pipeline.documents.tokenizers import TextTokenizer, train_sentencepiece
from data_pipeline.kinds.guarded import GuardedDecoder, Piece, decoder_process
from data_pipeline.sources.image import ImageConfig
from data_pipeline.sources.samples import TRANSCRIPT_EXTENSIONS
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from model.vocabulary import Vocabulary, VocabularyConfig

SAMPLES_PER_SHARD = 500
MOST_BYTES = 1 << 30
EXTREMES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1", b"\x80\0\0\0"]
GOOD = {"txt": b"the good sample"}


def good_media() -> list[tuple[str, bytes]]:
    """(extension, bytes) of small files of every format that a dataset may have."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize((96, 64))
    files = []
    pictures: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("JPEG", "jpg", {}),
        ("JPEG", "jpg", {"progressive": True}),
        ("PNG", "png", {}),
        ("WEBP", "webp", {}),
        ("WEBP", "webp", {"lossless": True}),
        ("GIF", "jpg", {}),
        ("TIFF", "jpg", {"compression": "tiff_lzw"}),
        ("BMP", "png", {}),
    )
    for name, extension, options in pictures:
        stream = io.BytesIO()
        picture.save(stream, name, **options)
        files.append((extension, stream.getvalue()))
    for container, extension, codec in (
        ("mp4", "mp4", "libx264"),
        ("matroska", "mkv", "libx264"),
        ("webm", "webm", "libvpx"),
        ("avi", "avi", "mpeg4"),
        ("mov", "mov", "mjpeg"),
        ("mpegts", "mp4", "libx264"),
    ):
        files.append((extension, clip(container, codec)))
    return files


def clip(container: str, codec: str, num_frames: int = 24) -> bytes:
    """48 x 32 pixels, 8 frames a second, a cut in the middle."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        video = output.add_stream(codec, rate=8)
        assert isinstance(video, av.VideoStream)
        video.width, video.height = 48, 32
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(num_frames):
            pixels = np.full((32, 48, 3), number + 120 * (number >= num_frames // 2), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    return stream.getvalue()


def good_transcripts() -> list[tuple[str, bytes]]:
    cues = [(number / 4, number / 4 + 0.25, f"word{number} and <i>more</i> 红色") for number in range(12)]
    clock = "00:00:{:06.3f}"
    vtt = "WEBVTT\n\n" + "\n".join(f"{clock.format(a)} --> {clock.format(b)}\n{text}\n" for a, b, text in cues)
    srt = "\n".join(
        f"{n}\n{clock.format(a)} --> {clock.format(b)}\n{text}\n".replace(".", ",")
        for n, (a, b, text) in enumerate(cues, 1)
    )
    words: list[dict[str, Any]] = [{"word": text, "start": a, "end": b} for a, b, text in cues]
    rows = "".join(f"Dialogue: 0,0:00:0{a:.2f},0:00:0{b:.2f},Default,,0,0,0,,{text}\n" for a, b, text in cues)
    ass = "[Script Info]\nScriptType: v4.00+\n\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, "
    lines = "".join(f'<p begin="{clock.format(a)}" end="{clock.format(b)}">{text[:5]}</p>' for a, b, text in cues)
    return [
        ("vtt", vtt.encode()),
        ("srt", srt.encode()),
        ("words.json", json.dumps(words).encode()),
        ("words.json", json.dumps({"segments": [{"words": words}]}).encode()),
        ("ass", f"{ass}Effect, Text\n{rows}".encode()),
        ("ttml", f'<tt xmlns="http://www.w3.org/ns/ttml"><body><div>{lines}</div></body></tt>'.encode()),
    ]


def mutant(data: bytes, others: list[bytes], random: np.random.Generator) -> bytes:
    """One change or a few."""
    changed = bytearray(data)
    for _ in range(int(random.geometric(0.4))):
        if not changed:
            break
        # Headers are short, and most of what can be said is said there.
        limit = len(changed) if random.random() < 0.5 else min(len(changed), 512)
        start = int(random.integers(limit))
        span = int(random.integers(1, max(2, min(64, len(changed) - start))))
        how = int(random.integers(8))
        if how == 0:
            changed[start] ^= 1 << int(random.integers(8))
        elif how == 1:
            changed[start : start + span] = random.bytes(span)
        elif how == 2:
            del changed[start : start + span]
        elif how == 3:
            changed[start:start] = changed[start : start + span] * int(random.integers(1, 50))
        elif how == 4:
            changed[start : start + 4] = EXTREMES[int(random.integers(len(EXTREMES)))]
        elif how == 5 and random.random() < 0.2:
            del changed[start:]
        elif how == 6:
            other = others[int(random.integers(len(others)))]
            at = int(random.integers(len(other)))
            changed[start : start + span] = other[at : at + span]
        else:
            changed[start:start] = random.bytes(int(random.integers(1, 16)))
    return bytes(changed)


def samples(
    files: list[tuple[str, bytes]], companion: dict[str, bytes], count: int, seed: int
) -> Iterator[dict[str, bytes]]:
    """Mutants, each with the file that makes it a sample of a kind."""
    random = np.random.default_rng(seed)
    others = [data for _, data in files]
    for _ in range(count):
        extension, data = files[int(random.integers(len(files)))]
        changed = mutant(data, others, random)
        if extension in TRANSCRIPT_EXTENSIONS and random.random() < 0.9:  # else most would be refused as no UTF-8
            changed = changed.decode("utf-8", "ignore").encode()
        yield {extension: changed, **companion}


class MeanGrey:
    """Stands for a vision tokenizer: what it costs is not asked here."""

    factor, codebook_size, fingerprint = 8, 64, "mean grey"

    def encode(self, images: np.ndarray) -> np.ndarray:
        count, height, width, _ = images.shape
        return images.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4, 5)).astype(np.int64) // 4


@dataclasses.dataclass(frozen=True)
class TimedDecoder(GuardedDecoder):
    seconds: list[float] = dataclasses.field(default_factory=list)

    def _ask(self, what: str, data: bytes) -> tuple[list[Piece], float]:
        started = time.monotonic()
        try:
            return super()._ask(what, data)
        finally:
            self.seconds.append(time.monotonic() - started)


@dataclasses.dataclass
class Outcome:
    num_samples: int = 0
    ended: list[str] = dataclasses.field(default_factory=list)  # what ended a job
    num_without_good: int = 0  # shards whose good sample is missing
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest_seconds: float = 0.0


def make_worker(folder: Path) -> ShardTokenizer:
    tokenizer: TextTokenizer = train_sentencepiece([*dir(np), *EMPTY_PROMPTS] * 20, folder / "text", 420)
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=tokenizer.size, visual_size=64))
    config = TokenizeConfig("fuzz", image=ImageConfig(max_area=48 * 48))
    worker = ShardTokenizer(config, vocabulary, tokenizer, MeanGrey())
    worker.decoder = TimedDecoder(worker.decoder.image, worker.decoder.video, worker.decoder.factor)
    return worker


def run(stream: Iterator[dict[str, bytes]], worker: ShardTokenizer, folder: Path) -> Outcome:
    """Tokenize the samples, `SAMPLES_PER_SHARD` a shard, each shard as a job of its own."""
    outcome = Outcome()
    number = 0
    while parts := [sample for _, sample in zip(range(SAMPLES_PER_SHARD - 1), stream, strict=False)]:
        shard = folder / f"{number:06d}.tar"
        write_shard(shard, [*parts, GOOD])
        number += 1
        outcome.num_samples += len(parts)
        try:
            manifest = worker.tokenize(shard, folder / "tokens" / shard.stem).manifest
        except Exception as error:
            outcome.ended.append(f"{shard.name}: {type(error).__name__}: {error}")
            continue
        listed = folder / "tokens" / f"{shard.stem}.quarantine.jsonl"
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        outcome.num_without_good += f"{len(parts):06d}" in {json.loads(line)["key"] for line in lines}
        outcome.reasons.update(manifest["quarantined"])
        outcome.reasons["(a document)"] += manifest["num_documents"] - 1
        shard.unlink()
    assert isinstance(worker.decoder, TimedDecoder)
    outcome.slowest_seconds = max(worker.decoder.seconds, default=0.0)
    return outcome


def write_shard(path: Path, parts: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(parts):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def peaks() -> tuple[int, int]:
    """Largest resident bytes of this process, and of its decoding children, dead or alive."""
    child = decoder_process(os.getpid())._child
    alive = 0
    if child is not None:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        alive = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    dead = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, max(alive, dead)


def report(name: str, outcome: Outcome) -> bool:
    own, child = peaks()
    print(
        f"{name}: {outcome.num_samples:,} mutants, {len(outcome.ended)} jobs ended, {outcome.num_without_good} good samples lost"
    )
    print(
        f"  peak memory {own >> 20} MiB, decoding process {child >> 20} MiB; slowest sample {outcome.slowest_seconds:.2f} s"
    )
    for reason, count in outcome.reasons.most_common():
        print(f"  {count:8,}  {reason}")
    for what in outcome.ended:
        print(f"  ended: {what}")
    return not outcome.ended and not outcome.num_without_good and max(own, child) <= MOST_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=int, default=20_000)
    parser.add_argument("--transcripts", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    good = True
    for name, files, companion, count in (
        ("media", good_media(), {"txt": b"a caption"}, arguments.media),
        ("transcripts", good_transcripts(), {"mp4": clip("mp4", "libx264")}, arguments.transcripts),
    ):
        with tempfile.TemporaryDirectory() as folder:
            worker = make_worker(Path(folder))
            good &= report(name, run(samples(files, companion, count, arguments.seed), worker, Path(folder)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
