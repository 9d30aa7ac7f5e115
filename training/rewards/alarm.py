"""The alarm against reward hacking: training reward rises while a held-out guard falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class HackingAlarm:
    """Compares the last `window_steps` steps with those before them.

    It sounds for a guard whose mean has fallen by more than `min_errors` standard errors while the reward's mean has
    risen by as much. A guard is compared in its own unit. The history is part of checkpoints.
    """

    window_steps: int = 50
    min_errors: float = 3.0
    history: dict[str, list[float]] = field(default_factory=dict)  # "reward" and guards -> means of the last steps

    def seen(self, reward: float | None, guards: Mapping[str, float | None]) -> list[str]:
        """The means of one step. One sentence for each guard that has fallen while the reward rose."""
        for name, value in {"reward": reward, **guards}.items():
            if value is not None:
                kept = self.history.setdefault(name, [])
                kept.append(value)
                del kept[: -2 * self.window_steps]
        risen = self._change("reward")
        if risen is None or risen[1] < self.min_errors:
            return []
        fallen = {name: change for name in guards if (change := self._change(name)) is not None}
        return [
            f"the reward rose by {risen[0]:+.3g} in {self.window_steps} steps while the guard {name} changed by "
            f"{change:+.3g} ({errors:+.1f} standard errors): look at the best pictures kept"
            for name, (change, errors) in fallen.items()
            if errors <= -self.min_errors
        ]

    def _change(self, name: str) -> tuple[float, float] | None:
        """(difference of the two windows' means, the same in standard errors); None before both are full."""
        values = self.history.get(name, [])
        if len(values) < 2 * self.window_steps:
            return None
        before, after = values[: self.window_steps], values[self.window_steps :]
        difference = _mean(after) - _mean(before)
        error = math.sqrt((_variance(before) + _variance(after)) / self.window_steps)
        return difference, difference / max(error, 1e-12)

    def state(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self.history.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.history = {name: [float(value) for value in values] for name, values in state.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _variance(values: list[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
