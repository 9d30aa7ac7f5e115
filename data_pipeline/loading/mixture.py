"""Which sequence is read at which step: a pure function of (seed, stage, mixture, n).

Global sample n maps to (dataset, epoch, row) in time and memory that grow neither with n nor with the number of rows:

1. The weights are replaced by whole shares c_1..c_k of a period of P <= 65,536 samples (`quantise_weights`).
2. One period is scheduled by Tijdeman's rule (`data_pipeline.loading.periods`).
   After every prefix of n samples each dataset has been read
   n * c_i / P times to within 1 - 1 / (2k - 2), which is less than one sequence, for any weights and any number k
   of datasets. After P samples every count is exact, so the schedule repeats.
3. The q-th sample of a dataset is row q % size of epoch q // size in the order of a permutation keyed by
   (seed, stage, dataset, epoch): every row once an epoch. A stage that goes on where an earlier one stopped in a
   dataset has that stage's key and counts q from where it stopped (`Cursor`).

What is approximate: c_i / P differs from the weight asked for by at most `Mixture.weight_error` (never above 1 / P,
zero for weights with a common denominator up to 65,536 such as 0.55 / 0.25 / 0.2), and over n samples a
dataset drifts from the weight asked for by at most n times that.

Weights may change at given samples (`WeightedSchedule`): from there on another period is repeated, counted from the
change, and each dataset goes on with the row after its last one. Where a dataset stands at a change is a sum over the
phases before it, so the order stays a function of n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.loading.periods import Period, quantise_weights
from data_pipeline.storage.permutation import derive_key, epoch_keys, permute
from model.durable import fingerprint_of
from model.errors import Problems


class Location(NamedTuple):
    dataset: str
    epoch: int
    row: int


class Cursor(NamedTuple):
    """A place in one order of a dataset's rows: `stream` names the order, `position` counts the rows read in it."""

    stream: str
    position: int


class Locations(NamedTuple):
    """The samples asked for, as arrays [n]."""

    datasets: np.ndarray  # int64, index into `Mixture.names`
    epochs: np.ndarray  # int64
    rows: np.ndarray  # int64


