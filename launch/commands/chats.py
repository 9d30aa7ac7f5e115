"""`nextstate chats`: lines of chats or of image pairs to shards of chat samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.documents.prompts import GENERAL, TASKS
from data_pipeline.kinds.registry import KindSet
from data_pipeline.sources import SampleError
from data_pipeline.sources.chat_lines import FORMATS, ChatSample, read_line
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.durable import publish, replace_file, temporary_path
from model.errors import Problems, UserError

HELP = """Turn lines of chats, or of image pairs, into webdataset shards for tokenize.

format=messages: {"messages": [{"role": "user", "content": "..."}, ...], "images": ["a.png", ...]} a line, as Hugging Face's chat
data have it. format=x2i: {"instruction": "...", "sources": ["a.png"], "target": "b.png"}. Paths are below `media`. A line that
is no sample is counted by reason and listed in <target>/rejected.jsonl with its number.

examples:
  nextstate chats input=train.jsonl media=pictures target=runs/mine/raw/chats
  nextstate chats input=edits.jsonl media=pictures target=runs/mine/raw/edits format=x2i
  nextstate tokenize input='runs/mine/raw/chats/*.tar' target=runs/mine/tokens/chats text_tokenizer=t vision_tokenizer=v format=chat"""

REJECTED_NAME = "rejected.jsonl"


@dataclass
class Config:
    input: str = ""  # JSON lines
    media: str = "."  # folder that the paths in the lines begin at; none leads out of it
    target: str = ""  # folder of shards
    format: str = "messages"  # messages | x2i
    task: str = GENERAL  # of lines without one: t2i, x2i, howto, story, explore, vla, general
    samples_per_shard: int = 1000  # of one tar file
    json: bool = False  # print one JSON object on stdout

    def validate(self) -> None:
        problems = Problems()
        for name in ("input", "target"):
            problems.check(bool(getattr(self, name)), name, "is required", f"{name}=PATH")
        problems.check(self.format in FORMATS, "format", f"choices are {', '.join(FORMATS)}, got {self.format!r}")
        tasks = (*TASKS, GENERAL)
        problems.check(self.task in tasks, "task", f"choices are {', '.join(tasks)}, got {self.task!r}")
        problems.check(self.samples_per_shard > 0, "samples_per_shard", "must be positive")
        problems.raise_if_any()


@file_errors_are_user_errors("the input, its media or the target")
def run(config: Config) -> dict[str, Any]:
    source, target = Path(config.input), Path(config.target)
    target.mkdir(parents=True, exist_ok=True)
    if there := sorted(target.glob("*.tar")):
        raise UserError("the target holds shards already", where=str(target), got=there[0].name, fix="another target")
    rejected: list[dict[str, Any]] = []
    num_samples = num_shards = 0
    shard: list[tuple[str, ChatSample]] = []
    for pair in read_samples(config, source, rejected):
        shard.append(pair)
        num_samples += 1
        if len(shard) == config.samples_per_shard:
            write_shard(target / f"{num_shards:06d}.tar", shard)
            num_shards, shard = num_shards + 1, []
    if shard:
        write_shard(target / f"{num_shards:06d}.tar", shard)
        num_shards += 1
    if rejected:
        replace_file(target / REJECTED_NAME, "".join(json.dumps(one) + "\n" for one in rejected))
    reasons = dict(Counter(one["reason"] for one in rejected))
    if not num_samples:
        raise UserError(
            "no line is a sample",
            where=str(source),
            expected="a JSON object a line, with messages or with a pair of images (docs/post_training.md)",
            got=", ".join(f"{count} of {reason}" for reason, count in reasons.items()) or "an empty file",
            fix=f"{target / REJECTED_NAME} tells each line's reason" if rejected else "",
        )
    return {"target": str(target), "num_samples": num_samples, "num_shards": num_shards, "rejected": reasons}


def read_samples(config: Config, source: Path, rejected: list[dict[str, Any]]) -> Iterator[tuple[str, ChatSample]]:
    """(key, sample) of each good line; checked as tokenize will check it."""
    kinds = KindSet(["chat"])
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            key = f"{number:08d}"
            try:
                sample = read_line(line.decode("utf-8"), config.format, Path(config.media), config.task)
                kinds.sample(key, dict.fromkeys(sample.files, b"?") | {"json": encoded(sample)})
            except (SampleError, UnicodeDecodeError) as error:
                reason = error.reason if isinstance(error, SampleError) else "no_text"
                rejected.append({"line": number, "reason": reason, "detail": str(error)})
            else:
                yield key, sample


def encoded(sample: ChatSample) -> bytes:
    return json.dumps(sample.metadata, ensure_ascii=False).encode("utf-8", "surrogatepass")


def write_shard(path: Path, samples: list[tuple[str, ChatSample]]) -> None:
    """Whole or not at all; the same samples give the same bytes."""
    temporary = temporary_path(path)
    try:
        with file_errors_are_user_errors(path), tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for key, sample in samples:
                add(archive, f"{key}.json", encoded(sample))
                for name, media in sample.files.items():
                    add(archive, f"{key}.{name}", media.read_bytes())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def render(answer: dict[str, Any]) -> str:
    lines = [f"{answer['num_samples']} samples in {answer['num_shards']} shards of {answer['target']}"]
    lines += [f"  rejected, {reason}: {count}" for reason, count in answer["rejected"].items()]
    return "\n".join(lines)
