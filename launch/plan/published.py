"""How far forecasts of published runs were off, by device, as `launch.plan.accuracy` found it; cheap to tell."""

from __future__ import annotations

from dataclasses import dataclass

FAR_OFF = 0.2  # of the published throughput


@dataclass(frozen=True)
class HeldOutError:
    """|forecast / published - 1| over rows whose publisher was left out of the fit."""

    num_rows: int
    mean: float
    worst: float
    num_far_off: int = 0  # rows beyond `FAR_OFF`

    def told(self) -> str:
        far_off = f" ({self.num_far_off} beyond {FAR_OFF:.0%})" if self.num_far_off else ""
        return f"{self.mean:.1%} on average, {self.worst:.1%} at worst{far_off}, over {self.num_rows} rows"


# By device; what `launch.plan.accuracy` finds. A test computes it again.
HELD_OUT_ERRORS = {
    "a100_40gb": HeldOutError(19, 0.075, 0.284, 1),
    "a100_80gb": HeldOutError(20, 0.089, 0.238, 1),
    "b200": HeldOutError(2, 0.11, 0.181),
    "gb200": HeldOutError(3, 0.04, 0.073),
    "h100": HeldOutError(59, 0.059, 0.267, 1),
    "h100_500w": HeldOutError(24, 0.084, 0.199),
    "h200": HeldOutError(2, 0.061, 0.068),
}


def told_accuracy(device: str) -> str:
    """What is known of the step times' error on a device, for people."""
    known = HELD_OUT_ERRORS.get(device)
    if known is None:
        return f"no published run on {device} is known: the error of its step times is not known either"
    return f"step times of publishers left out of the fit were off by {known.told()} of this device"
