"""Finds values that are not finite: in what is about to be saved, and in a checkpoint that may be loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint.reader import read_manifest

MODEL_PREFIX = "model/"


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity. One pass without a temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def non_finite_keys(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors with a value that is not finite, each once."""
    return list(dict.fromkeys(key for key, tensor in tensors if not is_finite(tensor)))


def describe_non_finite(keys: list[str]) -> str:
    """For people: "the weights are not finite (model/a.weight and 3 more tensors)"."""
    if not keys:
        return "the weights or moments of another rank are not finite"
    what = "the weights" if any(key.startswith(MODEL_PREFIX) for key in keys) else "the optimizer's moments"
    more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
    return f"{what} are not finite ({sorted(keys)[0]}{more})"


def non_finite_in(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Keys of an undamaged checkpoint that are not finite, in this rank's share of the files.

    A manifest that says `non_finite` was written after the look; others are looked at here.
    """
    manifest = read_manifest(folder)
    if "non_finite" in manifest:
        return list(manifest["non_finite"])
    keys_of = {
        (piece["file"], piece["name"]): key for key, entry in manifest["keys"].items() for piece in entry["pieces"]
    }
    found: list[str] = []
    for index, name in enumerate(sorted(manifest["files"])):
        if index % world_size == rank and name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt") as file:
                    names = list(file.keys())
                    found += non_finite_keys((keys_of.get((name, one), one), file.get_tensor(one)) for one in names)
            except (OSError, SafetensorError) as error:
                found.append(f"{name} cannot be read: {error}")
    return found
