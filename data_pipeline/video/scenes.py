"""Scene cuts: frames that differ from the one before far more than their neighbours do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class SceneConfig:
    min_difference: float = 12.0  # mean difference of two frames' planes, of 255, to be a cut
    min_ratio: float = 3.0  # to the mean difference of the neighbouring frames
    window: int = 3  # neighbouring frames on each side
    min_seconds: float = 0.4  # shorter scenes are joined to the one before


def difference(before: np.ndarray, view: np.ndarray) -> float:
    """Of two small views, uint8 [3, n, n]: the mean difference of the plane that changed most."""
    return float(np.abs(view.astype(np.int16) - before).mean(axis=(1, 2)).max())


def find_cuts(differences: np.ndarray, times: np.ndarray, config: SceneConfig) -> list[int]:
    """Indices of the frames that begin a new scene, the first frame not among them.

    differences, times: float64 [F]; entry i of the first compares frame i with the one before it.

    The ratio to the neighbours keeps fast motion, which changes every frame much, from being cut.
    """
    cuts: list[int] = []
    scene_start = 0.0
    for index in range(1, len(differences)):
        if differences[index] < config.min_difference:
            continue
        before = differences[max(1, index - config.window) : index]
        after = differences[index + 1 : index + 1 + config.window]
        around = np.concatenate([before, after])
        calm = around.mean() if len(around) else 0.0
        if differences[index] < config.min_ratio * calm:
            continue
        if times[index] - scene_start >= config.min_seconds:
            cuts.append(index)
            scene_start = times[index]
    return cuts
