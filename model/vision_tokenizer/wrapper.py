"""The trained tokenizer as the rest of the project uses it: numpy images in, codes out, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.errors import UserError
from model.vision_tokenizer.config import VisionTokenizerConfig, check_checkpoint_kind
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.tiling import decode_tiled, encode_tiled

MODEL_PREFIX = "model/"
PIXELS_AT_ONCE = 1 << 19  # bounds the memory of one forward pass
CPU_PIXELS_AT_ONCE = 1 << 17  # feature maps that fit its caches go faster
WHOLE_SIDE_PIXELS = 2048  # images with a longer side go in tiles, see model.vision_tokenizer.tiling


def to_model_range(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]; channels last in memory."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], clamped and rounded."""
    scaled = ((images.float() + 1.0) * 127.5).clamp(0, 255).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class VisionTokenizer:
    """Encodes and decodes batches of images; never trains. Sides above `whole_side` pixels go in tiles."""

    def __init__(self, model: IBQ, fingerprint: str, whole_side: int = WHOLE_SIDE_PIXELS):
        self.model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint  # of the configuration and every weight
        self.factor = model.config.factor  # pixels of a side per code
        self.codebook_size = model.config.n_embed
        self.whole_side = whole_side

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Codes int64 [B, H/f, W/f] of images uint8 [B, H, W, 3]; both sides multiples of f."""
        return encode_pixels(self.model, images, self.whole_side)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Images uint8 [B, h*f, w*f, 3] of integer codes [B, h, w]."""
        assert codes.ndim == 3, codes.shape
        height, width = (side * self.factor for side in codes.shape[1:])
        ids = torch.from_numpy(np.ascontiguousarray(codes, dtype=np.int64))
        assert ids.numel() == 0 or (ids.min() >= 0 and ids.max() < self.codebook_size), "a code out of range"
        device = device_of(self.model)
        parts = [
            to_pixels(decode_tiled(self.model, ids[some].to(device), max(1, self.whole_side // self.factor)))
            for some in batches_of(len(ids), height * width, device)
        ]
        return np.concatenate(parts) if parts else np.empty((0, height, width, 3), dtype=np.uint8)

    def codebook(self) -> torch.Tensor:
        """float32 [codes, D], a vector a code."""
        return self.model.quantize.embedding.weight.detach().float()


@torch.inference_mode()
def encode_pixels(model: IBQ, images: np.ndarray, whole_side: int = WHOLE_SIDE_PIXELS) -> np.ndarray:
    """Codes int64 [B, H/f, W/f] of images uint8 [B, H, W, 3], both sides multiples of f; above `whole_side` in tiles."""
    assert images.dtype == np.uint8, images.dtype
    batch, height, width, channels = images.shape
    side = model.config.factor
    assert (height % side, width % side, channels) == (0, 0, 3), f"{images.shape} with factor {side}"
    if not model.config.patch_local_encoder:
        return _encode_whole(model, images, whole_side)
    # A code depends on its own patch alone, and pictures repeat patches (a plain ground): each is encoded once.
    rows, columns = height // side, width // side
    grid = images.reshape(batch, rows, side, columns, side, channels).transpose(0, 1, 3, 2, 4, 5)
    patches = np.ascontiguousarray(grid).reshape(batch * rows * columns, side * side * channels)
    as_bytes = patches.view(np.dtype((np.void, patches.shape[1]))).ravel()
    _, first_places, numbers = np.unique(as_bytes, return_index=True, return_inverse=True)
    distinct = patches[first_places].reshape(-1, side, side, channels)
    return _encode_whole(model, distinct, whole_side).ravel()[numbers].reshape(batch, rows, columns)


def _encode_whole(model: IBQ, images: np.ndarray, whole_side: int) -> np.ndarray:
    (height, width), factor, device = images.shape[1:3], model.config.factor, device_of(model)
    parts = [
        encode_tiled(model, to_model_range(images[some]).to(device), max(1, whole_side // factor)).cpu().numpy()
        for some in batches_of(len(images), height * width, device)
    ]
    return np.concatenate(parts) if parts else np.empty((0, height // factor, width // factor), dtype=np.int64)


def device_of(model: IBQ) -> torch.device:
    return model.quantize.embedding.weight.device


def batches_of(num_images: int, pixels_per_image: int, device: torch.device) -> list[slice]:
    """Images that go through the model together."""
    at_once = CPU_PIXELS_AT_ONCE if device.type == "cpu" else PIXELS_AT_ONCE
    step = max(1, at_once // max(1, pixels_per_image))
    return [slice(start, start + step) for start in range(0, num_images, step)]


def load_vision_tokenizer(folder: Path | str) -> VisionTokenizer:
    """The tokenizer of a stage folder (its newest checkpoint) or of a checkpoint folder."""
    checkpoint = latest_checkpoint(folder)
    with CheckpointReader(checkpoint) as reader:
        check_checkpoint_kind(reader.metadata.get("kind"), checkpoint)
        config = config_from_manifest(reader.metadata, checkpoint)
        model = IBQ(config)
        load_weights(model, reader)
    # The same memory layout as in training: codes then do not depend on who computes them.
    model.channels_last()
    return VisionTokenizer(model, fingerprint_of(model))


def config_from_manifest(metadata: dict[str, Any], checkpoint: Path) -> VisionTokenizerConfig:
    """The model configuration under `model` in a checkpoint's manifest."""
    try:
        return VisionTokenizerConfig(**metadata["model"])
    except (KeyError, TypeError) as error:
        raise UserError(
            "the checkpoint's manifest does not describe a vision tokenizer's sizes",
            where=str(checkpoint),
            expected="model: {ch, ch_mult, ...}",
            got=str(error),
        ) from None


@torch.no_grad()
def load_weights(model: IBQ, reader: Any) -> None:
    """Fill `model` from a `ShardReader`; all missing and misshaped tensors are listed at once."""
    present = {
        key.removeprefix(MODEL_PREFIX)
        for key in reader.keys()  # noqa: SIM118 - a reader is no mapping
        if key.startswith(MODEL_PREFIX)
    }
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in present]
    problems += [f"unknown: {name}" for name in sorted(present - expected.keys())]
    for name, tensor in expected.items():
        if name in present:
            shape = tuple(reader.global_shape(MODEL_PREFIX + name))
            if shape != tuple(tensor.shape):
                problems.append(f"{name}: {shape} instead of {tuple(tensor.shape)}")
    if problems:
        raise UserError("the checkpoint does not fit the vision tokenizer's configuration", got="; ".join(problems))
    for name, tensor in expected.items():
        tensor.copy_(reader.read(MODEL_PREFIX + name, (0,) * tensor.dim(), tuple(tensor.shape)))


def fingerprint_of(model: IBQ) -> str:
    """Hexadecimal digest of the configuration and all weights: the same for equal tokenizers anywhere."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
