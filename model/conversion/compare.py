"""Is an export the same model as a checkpoint of ours, tensor by tensor? Streams both; builds nothing."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.checksums import join_crc32
from model.conversion import vision
from model.conversion.actions import EMBEDDING, HEAD, PREFIX, check_model, config_of, identify
from model.conversion.actions import Options as ActionOptions
from model.conversion.mappings import VISION_LAYOUT, find_layout, mapped_tensors
from model.conversion.plan import Segment, Target
from model.conversion.sources import CheckpointSource, open_foreign
from model.conversion.tensors import TensorInfo, TensorSource
from model.conversion.writer import Block, gather, run_all, split_rows


def compare(checkpoint: Path, export: Path, layout_name: str, threads: int = 4) -> dict[str, Any]:
    """`passed`, and by name: checksums of the export's tensors, and those that are missing, extra or different."""
    ours, theirs = CheckpointSource(checkpoint), open_foreign(export)
    try:
        pairs = _pairs(ours, theirs, layout_name, export)
        missing = [name for name in pairs if name not in theirs.tensors]
        extra = [name for name in theirs.tensors if name not in pairs]
        present = {name: target for name, target in pairs.items() if name in theirs.tensors}
        misshaped = [name for name, one in present.items() if theirs.tensors[name] != one.info]
        different, sums = _contents(
            {name: one for name, one in present.items() if name not in misshaped}, theirs, threads
        )
        ours.verify()
    finally:
        ours.close()
        theirs.close()
    return {
        "mode": "keys",
        "passed": not (missing or extra or misshaped or different),
        "num_tensors": len(pairs),
        "missing": missing,
        "extra": extra,
        "misshaped": misshaped,
        "different": different,
        "tensors_crc32": sums,
    }


def _pairs(ours: CheckpointSource, theirs: TensorSource, layout_name: str, export: Path) -> dict[str, Target]:
    """By their name: the same tensor, made of our rows."""
    if layout_name == VISION_LAYOUT:
        return {
            name: Target(
                name, TensorInfo(shape, ours.tensors[PREFIX + name].dtype), [Segment(ours, PREFIX + name, 0, shape[0])]
            )
            for name, shape in vision.expected_shapes(vision.config_of(ours)).items()
            if PREFIX + name in ours.tensors
        }
    config = config_of(ours)
    _, values = identify(export, layout_name)
    check_model(values, config, ActionOptions(untie=True), export)
    pairs = {}
    for one in mapped_tensors(find_layout(layout_name).rules, config):
        key = PREFIX + one.ours
        for index, (name, shape) in enumerate(one.theirs):
            segments = [Segment(ours, key, start, count) for start, count in one.inverse(index)]
            if name in theirs.tensors and theirs.tensors[name].shape == one.our_shape != shape:
                shape, segments = one.our_shape, [Segment(ours, key, 0, one.our_shape[0])]
            pairs[name] = Target(name, TensorInfo(shape, ours.tensors[key].dtype), segments)
    if HEAD not in theirs.tensors and values.get("tie_word_embeddings"):
        del pairs[HEAD]
        assert EMBEDDING in pairs
    return pairs


def _contents(pairs: dict[str, Target], theirs: TensorSource, threads: int) -> tuple[list[str], dict[str, str]]:
    different: set[str] = set()
    sums: dict[str, str] = {}

    def check(target: Target) -> None:
        crc = 0
        for start, stop in split_rows(target):
            rows, _ = gather(Block(0, target, start, stop))
            found = np.empty_like(rows)
            part = theirs.read_rows(target.name, start, stop, found)
            part = zlib.crc32(found.reshape(-1).data) if part is None else part
            crc = join_crc32(crc, part, found.nbytes)
            if not np.array_equal(rows, found):
                different.add(target.name)
        sums[target.name] = f"{crc:08x}"

    run_all(check, list(pairs.values()), threads)
    return sorted(different), dict(sorted(sums.items()))
