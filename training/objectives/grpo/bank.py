"""What a round of rollouts is on a disk and between ranks, and the files that let a killed step go on.

Every data-parallel rank writes one file for each round of a step before anything is learnt from it. It appears whole or
not at all. A run that is killed anywhere reads them when it comes to that step again: the same answers and the same
scores, so the same update, bit for bit, and scorers that are not asked twice.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import replace_file
from model.errors import UserError
from training.objectives.grpo.rows import Sample

ARRAYS = {
    "prompt": np.int32,
    "unconditional": np.int32,
    "ids": np.int32,
    "log_probs": np.float32,
    "sampled": np.bool_,
    "mask_numbers": np.int32,
}


@dataclass
class Round:
    """Whole groups: answers one behind the other, and what the rewards said. NaN: missing."""

    samples: list[Sample]
    totals: np.ndarray  # float64 [n], in [1, 10]
    signals: np.ndarray  # float64 [n, number of signals]
    weights: np.ndarray  # float64 [n, number of signals]
    tasks: list[str]
    about: dict[str, Any]  # JSON values: counts for the report

    @classmethod
    def empty(cls, num_signals: int) -> Round:
        return cls([], np.zeros(0), np.zeros((0, num_signals)), np.zeros((0, num_signals)), [], {})

    def part(self, first: int, count: int) -> Round:
        """Answers [first, first + count)."""
        chosen = slice(first, first + count)
        samples, tasks = self.samples[chosen], self.tasks[chosen]
        return Round(samples, self.totals[chosen], self.signals[chosen], self.weights[chosen], tasks, {})

    def to_bytes(self) -> bytes:
        """An npz without pickles."""
        arrays: dict[str, np.ndarray] = {"totals": self.totals, "signals": self.signals, "weights": self.weights}
        for name, dtype in ARRAYS.items():
            pieces: list[np.ndarray] = [np.asarray(getattr(sample, name), dtype) for sample in self.samples]
            arrays[name] = np.concatenate([np.zeros(0, dtype), *pieces])
        for name in ("prompt", "unconditional", "ids"):
            arrays[f"num_{name}"] = np.array([len(getattr(sample, name)) for sample in self.samples], np.int64)
        arrays["finished"] = np.array([sample.finished for sample in self.samples], np.bool_)
        about = {"tasks": self.tasks, "about": self.about}
        arrays["json"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        stream = io.BytesIO()
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Round:
        """Raises ValueError, KeyError, OSError or BadZipFile where it is not what `to_bytes` made."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        about = json.loads(found["json"].tobytes())
        parts: dict[str, list[np.ndarray]] = {}
        for name in ARRAYS:
            lengths = found[f"num_{name}" if f"num_{name}" in found else "num_ids"]
            parts[name] = np.split(found[name], np.cumsum(lengths)[:-1]) if len(lengths) else []
        samples = [
            Sample(**{name: parts[name][row] for name in ARRAYS}, finished=bool(finished))
            for row, finished in enumerate(found["finished"].tolist())
        ]
        return cls(samples, found["totals"], found["signals"], found["weights"], about["tasks"], about["about"])


def joined(rounds: Sequence[Round], num_signals: int) -> Round:
    """In the order given; counts are added up by name."""
    whole = Round.empty(num_signals)
    for one in rounds:
        whole.samples += one.samples
        whole.tasks += one.tasks
        for name, count in one.about.items():
            whole.about[name] = whole.about.get(name, 0) + count
    for name in ("totals", "signals", "weights"):
        setattr(whole, name, np.concatenate([getattr(whole, name), *(getattr(one, name) for one in rounds)]))
    return whole


class Bank:
    """Files `ROLLOUT/NAME_rank_R.zip` below a folder: a rollout is the answers of one or several updates.

    `key` is all that decides a file's content beside the weights: one written under another key is not read.
    """

    def __init__(self, folder: Path, data_parallel_rank: int, keep: int):
        self.folder, self._rank, self._keep = folder, data_parallel_rank, keep

    def read(self, rollout: int, name: str, key: str) -> bytes | None:
        """What `write` was given; None where there is no such file, or it is of another key or damaged."""
        try:
            with zipfile.ZipFile(self._path(rollout, name)) as file:
                return file.read("content") if file.read("key").decode() == key else None
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return None

    def write(self, rollout: int, name: str, key: str, content: bytes) -> None:
        """The archive holds checksums of what is in it. Raises `UserError` when it cannot be written."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("key", key)
            file.writestr("content", content)
        path = self._path(rollout, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, stream.getvalue())
        except OSError as error:
            fix = "free space or give permission, then start the same command again"
            raise UserError("the answers cannot be kept", where=str(path), got=str(error), fix=fix) from error

    def forget_before(self, rollout: int) -> None:
        """Remove this rank's files of rollouts that no restart comes back to."""
        for folder in self.folder.glob("[0-9]*"):
            if int(folder.name) < rollout - self._keep:
                _remove(folder, f"*_rank_{self._rank}.zip*")

    def _path(self, rollout: int, name: str) -> Path:
        return self.folder / f"{rollout:08d}" / f"{name}_rank_{self._rank}.zip"


def _remove(folder: Path, pattern: str) -> None:
    """These files, and the folder when nothing else is in it. Ranks do this at the same time."""
    try:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # another rank's files are still there, or it has removed the folder
        return
