"""The certificate of a vision tokenizer: a checkpoint of ours and a released layout give the same codes and pixels.

The released side runs in `model.vision_tokenizer.plain_reference` from the files alone; ours runs as it encodes and decodes.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.conversion.sources import open_foreign
from model.conversion.tensors import TensorSource
from model.conversion.vision import expected_shapes, released_network
from model.errors import UserError
from model.vision_tokenizer import plain_reference
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.plain_reference import VisionSizes
from model.vision_tokenizer.wrapper import MODEL_PREFIX, config_from_manifest, load_weights

# Of two implementations in float32, in units of the largest value.
MAX_DIFFERENCE = 1e-4
NUM_IMAGES = 2
ROWS, COLUMNS = 4, 6  # codes of an image: not square, so that no transposed map passes


def certify(
    checkpoint: Path, folder: Path, *, sizes: VisionTokenizerConfig, cast: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare a checkpoint of ours with a folder (or file) of the released layout.

    Every tensor is compared bitwise; then images of noise and of smooth colours become codes, and codes become pixels, on
    both sides in float32. `sizes` stands in for a missing `config.yaml`. With `cast` (`bfloat16`) the weights of both sides
    are rounded to it first. `passed` is true when all tensors are equal and finite, every code agrees (but where the two
    best scores differ by rounding only) and no value differs by more than 1e-4 of the largest.
    """
    checkpoint = latest_checkpoint(checkpoint)
    source = open_foreign(folder)
    try:
        theirs = {name: _tensor(source, name) for name in expected_shapes(sizes) if name in source.tensors}
    finally:
        source.close()
    with CheckpointReader(checkpoint) as reader:
        config = config_from_manifest(reader.metadata, checkpoint)
        model = IBQ(config).eval()
        tensors = _compare_tensors(reader, theirs, config, cast)
        load_weights(model, reader)
    certificate: dict[str, Any] = {
        "mode": "codes",
        "message": "",
        "layout": "ibq",
        "checkpoint": str(checkpoint),
        "published": str(folder),
        "num_tensors": len(tensors),
        "num_different": sum(not one["equal"] for one in tensors.values()),
        "non_finite": [name for name, one in tensors.items() if not one["finite"]],
        "tensors": tensors,
        "functions": None,
    }
    same = not certificate["num_different"] and not certificate["non_finite"]
    if same:
        weights = {name: _rounded(value, cast) for name, value in theirs.items()}
        for parameter in model.parameters():
            parameter.data = _rounded(parameter.data, cast)
        network = released_network(folder, sizes)
        certificate["functions"] = _compare_functions(model, weights, VisionSizes.from_released(network), seed)
        same = certificate["functions"]["agree"]
    return {"passed": same} | certificate


def _tensor(source: TensorSource, name: str) -> torch.Tensor:
    info = source.tensors[name]
    content = np.empty((info.num_rows, info.row_bytes), np.uint8)
    source.read_rows(name, 0, info.num_rows, content)
    return torch.from_numpy(content.reshape(-1)).view(getattr(torch, info.dtype)).view(info.shape)


def _rounded(value: torch.Tensor, cast: str | None) -> torch.Tensor:
    return (value.to(getattr(torch, cast)) if cast else value).float()


def _compare_tensors(
    reader: CheckpointReader, theirs: dict[str, torch.Tensor], config: VisionTokenizerConfig, cast: str | None
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in expected_shapes(config):
        if name not in theirs:
            raise UserError("a tensor is missing", where=str(reader.folder), expected=name)
        mine, other = reader.read_full(MODEL_PREFIX + name), theirs[name]
        if cast:
            mine, other = _rounded(mine, cast), _rounded(other, cast)
        equal = mine.dtype == other.dtype and torch.equal(mine, other)
        found[name] = {"shape": list(mine.shape), "equal": equal, "finite": bool(torch.isfinite(mine).all())}
    return found


@torch.no_grad()
def _compare_functions(model: IBQ, weights: dict[str, torch.Tensor], sizes: VisionSizes, seed: int) -> dict[str, Any]:
    images = _images(sizes.factor, seed)
    their_latents = plain_reference.latents(weights, sizes, images)
    scores = plain_reference.code_scores(weights, their_latents)
    theirs, ours = scores.argmax(-1), model.encode(images).flatten(1)
    chosen = scores.gather(-1, ours[..., None])[..., 0]
    best = scores.amax(-1)
    # A code that was chosen against a rival of the same score, but for rounding, is no other function.
    tolerance = MAX_DIFFERENCE * scores.abs().amax(-1)
    explained = (theirs == ours) | (best - chosen <= tolerance)
    codes = theirs.view(len(images), ROWS, COLUMNS)
    expected, got = plain_reference.decode(weights, sizes, codes), model.decode(codes)
    gc.collect()
    pixel_difference = float((got - expected).abs().max())
    latent_difference = float((model.latents(images).flatten(2).transpose(1, 2) - their_latents).abs().max())
    return {
        "agree": bool(explained.all())
        and pixel_difference <= MAX_DIFFERENCE * max(1.0, float(expected.abs().max()))
        and latent_difference <= MAX_DIFFERENCE * max(1.0, float(their_latents.abs().max())),
        "against": "model.vision_tokenizer.plain_reference",
        "num_codes": theirs.numel(),
        "seed": seed,
        "code_agreement": float((theirs == ours).double().mean()),
        "max_latent_difference": latent_difference,
        "max_pixel_difference": pixel_difference,
    }


def _images(factor: int, seed: int) -> torch.Tensor:
    """[2, 3, 4f, 6f] in [-1, 1]: noise, and noise of a few pixels blown up to smooth colours."""
    generator = torch.Generator().manual_seed(seed)
    height, width = ROWS * factor, COLUMNS * factor
    noise = torch.rand((1, 3, height, width), generator=generator)
    few = torch.rand((1, 3, 3, 3), generator=generator)
    smooth = torch.nn.functional.interpolate(few, (height, width), mode="bilinear", align_corners=True)
    images = torch.cat([noise, smooth]) * 2 - 1
    assert len(images) == NUM_IMAGES
    return images
