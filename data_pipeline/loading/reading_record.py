"""How far the stages of a curriculum have read each dataset, so that the next one goes on there.

A dataset is known by its packed fingerprint, whatever a stage calls it. The stage that reads it first names its order
("seed/stage/dataset"); later stages go on in that order behind the rows that were read: unread rows come first, and
every row comes once an epoch across all stages.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.loading.mixture import Cursor, Mixture, WeightedSchedule
from model.errors import UserError


@dataclass(frozen=True)
class DatasetRecord:
    """What a stage reads of a dataset."""

    fingerprint: str
    num_rows: int
    stream: str  # the order's name, see `Cursor`
    first: int  # rows of this order that were read before the stage, or before its data changed
    share: int  # of the mixture's period; where weights change, of the first one


@dataclass(frozen=True)
class ReadingRecord:
    """A stage's datasets by name, and where its curriculum stood before it in every dataset, by fingerprint.

    `first_sample`: of the stage, where "before" ends: 0, or where its data were changed. `changes`: the sample from
    which on a dataset has another share, and all shares by name.
    """

    datasets: dict[str, DatasetRecord]
    before: dict[str, Cursor]
    first_sample: int = 0
    changes: tuple[tuple[int, dict[str, int]], ...] = ()

    @classmethod
    def of(cls, mixture: Mixture, fingerprints: Mapping[str, str], before: Mapping[str, Cursor]) -> ReadingRecord:
        first_shares, *others = mixture.schedule.shares
        datasets = {
            name: DatasetRecord(fingerprints[name], int(size), cursor.stream, cursor.position, int(share))
            for name, size, cursor, share in zip(
                mixture.names, mixture.sizes, mixture.cursors, first_shares, strict=True
            )
        }
        changes = tuple(
            (int(first), dict(zip(mixture.names, shares.tolist(), strict=True)))
            for first, shares in zip(mixture.schedule.first_samples[1:], others, strict=True)
        )
        return cls(datasets, dict(before), mixture.first_sample, changes)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ReadingRecord:
        """Of what `to_dict` gave, as a checkpoint's manifest keeps it."""
        return cls(
            {name: DatasetRecord(**entry) for name, entry in record["datasets"].items()},
            {fingerprint: Cursor(*entry) for fingerprint, entry in record["before"].items()},
            int(record.get("first_sample", 0)),
            tuple((int(first), dict(shares)) for first, shares in record.get("changes", ())),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "datasets": {name: asdict(entry) for name, entry in self.datasets.items()},
            "before": {fingerprint: list(cursor) for fingerprint, cursor in self.before.items()},
            "first_sample": self.first_sample,
            "changes": [list(change) for change in self.changes],
        }

    @cached_property
    def _schedule(self) -> WeightedSchedule:
        names = sorted(self.datasets)  # the mixture's order
        shares = [{name: entry.share for name, entry in self.datasets.items()}, *(shares for _, shares in self.changes)]
        first_samples = [self.first_sample, *(first for first, _ in self.changes)]
        return WeightedSchedule(first_samples, [np.array([one[name] for name in names], np.int64) for one in shares])

    def rows_read(self, consumed_samples: int) -> dict[str, int]:
        """Rows of each dataset in the first so many samples of the stage, from `first_sample` on. Exact."""
        return dict(zip(sorted(self.datasets), self._schedule.counts(consumed_samples).tolist(), strict=True))

    def after(self, consumed_samples: int) -> dict[str, Cursor]:
        """Where the curriculum stands in every dataset after so many samples of the stage, by fingerprint."""
        cursors = dict(self.before)
        for name, count in self.rows_read(consumed_samples).items():
            entry = self.datasets[name]
            cursors[entry.fingerprint] = Cursor(entry.stream, entry.first + count)
        return cursors

    def coverage(self, consumed_samples: int) -> dict[str, dict[str, float]]:
        """By dataset: `num_rows`, `rows_read` by the whole curriculum, repeats counted, and `epochs`, their quotient.

        Up to one epoch no row was read twice; `min(1, epochs)` is the share of the rows that were read.
        """
        found: dict[str, dict[str, float]] = {}
        for name, count in self.rows_read(consumed_samples).items():
            entry = self.datasets[name]
            total = entry.first + count
            found[name] = {"num_rows": entry.num_rows, "rows_read": total, "epochs": total / entry.num_rows}
        return found

    def refuse_repetition(self, num_samples: int, max_epochs: Mapping[str, float]) -> None:
        """Raise `UserError` where so many samples read a dataset more than `max_epochs` times, earlier stages included.

        A dataset that is not named, or with 0, may be read as often as it comes.
        """

        def over(samples: int) -> list[str]:
            coverage = self.coverage(samples)
            return [
                name
                for name, most in max_epochs.items()
                if most and name in coverage and coverage[name]["epochs"] > most
            ]

        named = sorted(over(num_samples))
        if not named:
            return
        coverage = self.coverage(num_samples)
        most = bisect.bisect_left(range(num_samples), True, key=lambda samples: bool(over(samples))) - 1
        told = (f"{name} {coverage[name]['epochs']:.3g} times ({coverage[name]['num_rows']:,} rows)" for name in named)
        raise UserError(
            "a dataset would be read more often than is allowed",
            where=", ".join(f"stage.data.datasets.{name}.max_epochs" for name in named),
            expected=", ".join(f"{name} at most {max_epochs[name]:g} times" for name in named),
            got=", ".join(told) + ", earlier stages of the curriculum included",
            fix=f"read fewer rows ({max(0, most):,} in place of {num_samples:,}), lower its weight, or raise max_epochs",
        )
