"""The stage that trains the text tokenizer on the texts of raw shards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.documents.prompts import EMPTY_PROMPTS
from data_pipeline.documents.tokenizers import read_description, train_sentencepiece
from data_pipeline.kinds.named_parts import PartsConfig
from data_pipeline.kinds.registry import KindSet, read_shard
from data_pipeline.sources import Sample, SampleError
from data_pipeline.sources.patterns import find_shards
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from data_pipeline.storage.format import checksum_file
from training.config import TrainConfig
from training.tokenizers.tokenizer_options import TextTokenizerOptions

# Raised when the same texts and options would give another tokenizer than before.
CODE_VERSION = 1

# What every chat document says, so that it costs few tokens whatever the corpora are.
_TEMPLATE_TEXTS = (*EMPTY_PROMPTS, "0 1 2 3 4 5 6 7 8 9 * 64*64")


class TextTokenizer:
    """Trains a SentencePiece model in one go; a `training.contracts.objective.FittedObjective`."""

    Options = TextTokenizerOptions

    def __init__(self, config: TrainConfig, options: TextTokenizerOptions):
        self.config, self.options = config, options

    @file_errors_are_user_errors("the corpora or the stage's folder")
    def fit(self) -> dict[str, Any]:
        """Train the tokenizer and publish it in the stage's folder, `run_folder`/`stage.name`.

        Nothing is done where it is there already, of the same texts, options and seed.
        """
        config, options = self.config, self.options
        target = Path(config.run_folder) / config.stage.name
        started = time.monotonic()
        shards = find_shards(options.corpora, "stage.objective.corpora")
        inputs = {
            "code_version": CODE_VERSION,
            "options": described(options),
            "seed": config.seed,
            "shards": {str(path): checksum_file(path) for path in shards},
        }
        description = read_description(target)
        skipped = description is not None and description.get("inputs") == inputs
        num_bytes = 0
        if not skipped:
            counted = CountedTexts(training_texts(options, shards), options.max_bytes)
            train_sentencepiece(
                counted,
                target,
                options.size,
                seed=config.seed,
                character_coverage=options.character_coverage,
                inputs=inputs,
            )
            num_bytes = counted.num_bytes
        return {
            "name": config.stage.name,
            "size": options.size,
            "text_bytes": num_bytes,
            "num_shards": len(shards),
            "skipped": skipped,
            "folder": str(target),
            "wall_seconds": time.monotonic() - started,
        }


def described(options: TextTokenizerOptions) -> dict[str, Any]:
    """What decides the tokenizer. Kinds and parts are left out where they say what was so before they could be chosen."""
    optional = {"kinds": bool(options.kinds), "parts": options.parts != PartsConfig()}
    return {name: value for name, value in asdict(options).items() if optional.get(name, True)}


def training_texts(options: TextTokenizerOptions, shards: list[Path]) -> Iterator[str]:
    """The template, the extra texts, then one sample of each shard in turn, so that a limit on the
    bytes cuts all corpora alike."""
    yield from _TEMPLATE_TEXTS * options.template_copies
    yield from options.extra_texts
    kinds = KindSet(options.kinds, options.parts)
    streams = [shard_texts(path, kinds) for path in shards]
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text


def shard_texts(path: Path, kinds: KindSet) -> Iterator[str]:
    """The texts of a shard's samples. Bad ones are left out here; tokenization counts them."""
    for sample in read_shard(path, kinds):
        if isinstance(sample, Sample):
            with contextlib.suppress(SampleError):
                yield from kinds[sample.kind].texts(sample)


class CountedTexts:
    """Passes texts on until they make `max_bytes`, and counts them."""

    def __init__(self, texts: Iterator[str], max_bytes: int):
        self.texts = texts
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if self.num_bytes >= self.max_bytes:
                return
            self.num_bytes += len(text.encode())
            yield text
