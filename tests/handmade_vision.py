"""A vision tokenizer's checkpoint, of real but untrained weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from handmade_checkpoints import publish_manifest
from safetensors.torch import save_file

from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import initialize_weights

TINY = VisionTokenizerConfig(
    ch=8,
    ch_mult=[1, 1, 2, 2],
    num_res_blocks=1,
    attn_resolutions=[6],
    resolution=48,
    z_channels=8,
    embed_dim=8,
    n_embed=64,
    norm_groups=4,
)


def save_vision_tokenizer(folder: Path, model: IBQ | None = None, /, **changes: Any) -> IBQ:
    """Publish `model`, by default a tiny one; `changes` are keys of the manifest."""
    if model is None:
        model = IBQ(TINY)
        initialize_weights(model, 0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model/{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "rank_00000.safetensors")
    keys = {
        name: {
            "global_shape": list(tensor.shape),
            "dtype": "float32",
            "pieces": [
                {
                    "file": "rank_00000.safetensors",
                    "name": name,
                    "offset": [0] * tensor.dim(),
                    "shape": list(tensor.shape),
                }
            ],
        }
        for name, tensor in tensors.items()
    }
    manifest = {
        "format_version": 1,
        "kind": "vision_tokenizer",
        "model": dataclasses.asdict(model.config),
        "keys": keys,
    }
    publish_manifest(folder, manifest | changes)
    return model
