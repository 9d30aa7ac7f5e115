"""Checkpoints whose files a test has written by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from model.checkpoint.checksums import safetensors_sums
from model.checkpoint.manifest import manifest_checksum


def publish_manifest(folder: Path, manifest: dict[str, Any], *, by_piece: bool = True) -> dict[str, Any]:
    """Add the checksums to `manifest` and write it. `by_piece` False: as before pieces had checksums of their own."""
    manifest = {name: value for name, value in manifest.items() if name != "manifest_crc32"}
    sums = {path.name: safetensors_sums(path) for path in sorted(folder.glob("*.safetensors"))}
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": f"{one.file:08x}"} for name, one in sums.items()
    }
    if by_piece:
        for name, one in sums.items():
            manifest["files"][name]["header_crc32"] = f"{one.header:08x}"
        for entry in manifest["keys"].values():
            for piece in entry["pieces"]:
                piece["crc32"] = f"{sums[piece['file']].tensors[piece['name']]:08x}"
    manifest["manifest_crc32"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def save_vision_tokenizer(folder: Path, model: Any, /, **changes: Any) -> None:
    """A checkpoint of an `IBQ` in `folder`; `changes` of its manifest."""
    from safetensors.torch import save_file

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
