"""Adapters of a checkpoint: merged into its weights, or on their own in the format of `peft`.

W' = W + alpha / rank * B A        (`model.backbone.adapters`)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from model.config import AdapterConfig, ModelConfig
from model.conversion.actions import PREFIX, Options, Outcome, check_split, config_of, to_checkpoint
from model.conversion.mappings import OUR_RULES, Mapped, mapped_tensors
from model.conversion.plan import Plan, Segment, Target, whole_piece
from model.conversion.record import write_json
from model.conversion.sources import CheckpointSource
from model.conversion.tensors import TensorInfo, cast_rows
from model.conversion.writer import Written, execute, refuse_existing
from model.errors import UserError

A, B = ".lora.a", ".lora.b"
WEIGHT = ".weight"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class MergedSource:
    """The weights of a checkpoint with its adapters in them; its optimizer and random streams are left out."""

    def __init__(self, source: CheckpointSource, config: ModelConfig):
        self.source, self.place, self.scale = source, source.place, config.adapter.scale
        weights = {name: info for name, info in source.tensors.items() if name.startswith(PREFIX)}
        self.tensors = {name: info for name, info in weights.items() if not name.endswith((A, B))}
        stems = {name: name.removesuffix(WEIGHT) for name in self.tensors if name.endswith(WEIGHT)}
        self._a = {name: self._whole(stem + A) for name, stem in stems.items() if stem + A in weights}

    def _whole(self, name: str) -> np.ndarray:
        info = self.source.tensors[name]
        return self._rows(name, info, 0, info.num_rows)

    def _rows(self, name: str, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """float32 [rows, columns]."""
        out = np.empty((stop - start, info.row_bytes), np.uint8)
        self.source.read_rows(name, start, stop, out)
        return cast_rows(out, info.dtype, "float32").view(np.float32).reshape(stop - start, -1)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> int | None:
        if name not in self._a:
            return self.source.read_rows(name, start, stop, out)
        info, b = self.tensors[name], name.removesuffix(WEIGHT) + B
        added = self._rows(b, self.source.tensors[b], start, stop) @ self._a[name]
        merged = self._rows(name, info, start, stop) + np.float32(self.scale) * added
        out[:] = cast_rows(merged.view(np.uint8).reshape(stop - start, -1), "float32", info.dtype)
        return None

    def rows_at_once(self, name: str) -> int | None:
        return self.source.rows_at_once(name)

    def identity(self) -> Any:
        return ["merged", self.source.identity()]

    def verify(self) -> None:
        self.source.verify()

    def close(self) -> None:
        self.source.close()


def check_adapters(config: ModelConfig, place: str) -> None:
    if config.adapter.rank == 0:
        raise UserError("the checkpoint has no adapters", where=place, expected="a model with adapter.rank above 0")
    if config.adapter.tokens != "all":
        raise UserError(
            "the adapters act on copies of images alone: no weights do the same without them",
            where=place,
            expected="adapter.tokens=all",
            fix="use the checkpoint as it is",
        )


def merge(source_path: Path, target: Path, options: Options) -> Outcome:
    """A checkpoint without adapters that computes the same: a start for training, evaluation and other conversions."""
    refuse_existing(target)
    source = CheckpointSource(source_path)
    try:
        config = config_of(source)
        check_adapters(config, source.place)
        merged = MergedSource(source, config)
        config = dataclasses.replace(config, adapter=AdapterConfig())
        check_split(config, options)
        places = {one.ours: one for one in mapped_tensors(OUR_RULES, config)}
        targets = []
        for name, info in merged.tensors.items():
            place = places[name.removeprefix(PREFIX)]
            targets.append(Target(name, info, [Segment(merged, name, 0, info.num_rows)], place.rule, place.layer))
        derived = ("keys", "files", "manifest_crc32", "layout", "conversion", "format_version")
        metadata: dict[str, Any] = {name: value for name, value in source.manifest.items() if name not in derived}
        metadata["model"] = dataclasses.asdict(config)
        what = {"action": "merge", "tensor": options.tensor, "pipeline": options.pipeline}
        return to_checkpoint(target, targets, [merged], config, metadata, what, options)
    finally:
        source.close()


def to_peft(source_path: Path, target: Path, options: Options) -> Outcome:
    """The adapters in the format of `peft`, for the model in the layout that transformers runs (qwen3, emu35)."""
    refuse_existing(target)
    source = CheckpointSource(source_path)
    try:
        config = config_of(source)
        check_adapters(config, source.place)
        targets, modules = [], []
        for one in mapped_tensors(OUR_RULES, config):
            if PREFIX + one.ours.removesuffix(WEIGHT) + A in source.tensors:
                targets += peft_targets(source, one)
                modules += [name.removesuffix(WEIGHT).rpartition(".")[2] for name, _ in one.theirs]
        for one_target in targets:
            one_target.pieces = [whole_piece(one_target, PEFT_FILE, one_target.name)]
        kept: list[Written] = []

        def finish(folder: Path, written: Written) -> None:
            kept.append(written)
            write_json(folder / PEFT_CONFIG, peft_config(config.adapter, sorted(set(modules))))

        plan = Plan({"action": "to_peft"}, targets, [source])
        result = execute(plan, target, finish, threads=options.threads)
    finally:
        source.close()
    return Outcome(config, None, result, kept[0] if kept else None)


def peft_targets(source: CheckpointSource, one: Mapped) -> list[Target]:
    """A and B of each of their layers: B's rows are those of the weight, A is that of our fused layer."""
    stem = PREFIX + one.ours.removesuffix(WEIGHT)
    a, b = source.tensors[stem + A], source.tensors[stem + B]
    targets = []
    for index, (name, shape) in enumerate(one.theirs):
        place = f"base_model.model.{name.removesuffix(WEIGHT)}"
        rows = [Segment(source, stem + B, start, count) for start, count in one.inverse(index)]
        targets.append(Target(f"{place}.lora_A.weight", a, [Segment(source, stem + A, 0, a.num_rows)]))
        targets.append(Target(f"{place}.lora_B.weight", TensorInfo((shape[0], b.shape[1]), b.dtype), rows))
    return targets


def peft_config(adapter: AdapterConfig, modules: list[str]) -> dict[str, Any]:
    """What `peft.LoraConfig` reads."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
