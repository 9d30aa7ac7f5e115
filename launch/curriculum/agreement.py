"""Whether the entries of a curriculum fit one another: what one makes is what the next one reads. Asked before the first starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.composition.compose import to_object
from launch.curriculum.entries import Curriculum
from model.config import SIZES
from model.vocabulary import Vocabulary
from training.config import TrainConfig, differences


def disagreements(curriculum: Curriculum) -> list[str]:
    """A line for each stage that would be refused only when its turn comes, hours after the first entry."""
    stages: dict[Path, tuple[str, TrainConfig]] = {}
    lengths: dict[Path, tuple[str, int]] = {}  # of packed rows, by their folder
    for name in curriculum.order:
        command = curriculum.config.entries[name].command
        for call in curriculum.calls(name) if command in ("train", "pack") else ():
            if command == "train":
                stage = to_object(call)
                stages[stage.stage_folder] = (name, stage)
            else:
                lengths |= {folder: (name, int(call.sequence_length)) for folder in folders_of(call)}
    found = []
    for name, stage in stages.values():
        if not stage.preflight:
            continue
        before = stages.get(Path(stage.stage.initialize_from or ""))
        if before is not None and (other := differences(sizes_of(before[1]), sizes_of(stage), "model")):
            found.append(f"{name} begins with the weights of {before[0]}, a model of other sizes: {'; '.join(other)}")
        paths = {key: entry.path for key, entry in stage.stage.data.datasets_in_use().items()}
        for key, path in (paths | stage.stage.validation).items():
            packed = lengths.get(Path(path))
            if packed is not None and packed[1] != stage.stage.sequence_length:
                found.append(
                    f"{name} reads {key} in rows of {stage.stage.sequence_length} tokens, "
                    f"and {packed[0]} packs it in rows of {packed[1]}"
                )
    return found


def sizes_of(stage: TrainConfig) -> dict[str, Any]:
    vocabulary = Vocabulary.from_config(stage.model.vocabulary).describe()
    return {name: getattr(stage.model, name) for name in SIZES} | {"vocabulary": vocabulary}


def folders_of(pack: Any) -> list[Path]:
    target = Path(pack.target)
    return [target, *(target / "held_out" / name for name in pack.held_out)]
