"""Synthetic token files for the tests of packing and loading. Every token of a corpus is unique, so each can be traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileWriter
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=1_000_000, reserved_size=32, visual_size=1_000_000))
# (kind, length, flags)
Spec = tuple[int, int, int]


class Corpus:
    """Makes documents from specs, handing out each text id and each visual id once."""

    def __init__(self) -> None:
        self.next_text = 0
        self.next_visual = VOCABULARY.visual_start
        self.num_documents = 0

    def document(self, specs: list[Spec]) -> tuple[np.ndarray, np.ndarray]:
        segments = np.zeros(len(specs), SEGMENT_DTYPE)
        parts = []
        for segment, (kind, length, flags) in zip(segments, specs, strict=True):
            segment["kind"], segment["length"], segment["flags"] = kind, length, flags
            if kind == Kind.IMAGE:
                segment["grid_height"], segment["grid_width"] = 1, max(0, length - 2)
                parts.append(self.image(length))
            else:
                parts.append(np.arange(self.next_text, self.next_text + length))
                self.next_text += length
        segments["start"] = np.cumsum(segments["length"]) - segments["length"]
        segments["document"] = self.num_documents
        if len(segments):
            segments["flags"][0] |= Flag.DOCUMENT_START
        self.num_documents += 1
        return (np.concatenate(parts) if parts else np.zeros(0)).astype(np.int32), segments

    def image(self, length: int) -> np.ndarray:
        """BOI, codes, EOI."""
        codes = np.arange(self.next_visual, self.next_visual + length)
        self.next_visual += length
        codes[0], codes[-1] = VOCABULARY.boi, VOCABULARY.eoi
        return codes


def text(length: int, splittable: bool = True) -> list[Spec]:
    flags = Flag.SPLITTABLE if splittable else 0
    return [(Kind.STRUCTURE, 1, 0), (Kind.TEXT, length, flags), (Kind.STRUCTURE, 1, 0)]


def captioned(caption: int, image: int) -> list[Spec]:
    return [(Kind.STRUCTURE, 1, 0), (Kind.TEXT, caption, 0), (Kind.IMAGE, image, 0), (Kind.STRUCTURE, 1, 0)]


def video(num_frames: int, words: int, image: int) -> list[Spec]:
    frames = [(Kind.TRANSCRIPT, words, 0), (Kind.IMAGE, image, 0)] * num_frames
    return [(Kind.STRUCTURE, 1, 0), *frames, (Kind.STRUCTURE, 1, 0)]


def write_token_file(
    prefix: Path,
    documents: list[tuple[np.ndarray, np.ndarray]],
    more: dict[str, bytes] | None = None,
    *,
    with_crc: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    manifest = {
        "kind": "tokens",
        "num_documents": len(documents),
        "vocabulary": VOCABULARY.describe(),
        "text_tokenizer": "text-1",
        "vision_tokenizer": "vision-1",
        "sources": [prefix.parent.name],
        "inputs": [],
        "quarantined": {},
    }
    with TokenFileWriter(prefix, with_crc=with_crc) as writer:
        for tokens, segments in documents:
            writer.add(tokens, segments)
        return writer.finish(manifest | changes, more)


def write_sources(folder: Path, sources: dict[str, list[list[Spec]]], **changes: Any) -> dict[str, Path]:
    """Token folders of the sources, several files each."""
    corpus = Corpus()
    for name, specs in sources.items():
        documents = [corpus.document(spec) for spec in specs]
        for number, first in enumerate(range(0, len(documents), 40)):
            write_token_file(folder / name / f"{number:06d}", documents[first : first + 40], **changes)
    return {name: folder / name for name in sources}


def mixed_sources(scale: int = 1, seed: int = 0) -> dict[str, list[list[Spec]]]:
    """Pairs, videos and text; about a tenth of the tokens are splittable text. For rows of 512 tokens."""
    random = np.random.default_rng(seed)
    pairs = [captioned(int(random.integers(5, 25)), 45) for _ in range(300 * scale)]
    clips = [video(int(random.integers(2, 7)), int(random.integers(4, 14)), 45) for _ in range(120 * scale)]
    plain = [text(int(random.integers(20, 400))) for _ in range(26 * scale)]
    return {"pairs": pairs, "clips": clips, "text": plain}
