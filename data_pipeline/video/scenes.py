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


def frame_differences(views: np.ndarray) -> np.ndarray:
    """Small views uint8 [F, 3, n, n] -> float64 [F]; entry i compares frame i with i - 1."""
    differences = np.zeros(len(views))
    for index in range(1, len(views)):
        change = views[index].astype(np.int16) - views[index - 1]
        differences[index] = np.abs(change).mean(axis=(1, 2)).max()
    return differences


def find_cuts(views: np.ndarray, times: np.ndarray, config: SceneConfig) -> list[int]:
    """Indices of the frames that begin a new scene, the first frame not among them.

    The ratio to the neighbours keeps fast motion, which changes every frame much, from being cut.
    """
    differences = frame_differences(views)
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
