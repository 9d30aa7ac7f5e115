"""How far the stages of a curriculum have read each dataset, so that the next one goes on there.

A dataset is known by its packed fingerprint, whatever a stage calls it. The stage that reads it first names its order
("seed/stage/dataset"); later stages go on in that order behind the rows that were read: unread rows come first, and
every row comes once an epoch across all stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.loading.mixture import Cursor, Mixture, count_samples, schedule_period
from model.errors import UserError


@dataclass(frozen=True)
class DatasetRecord:
    """What a stage reads of a dataset."""

    fingerprint: str
    num_rows: int
    stream: str  # the order's name, see `Cursor`
    first: int  # rows of this order that were read before the stage
    share: int  # of the mixture's period


@dataclass(frozen=True)
class ReadingRecord:
    """A stage's datasets by name, and where its curriculum stood before it in every dataset, by fingerprint."""

    datasets: dict[str, DatasetRecord]
    before: dict[str, Cursor]

    @classmethod
    def of(cls, mixture: Mixture, fingerprints: Mapping[str, str], before: Mapping[str, Cursor]) -> ReadingRecord:
        datasets = {
            name: DatasetRecord(fingerprints[name], int(size), cursor.stream, cursor.position, int(share))
            for name, size, cursor, share in zip(
                mixture.names, mixture.sizes, mixture.cursors, mixture.shares, strict=True
            )
        }
        return cls(datasets, dict(before))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ReadingRecord:
        """Of what `to_dict` gave, as a checkpoint's manifest keeps it."""
        return cls(
            {name: DatasetRecord(**entry) for name, entry in record["datasets"].items()},
            {fingerprint: Cursor(*entry) for fingerprint, entry in record["before"].items()},
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "datasets": {name: asdict(entry) for name, entry in self.datasets.items()},
            "before": {fingerprint: list(cursor) for fingerprint, cursor in self.before.items()},
        }

    def rows_read(self, consumed_samples: int) -> dict[str, int]:
        """Rows of each dataset in the first so many samples of the stage. Exact."""
        names = sorted(self.datasets)  # the mixture's order
        shares = np.array([self.datasets[name].share for name in names], np.int64)
        counts = count_samples(schedule_period(shares), shares, consumed_samples)
        return dict(zip(names, counts.tolist(), strict=True))

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
        coverage = self.coverage(num_samples)
        over = {name: allowed for name, allowed in max_epochs.items() if allowed and coverage[name]["epochs"] > allowed}
        if not over:
            return
        period = sum(entry.share for entry in self.datasets.values())
        most = min(
            max(0.0, allowed * self.datasets[name].num_rows - self.datasets[name].first)
            * (period / self.datasets[name].share)
            for name, allowed in over.items()
        )
        told = (
            f"{name} {coverage[name]['epochs']:.3g} times ({coverage[name]['num_rows']:,} rows)"
            for name in sorted(over)
        )
        raise UserError(
            "a dataset would be read more often than is allowed",
            where=", ".join(f"stage.data.datasets.{name}.max_epochs" for name in sorted(over)),
            expected=", ".join(f"{name} at most {over[name]:g} times" for name in sorted(over)),
            got=", ".join(told) + ", earlier stages of the curriculum included",
            fix=f"read fewer rows (about {int(most):,} in place of {num_samples:,}), lower its weight, or raise max_epochs",
        )
