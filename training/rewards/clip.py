"""Scorers of the CLIP family, from a folder in the format of transformers' `CLIPModel`.

CLIP itself measures whether a picture shows what a text says; PickScore and HPS are such models trained further on
people's choices. Weights are read from safetensors only: a pickle is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from model.durable import crc32_of
from model.errors import UserError
from training.rewards.base import Answer


@dataclass
class ClipSimilarity:
    """Cosine between the prompt and the answer's pictures, in [-1, 1]; the mean over several pictures."""

    folder: str  # config.json, model.safetensors, tokenizer files, preprocessor_config.json
    device: str = "cpu"
    batch_size: int = 32
    name: ClassVar[str] = "clip_similarity"

    def __post_init__(self) -> None:
        self._model, self._tokenizer, self._preparation = load_clip(Path(self.folder), self.device)
        self.version = f"1+{crc32_of(Path(self.folder) / 'model.safetensors')}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """An answer without a picture has the lowest score that there is."""
        pairs = [
            (index, answer.prompt, image)
            for index, answer in enumerate(answers)
            for image in answer.images
            if image is not None
        ]
        found: dict[int, list[float]] = {}
        for first in range(0, len(pairs), self.batch_size):
            batch = pairs[first : first + self.batch_size]
            cosines = self._cosines([text for _, text, _ in batch], [image for _, _, image in batch])
            for (index, _, _), cosine in zip(batch, cosines, strict=True):
                found.setdefault(index, []).append(cosine)
        means = {index: float(np.mean(values)) for index, values in found.items()}
        return [self.unit() * means.get(index, -1.0) for index in range(len(answers))]

    def unit(self) -> float:
        """What a cosine of 1 is worth."""
        return 1.0

    def _cosines(self, texts: Sequence[str], images: Sequence[np.ndarray]) -> list[float]:
        import torch

        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        pixels = torch.from_numpy(np.stack([self._preparation.prepared(image) for image in images]))
        with torch.inference_mode():
            output = self._model(
                input_ids=tokens["input_ids"].to(self.device),
                attention_mask=tokens["attention_mask"].to(self.device),
                pixel_values=pixels.to(self.device),
            )
            text, image = (
                torch.nn.functional.normalize(embeds.float(), dim=-1)
                for embeds in (output.text_embeds, output.image_embeds)
            )
            cosines: list[float] = (text * image).sum(dim=-1).tolist()
        return cosines


@dataclass
class ClipPreference(ClipSimilarity):
    """The cosine times the model's own temperature, as PickScore and HPS say it."""

    name: ClassVar[str] = "clip_preference"

    def unit(self) -> float:
        return float(self._model.logit_scale.detach().exp())


@dataclass(frozen=True)
class Preparation:
    """Pictures as a CLIP reads them: the shorter side to `size`, the middle square, colours normalised."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepared(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> float32 [3, size, size]."""
        height, width = picture.shape[:2]
        scale = self.size / min(height, width)
        size = max(self.size, round(width * scale)), max(self.size, round(height * scale))
        resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = (resized.width - self.size) // 2, (resized.height - self.size) // 2
        pixels = np.asarray(resized.crop((left, top, left + self.size, top + self.size)), np.float32) / 255
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def load_clip(folder: Path, device: str) -> tuple[Any, Any, Preparation]:
    """(model, tokenizer, preparation). Raises `UserError` where the folder does not hold them."""
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise UserError(
            "scorers of the CLIP family need transformers", got=str(error), fix="pip install transformers"
        ) from error
    try:
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        crop = values["crop_size"]
        size = int(crop["height"] if isinstance(crop, dict) else crop)
        preparation = Preparation(size, tuple(values["image_mean"]), tuple(values["image_std"]))
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        model = model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the CLIP model cannot be loaded",
            where=str(folder),
            expected="config.json, model.safetensors, preprocessor_config.json and the tokenizer's files",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
        ) from error
    return model, tokenizer, preparation
