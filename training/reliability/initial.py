"""The checkpoint that a stage starts from."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint.manifest import foreign_format
from model.checkpoint.reader import MANIFEST_NAME, latest_checkpoint, list_checkpoints
from model.errors import UserError
from training.contracts.batches import Ranks
from training.reliability.agreement import seen_by_first_rank
from training.reliability.checkpoint import find_damage
from training.reliability.finite import describe_non_finite, non_finite_in


def resolve_initial(path: Path, ranks: Ranks) -> Path:
    """The checkpoint that `initialize_from` means, verified; a `UserError` lists what exists instead.

    The same on every rank: of those that the first rank sees the newest that no rank finds damaged. Ranks that chose for
    themselves could start from different weights, where a disk fails one of them or the stage before still runs. They
    share the work of checking.
    """
    damages = []
    for folder in map(Path, seen_by_first_rank(ranks, lambda: list(map(str, _candidates(path))))):
        damage = find_damage(folder, ranks.rank, ranks.world_size)
        if not damage and (keys := non_finite_in(folder, ranks.rank, ranks.world_size)):
            damage = describe_non_finite(keys)
        if not ranks.any_rank(bool(damage)):
            return folder
        damages.append(f"{folder.name}: {damage or 'found by another rank'}")
    raise UserError("the checkpoint to start from is damaged", where=str(path), got="; ".join(damages))


def _candidates(path: Path) -> list[Path]:
    """The checkpoint that is meant, and the others of its stage, newest first."""
    try:
        folder = latest_checkpoint(path)
    except UserError:
        if foreign := foreign_format(path):
            raise UserError(
                "the checkpoint to start from is another program's",
                where=f"stage.initialize_from={path}",
                expected="a checkpoint of nextstate: whatever the engine, all of them have one format",
                got=foreign,
                fix="export published weights with that program, then `nextstate convert` them",
            ) from None
        parent = Path(path).absolute().parent
        found = sorted(
            entry.name
            for entry in (parent.iterdir() if parent.is_dir() else ())
            if list_checkpoints(entry) or (entry / MANIFEST_NAME).is_file()
        )
        raise UserError(
            "there is no checkpoint to start from",
            where=f"stage.initialize_from={path}",
            expected="a checkpoint folder or a stage folder with a complete checkpoint",
            got=f"with checkpoints in {parent}: {', '.join(found) or 'nothing'}",
            fix="train that stage first, or name one of these",
        ) from None
    return [folder] + [other for other in list_checkpoints(path) if other != folder]
