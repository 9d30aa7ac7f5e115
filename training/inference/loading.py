"""From a checkpoint folder to a decoder and its tokenizers, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.documents.tokenizers import TextTokenizer, load_text_tokenizer
from model.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest
from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.config import AdapterConfig, ModelConfig
from model.errors import UserError
from model.vocabulary import VocabularyConfig


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
        config = model_config(manifest.model or {})
        decoder = load_decoder(reader, config, (manifest.config or {})["seed"] if untrained else None)
    values = manifest.values
    said = (values.get(name) for name in ("dida", "diagonal", "rollout"))
    return LoadedModel(decoder, config, text, vision, manifest.image_format, folder, *said)


def check_not_published(folder: Path) -> None:
    """Refuses a folder in a published layout, which `convert from_hf` turns into a checkpoint."""
    ours = (folder / MANIFEST_NAME).exists()
    if not ours and (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        raise UserError(
            "this is a published checkpoint, not one of ours",
            where=str(folder),
            expected="a stage folder or a checkpoint folder",
            fix=f"nextstate convert from_hf source={folder} target=FOLDER, and then checkpoint=FOLDER",
        )


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` that a manifest holds as a plain dictionary."""
    adapter = AdapterConfig(**values.get("adapter", {}))
    return ModelConfig(**values | {"vocabulary": VocabularyConfig(**values["vocabulary"]), "adapter": adapter})


def check_kind(manifest: CheckpointManifest, folder: Path) -> None:
    if manifest.kind != "transformer":
        raise UserError(
            "this checkpoint cannot generate",
            where=str(folder),
            expected="a checkpoint of kind transformer",
            got=str(manifest.kind),
            fix="name the folder of a pretraining or fine-tuning stage",
        )
    if manifest.model is None:
        raise UserError("the checkpoint's manifest is damaged", where=str(folder), expected="its model")


def tokenizer_folder(manifest: CheckpointManifest, checkpoint: Path, name: str, given: Path | str | None) -> Path:
    """Where a tokenizer is: `given`, inside the checkpoint, or the recorded place below its run folder."""
    if given is not None:
        return Path(given)
    place = manifest.tokenizer_place(name, checkpoint)
    if place is None:
        raise UserError(
            f"the checkpoint does not say which {name} it was trained with", where=str(checkpoint), fix=f"{name}=FOLDER"
        )
    return place


def check_fingerprint(manifest: CheckpointManifest, checkpoint: Path, name: str, fingerprint: str) -> None:
    recorded = manifest.tokenizer(name)
    if recorded is not None and recorded.fingerprint != fingerprint:
        raise UserError(
            f"the {name} is not the one that the checkpoint was trained with",
            where=str(checkpoint),
            expected=f"fingerprint {recorded.fingerprint}",
            got=fingerprint,
            fix=f"{name}=FOLDER of the right one",
        )


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