class WeightedSchedule:
    """Which dataset each sample is of, and the how-manieth of that dataset it is. Of a period is found what is asked for.

    first_samples: ascending, where each phase begins; before the first one there is nothing. shares: of each phase,
    int64 [k], 0 for a dataset that the phase does not read.
    """

    def __init__(self, first_samples: Sequence[int], shares: Sequence[np.ndarray]):
        assert len(first_samples) == len(shares) > 0
        assert list(first_samples) == sorted(set(first_samples)), "phases begin one after another"
        self.first_samples = np.array(first_samples, np.int64)
        self.shares = [np.asarray(one, np.int64) for one in shares]
        self._read = [np.flatnonzero(one) for one in self.shares]  # datasets of a phase's period
        self._periods = [Period(one[read]) for one, read in zip(self.shares, self._read, strict=True)]
        self._counts_before: list[np.ndarray] = [np.zeros(len(self.shares[0]), np.int64)]

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and number within it, counted from the first phase on; int64 [n] each, of samples int64 [n]."""
        assert not len(samples) or samples.min() >= self.first_samples[0], "a sample before the first phase"
        phases = np.searchsorted(self.first_samples, samples, side="right") - 1
        datasets, numbers = np.empty_like(samples), np.empty_like(samples)
        for phase in range(int(phases.min()), int(phases.max()) + 1) if len(phases) else ():
            here = phases == phase
            period = self._periods[phase]
            cycles, places = np.divmod(samples[here] - self.first_samples[phase], period.length)
            order, ranks = period.locate(places)
            found = self._read[phase][order]
            datasets[here] = found
            numbers[here] = self._before(phase)[found] + cycles * self.shares[phase][found] + ranks
        return datasets, numbers

    def counts(self, end: int) -> np.ndarray:
        """How many samples before sample `end` are of each dataset; int64 [k], exact."""
        if end <= self.first_samples[0]:
            return np.zeros(len(self.shares[0]), np.int64)
        phase = int(np.searchsorted(self.first_samples, end - 1, side="right")) - 1
        return self._before(phase) + self._count(phase, end - int(self.first_samples[phase]))

    def _before(self, phase: int) -> np.ndarray:
        """Of each dataset the samples in the phases before this one."""
        while len(self._counts_before) <= phase:
            last = len(self._counts_before) - 1
            num_samples = int(self.first_samples[last + 1] - self.first_samples[last])
            self._counts_before.append(self._counts_before[last] + self._count(last, num_samples))
        return self._counts_before[phase]

    def _count(self, phase: int, num_samples: int) -> np.ndarray:
        period = self._periods[phase]
        cycles, rest = divmod(num_samples, period.length)
        counts: np.ndarray = cycles * self.shares[phase]
        counts[self._read[phase]] += period.counts(rest)
        return counts


class Mixture:
    """Random access to the order in which the rows of several datasets are read.

    `sizes`: rows of each dataset. `weights`: relative, any scale; a dataset of weight 0 is never read. `stage`: name
    of the stage that reads; stages of other names have other orders. `cursors`: datasets that an earlier stage has
    read, and where it stopped. `changes`: (sample, weights of all datasets from that sample on), in any order.
    `first_sample`: where this order begins, and where the cursors are meant; later than 0 after a change of the data.
    The order does not depend on the order of the mappings' keys.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        seed: int,
        stage: str = "",
        cursors: Mapping[str, Cursor] | None = None,
        changes: Sequence[tuple[int, Mapping[str, float]]] = (),
        first_sample: int = 0,
    ):
        phases = _phases_from(first_sample, [(0, weights), *sorted(changes, key=lambda change: change[0])])
        for _, asked in phases:
            _check(sizes, asked)
        self.seed, self.first_sample = int(seed), first_sample
        self.names = [name for name in sorted(sizes) if any(asked[name] > 0 for _, asked in phases)]
        self.sizes = np.array([sizes[name] for name in self.names], np.int64)
        asked_of = [np.array([asked[name] for name in self.names], np.float64) for _, asked in phases]
        shares = [_shares_of(asked) for asked in asked_of]
        self.schedule = WeightedSchedule([first for first, _ in phases], shares)
        self.weight_error = max(
            float(np.abs(one / one.sum() - asked / asked.sum()).max())
            for one, asked in zip(shares, asked_of, strict=True)
        )
        known = cursors or {}
        self.cursors = [known.get(name, Cursor(f"{self.seed}/{stage}/{name}", 0)) for name in self.names]
        self._keys = np.array([derive_key("mixture", cursor.stream) for cursor in self.cursors], np.uint64)
        self._positions = np.array([cursor.position for cursor in self.cursors], np.int64)
        self.fingerprint = fingerprint_of(self._described())

    @property
    def period(self) -> int:
        """Samples after which the first phase repeats itself."""
        return int(self.schedule.shares[0].sum())

    def _described(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "seed": self.seed,
            "period": self.period,
            "datasets": {
                name: [int(size), int(share), *cursor]
                for name, size, share, cursor in zip(
                    self.names, self.sizes, self.schedule.shares[0], self.cursors, strict=True
                )
            },
        }
        first_samples = self.schedule.first_samples.tolist()
        if first_samples != [0]:  # or the order is the one that older checkpoints know
            described["phases"] = list(zip(first_samples, (one.tolist() for one in self.schedule.shares), strict=True))
        return described

    def locate(self, n: int) -> Location:
        """Dataset, epoch and row of global sample n >= `first_sample`."""
        located = self.locate_many(np.array([n], np.int64))
        return Location(self.names[located.datasets[0]], int(located.epochs[0]), int(located.rows[0]))

    def locate_many(self, samples: np.ndarray) -> Locations:
        """The same for many samples, int64 [n]."""
        datasets, numbers = self.schedule.locate(np.asarray(samples, np.int64))
        epochs, indices = np.divmod(self._positions[datasets] + numbers, self.sizes[datasets])
        keys = epoch_keys(self._keys[datasets], epochs)
        return Locations(datasets, epochs, permute(indices, self.sizes[datasets], keys))


def _phases_from(
    first_sample: int, changes: Sequence[tuple[int, Mapping[str, float]]]
) -> list[tuple[int, Mapping[str, float]]]:
    """The phases that matter from `first_sample` on; the first of them begins there."""
    in_effect = sum(sample <= first_sample for sample, _ in changes) - 1
    return [(first_sample, changes[in_effect][1]), *changes[in_effect + 1 :]]


def _shares_of(weights: np.ndarray) -> np.ndarray:
    """Whole shares of a period, int64 [k]; 0 for a dataset of weight 0."""
    shares = np.zeros(len(weights), np.int64)
    shares[weights > 0] = quantise_weights(weights[weights > 0])
    return shares


def _check(sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
    problems = Problems()
    problems.check(
        set(sizes) == set(weights), "mixture", f"weights {sorted(weights)} are not of datasets {sorted(sizes)}"
    )
    for name, weight in sorted(weights.items()):
        key = f"datasets.{name}"
        fine = math.isfinite(weight) and weight >= 0
        problems.check(fine, f"{key}.weight", f"must be a finite number >= 0, got {weight}")
        empty = weight > 0 and sizes.get(name, 1) < 1
        problems.check(not empty, key, "has no rows", f"{key}.weight=0")
    some = any(weight > 0 for weight in weights.values())
    problems.check(some, "mixture", "no dataset has a positive weight")
    problems.raise_if_any()
