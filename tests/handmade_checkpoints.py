"""The manifest of a checkpoint whose files a test has written by hand."""

from __future__ import annotations

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
