"""A tiny run from captions to judged pictures, to compare true captions with shuffled ones.

Packing, training, generation and the judge are the real ones. The vision tokenizer is a stand-in with one code for the
content of each cell, so that what is measured is whether words and pictures were joined, in seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents.builder import DocumentBuilder, Picture
from data_pipeline.documents.tokenizers import load_text_tokenizer, train_sentencepiece
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage.segments import count_classes
from data_pipeline.storage.token_files import TokenFileWriter
from examples.shapes_world.judge import read_scene, shows
from examples.shapes_world.world import (
    COLORS,
    GRID,
    SHAPES,
    Item,
    caption,
    draw,
    held_out_items,
    make_scene,
    random_scene,
)
from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.config import ModelConfig
from model.vocabulary import Vocabulary, VocabularyConfig
from training.inference.evaluation import EvaluationPrompt

CONTENTS = [None, *((shape, color) for shape in SHAPES for color in COLORS)]
PIXELS = 48
TEXT_SIZE = 304
NUM_SCENES = 4000
STEPS = 500
SEQUENCE_LENGTH = 288  # three documents of about 90 tokens


class CellTokenizer:
    """Stand-in for a vision tokenizer: code = what a cell of 16 x 16 pixels shows, read by the judge."""

    factor = PIXELS // GRID
    codebook_size = len(CONTENTS)
    fingerprint = "cells"

    def encode(self, images: np.ndarray) -> np.ndarray:
        codes = np.zeros((len(images), GRID, GRID), np.int64)
        for image, grid in zip(images, codes, strict=True):
            for item in read_scene(image) or ():
                grid[item.row, item.column] = CONTENTS.index((item.shape, item.color))
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(draw(scene_of(grid), PIXELS)) for grid in codes])


def scene_of(codes: np.ndarray) -> tuple[Item, ...]:
    found = [(*CONTENTS[int(code)], *place) for place, code in np.ndenumerate(codes) if code]
    return make_scene([Item(*fields) for fields in found])


def vocabulary_config() -> VocabularyConfig:
    return VocabularyConfig(text_size=TEXT_SIZE, visual_size=len(CONTENTS), pad_multiple=32)


def prepare(folder: Path, *, shuffled: bool) -> Any:
    """Corpus, text tokenizer and packed rows below `folder`; the text tokenizer."""
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, 1) for _ in range(NUM_SCENES)]
    texts = [caption(scene) for scene in scenes]
    if shuffled:
        texts = [texts[index] for index in rng.permutation(len(texts))]
    template = "You are a helpful assistant for t2i task. USER:  ASSISTANT: 3*3"
    train_sentencepiece([*texts[:500], *[template] * 50], folder / "text_tokenizer", TEXT_SIZE, seed=1)
    tokenizer = load_text_tokenizer(folder / "text_tokenizer")
    vocabulary = Vocabulary.from_config(vocabulary_config())
    builder = DocumentBuilder(vocabulary, tokenizer)
    vision = CellTokenizer()
    (folder / "tokens").mkdir(parents=True)
    counts: dict[str, int] = {}
    with TokenFileWriter(folder / "tokens" / "000000") as writer:
        for number, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
            codes = vision.encode(np.asarray(draw(scene, PIXELS))[None])[0]
            document = builder.chat(number, "t2i", text, [], [Picture(codes)])
            writer.add(document.tokens, document.segments)
            found = count_classes(document.tokens, document.segments, vocabulary.visual_start)
            counts = {name: counts.get(name, 0) + count for name, count in found.items()}
        writer.finish(
            {
                "kind": "tokens",
                "num_documents": NUM_SCENES,
                "vocabulary": vocabulary.describe(),
                "text_tokenizer": tokenizer.fingerprint,
                "vision_tokenizer": vision.fingerprint,
                "sources": ["scenes"],
                "inputs": [],
                "counts_by_class": counts,
                "quarantined": {},
                "config_fingerprint": "cells",
            }
        )
    pack({"scenes": folder / "tokens"}, folder / "packed", PackConfig(sequence_length=SEQUENCE_LENGTH, seed=1))
    return tokenizer


def stage_config(folder: Path) -> Any:
    from training.config import DatasetEntry, OptimizerConfig, StageConfig, TrainConfig

    stage = StageConfig(
        name="stage",
        steps=STEPS,
        sequence_length=SEQUENCE_LENGTH,
        global_batch_size=4,
        micro_batch_size=4,
        objective={"name": "next_token", "loss_weights": {"visual": 1.0}},
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    )
    stage.data.datasets = {"scenes": DatasetEntry(path=str(folder / "packed"))}
    config = TrainConfig(
        run_folder=str(folder),
        stage=stage,
        model=ModelConfig(
            num_layers=3,
            hidden_size=96,
            ffn_hidden_size=256,
            num_attention_heads=3,
            num_query_groups=3,
            max_sequence_length=SEQUENCE_LENGTH,
            init_std=0.08,
            vocabulary=vocabulary_config(),
        ),
    )
    config.logging.wandb_mode = "disabled"
    config.checkpoint.every_steps = STEPS
    return config


def run(folder: str, shuffled: bool) -> dict[str, float]:
    """t2i accuracy on held-out combinations after a short training; one rank with its own process group."""
    from model.generation.settings import PhaseSampling, SamplingConfig
    from training.inference.evaluation import evaluate
    from training.inference.loading import load_decoder
    from training.inference.model import InferenceModel
    from training.stage import run_stage

    root = Path(folder)
    tokenizer = prepare(root, shuffled=shuffled)
    config = stage_config(root)
    run_stage(config)
    with CheckpointReader(latest_checkpoint(root / "stage")) as reader:
        decoder = load_decoder(reader, config.model, seed=None)
    model = InferenceModel(
        decoder,
        Vocabulary.from_config(vocabulary_config()),
        tokenizer,
        CellTokenizer(),
        max_sequence_length=SEQUENCE_LENGTH,
    )
    greedy = SamplingConfig(PhaseSampling(temperature=0.0), PhaseSampling(temperature=0.0), max_new_tokens=32)
    found = evaluate(model, {"t2i": HeldOutShapes()}, greedy)
    return {"t2i": found["t2i"]["accuracy"]}


class HeldOutShapes:
    """Every held-out combination of shape, colour and place, one to a picture."""

    name = "t2i"

    def prompts(self) -> list[EvaluationPrompt]:
        return [
            EvaluationPrompt("t2i", text=caption((item,)), target=(item,), image_size=(PIXELS, PIXELS))
            for item in held_out_items()
        ]

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool:
        return bool(images) and shows(images[0], prompt.target)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2] == "shuffled")))
