"""From a checkpoint folder to a decoder and its tokenizers, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.documents.tokenizers import TextTokenizer, load_text_tokenizer
from model.checkpoint.manifest import CheckpointManifest
from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.config import ModelConfig
from model.conversion.hugging_face import model_config
from training.inference.choice import check_fingerprint, check_kind, check_not_published, tokenizer_folder


class VisionTokenizer(Protocol):
    """Pictures to codes and back; see `model.vision_tokenizer`."""

    factor: int
    codebook_size: int
    fingerprint: str

    def encode(self, images: np.ndarray) -> np.ndarray: ...
    def decode(self, codes: np.ndarray) -> np.ndarray: ...
    def codebook(self) -> Any: ...


@dataclass
class LoadedModel:
    decoder: Any  # model.generation.image_decoder.ImageDecoder
    config: ModelConfig
    text_tokenizer: TextTokenizer
    vision_tokenizer: VisionTokenizer
    image_format: str  # of the documents that it was trained on
    folder: Path  # of the checkpoint
    dida: dict[str, Any] | None = None  # what the manifest says of parallel image decoding; None: not trained for it
    diagonal: dict[str, Any] | None = None  # the same of decoding by diagonals
    rollout: dict[str, Any] | None = None  # how reinforcement learning drew its answers; None: it was not trained so


def load_checkpoint(
    checkpoint: Path | str,
    text_tokenizer: Path | str | None = None,
    vision_tokenizer: Path | str | None = None,
    *,
    untrained: bool = False,
) -> LoadedModel:
    """Loads the checkpoint that a folder means; arguments as of `InferenceModel.load`."""
    check_not_published(Path(checkpoint))
    folder = latest_checkpoint(checkpoint)
    with CheckpointReader(folder) as reader:
        manifest = CheckpointManifest.of(reader.manifest, folder)
        check_kind(manifest, folder)
        text = load_text_tokenizer(tokenizer_folder(manifest, folder, "text_tokenizer", text_tokenizer))
        check_fingerprint(manifest, folder, "text_tokenizer", text.fingerprint)
        vision = load_vision(tokenizer_folder(manifest, folder, "vision_tokenizer", vision_tokenizer))
        check_fingerprint(manifest, folder, "vision_tokenizer", vision.fingerprint)
        config = model_config(manifest.model or {}, str(folder))
        decoder = load_decoder(reader, config, (manifest.config or {})["seed"] if untrained else None)
    values = manifest.values
    said = (values.get(name) for name in ("dida", "diagonal", "rollout"))
    return LoadedModel(decoder, config, text, vision, manifest.image_format, folder, *said)


def load_vision(folder: Path) -> VisionTokenizer:
    from model.vision_tokenizer import load_vision_tokenizer

    return load_vision_tokenizer(folder)


def load_decoder(reader: CheckpointReader, config: ModelConfig, seed: int | None) -> Any:
    """An `ImageDecoder` with the checkpoint's weights, or with fresh ones drawn from `seed`."""
    from model.backbone.transformer import build_model
    from model.generation.image_decoder import ImageDecoder
    from model.parallel import groups
    from model.parallel.sharding import load_weights

    if not groups.is_initialized():
        groups.initialize(rank=0, world_size=1)
    model = build_model(config, seed=seed)
    if seed is None:
        load_weights(model, reader)
    return ImageDecoder(model.eval())
