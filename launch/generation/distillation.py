"""What a model answers to prompts, judged and written as token files: data of its own for a stage that follows."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents.builder import Document, document_id
from data_pipeline.documents.reading import MalformedImageError
from data_pipeline.storage.format import published_prefixes, read_manifest, suffixed
from data_pipeline.storage.segments import count_classes
from data_pipeline.storage.token_files import TokenFileWriter
from launch.generation.distill_inputs import TaskedQuestion
from launch.generation.distill_options import DistillOptions
from model.durable import fingerprint_of
from model.errors import UserError
from training.inference.model import Asked, InferenceModel
from training.rewards.base import Answer
from training.rewards.system import RewardSystem, is_acceptable

CODE_VERSION = 1  # changes when the same call would write other documents


class Distiller:
    """Writes file n of the answers to prompts [n * prompts_a_file, (n + 1) * prompts_a_file)."""

    def __init__(
        self,
        options: DistillOptions,
        model: InferenceModel,
        prompts: Sequence[TaskedQuestion],
        rewards: RewardSystem | None,
        target: Path,
    ) -> None:
        self.options, self.model, self.prompts, self.rewards, self.target = options, model, prompts, rewards, target
        self.source = options.source or target.name
        words = [[task, one.prompt.format, one.words, one.prompt.image_size, one.fields] for task, one in prompts]
        pictures = [[picture.tobytes().hex() for picture in one.pictures] for _, one in prompts]
        self.fingerprint = fingerprint_of(
            [
                CODE_VERSION,
                asdict(options) | {"source": self.source},
                asdict(model.options),
                self.rewards.describe() if self.rewards else None,
                model.checkpoint,
                self._described(),
                words,
                fingerprint_of(pictures),
            ]
        )

    @property
    def num_files(self) -> int:
        return -(-len(self.prompts) // self.options.prompts_a_file)

    def check_target(self) -> None:
        """Raises `UserError` where the folder holds files of another call: they would be packed with these."""
        expected = {self.prefix(number) for number in range(self.num_files)}
        for prefix in published_prefixes(self.target) if self.target.is_dir() else []:
            if prefix not in expected or read_manifest(prefix, "tokens").get("config_fingerprint") != self.fingerprint:
                raise UserError(
                    "the target holds token files of another call",
                    where=str(prefix),
                    expected="files of these prompts, this checkpoint and these settings, or none",
                    fix="take another target, or remove those files",
                )

    def prefix(self, number: int) -> Path:
        return self.target / f"{number:06d}"

    def is_done(self, number: int) -> bool:
        path = suffixed(self.prefix(number), ".json")
        if not path.is_file():
            return False
        return all(path.with_name(name).is_file() for name in read_manifest(self.prefix(number), "tokens")["outputs"])

    def manifest(self, number: int) -> dict[str, Any]:
        """Of file `number`, which is written unless it is there."""
        return read_manifest(self.prefix(number), "tokens") if self.is_done(number) else self.write(number)

    def write(self, number: int) -> dict[str, Any]:
        """Answers the prompts of one file; its manifest."""
        started, size = time.monotonic(), self.options.prompts_a_file
        first = number * size
        refused: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        with TokenFileWriter(self.prefix(number), with_crc=True) as writer:
            for document in self._documents(first, self.prompts[first : first + size], refused):
                writer.add(document.tokens, document.segments)
                counts.update(count_classes(document.tokens, document.segments, self.model.vocabulary.visual_start))
            manifest = writer.finish(
                {
                    "kind": "tokens",
                    "num_documents": len(writer),
                    "counts_by_class": dict(counts),
                    "sources": [self.source],
                    "config_fingerprint": self.fingerprint,
                    "inputs": [],
                    "quarantined": dict(refused),
                    "checkpoint": self.model.checkpoint,
                    "rewards": self.rewards.describe() if self.rewards else None,
                    **self._described(),
                }
            )
        print(
            f"distill {self.source} {self.prefix(number).name}: {manifest['num_documents']:,} answers kept, "
            f"{refused.total():,} refused, {time.monotonic() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return manifest

    def _documents(self, first: int, prompts: Sequence[TaskedQuestion], refused: Counter[str]) -> Iterator[Document]:
        options = self.options
        copies = [one for one in prompts for _ in range(options.answers_a_prompt)]
        draws = range(first * options.answers_a_prompt, first * options.answers_a_prompt + len(copies))
        asked = self.model.ask([one.prompt for _, one in copies], options.sampling, options.seed, draws)
        rewards = self._judged(copies, asked, refused)
        for place in range(len(prompts)):
            own = range(place * options.answers_a_prompt, (place + 1) * options.answers_a_prompt)
            good = [index for index in own if rewards[index] >= options.smallest_reward]
            best = sorted(good, key=lambda index: -rewards[index])[: options.kept_a_prompt]
            refused["not_the_best"] += len(good) - len(best)
            for index in best:
                answer, task = asked[index], copies[index][1].prompt.format
                identity = document_id(self.source, str(draws[index]))
                try:
                    yield self.model.builder.answered(identity, answer.prompt, answer.generation.ids.tolist(), task)
                except MalformedImageError:
                    refused["malformed_image"] += 1

    def _judged(self, copies: Sequence[TaskedQuestion], asked: Sequence[Asked], refused: Counter[str]) -> np.ndarray:
        """float64 [n]: rewards from 1 to 10; 0 where an answer is not whole, or could not be judged."""
        outputs = self.model.outputs([one.generation for one in asked])
        answers = [
            Answer(task, one.words, one.pictures, list(output.images), output.text, output.finished, one.fields)
            for (task, one), output in zip(copies, outputs, strict=True)
        ]
        whole = np.array([answer.finished and is_acceptable(answer) for answer in answers])
        totals = self.rewards.judge(answers).totals if self.rewards else np.ones(len(answers))
        judged = np.isfinite(totals)
        refused["not_whole"] += int((~whole).sum())
        refused["not_judged"] += int((whole & ~judged).sum())
        refused["low_reward"] += int((whole & judged & (totals < self.options.smallest_reward)).sum())
        found: np.ndarray = np.where(whole & judged, totals, 0.0)
        return found

    def _described(self) -> dict[str, Any]:
        return {
            "vocabulary": self.model.vocabulary.describe(),
            "text_tokenizer": self.model.text_tokenizer.fingerprint,
            "vision_tokenizer": self.model.vision_tokenizer.fingerprint,
        }
