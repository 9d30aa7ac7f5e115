"""What a checkpoint that is not ours holds, from its headers and its config.json; no weights are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.conversion import hugging_face
from model.conversion.actions import HEAD, Options, expected_tensors
from model.conversion.checks import check_tensors
from model.conversion.mappings import LAYOUTS, VISION_LAYOUT
from model.conversion.sources import TORCH_SUFFIXES, open_foreign, safetensors_paths
from model.conversion.tensors import TensorInfo
from model.errors import Problems, UserError


def looks_foreign(path: Path) -> bool:
    """Is this a file or folder of weights in a format that `convert` reads?"""
    if path.is_dir():
        return bool(safetensors_paths(path)) or any(file.suffix in TORCH_SUFFIXES for file in path.iterdir())
    return path.suffix in (".safetensors", *TORCH_SUFFIXES)


def describe_foreign(path: Path, model: ModelConfig | None, num_shown: int) -> dict[str, Any]:
    """Files, tensors, dtypes and layout; with `model`, every way in which it does not fit."""
    source = open_foreign(path)
    try:
        tensors, files = source.tensors, source.identity()
    finally:
        source.close()
    values = hugging_face.read_config(path) or {}
    layout = detect_layout(values, tensors)
    answer: dict[str, Any] = {
        "kind": "foreign checkpoint",
        "path": str(path),
        "layout": layout,
        "architecture": ", ".join(values.get("architectures") or []) or None,
        "num_files": len(files),
        "bytes": sum(size for _, size, _ in files),
        "num_tensors": len(tensors),
        "num_parameters": sum(info.num_rows * info.row_elements for info in tensors.values()),
        "dtypes": dict(Counter(info.dtype for info in tensors.values())),
        "tied": HEAD not in tensors if layout in LAYOUTS else None,
        "tensors": {name: f"{info.dtype} {list(info.shape)}" for name, info in sorted(tensors.items())[:num_shown]},
    }
    if model is not None:
        answer["mismatches"] = mismatches(layout, values, tensors, model)
    return answer


def detect_layout(values: dict[str, Any], tensors: dict[str, TensorInfo]) -> str | None:
    """By config.json, otherwise by names that only one layout has."""
    for layout in LAYOUTS.values():
        if values.get("model_type") == layout.model_type:
            return layout.name
    if "quantize.embedding.weight" in tensors and "encoder.conv_in.weight" in tensors:
        return VISION_LAYOUT
    return None


def mismatches(
    layout: str | None, values: dict[str, Any], tensors: dict[str, TensorInfo], model: ModelConfig
) -> list[str]:
    """What `from_hf model=...` would refuse."""
    if layout not in LAYOUTS:
        return [f"layout {layout or 'unknown'} is not that of a language model"]
    problems = Problems()
    hugging_face.check_config(values, model, problems, untie=False)
    found = list(problems.found)
    expected = expected_tensors(LAYOUTS[layout], model, tensors, Options())
    try:
        check_tensors("", tensors, expected, None)
    except UserError as error:
        found += [line.strip() for line in error.got.splitlines()[1:]]
    return found
