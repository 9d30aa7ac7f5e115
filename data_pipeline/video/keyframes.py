"""Key frames by the rule that Emu3.5 publishes (arXiv 2510.26583, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.video.decode import VideoScan, read_frames, scan_video
from data_pipeline.video.scenes import SceneConfig, find_cuts


@dataclass
class VideoConfig:
    keyframe_seconds: float = 5.0  # t of the rule; Emu3.5 does not publish it
    max_keyframes: int = 0  # only the first so many; 0: all
    detect_scenes: bool = True  # false: the video is one scene
    scenes: SceneConfig = field(default_factory=SceneConfig)


@dataclass
class KeyFrame:
    time_seconds: float
    pixels: np.ndarray  # uint8 [H, W, 3]


def key_frame_times(scene_starts: list[float], duration: float, interval: float) -> list[float]:
    """Seconds: the middle of each scene shorter than `interval`, else one time an interval.

    In a long scene the first time is half an interval after its start, so that each frame stands
    in the middle of the time it stands for. A rest of at most half an interval has none.
    """
    assert interval > 0
    times: list[float] = []
    for start, end in zip(scene_starts, [*scene_starts[1:], duration], strict=True):
        length = end - start
        if length < interval:
            times.append(start + length / 2)
            continue
        # A time at the very end would show the next scene.
        count = math.ceil(length / interval - 0.5 - 1e-6)
        times.extend(start + interval * (number + 0.5) for number in range(count))
    return [min(time, duration) for time in times]


def frames_at(times: list[float], scan: VideoScan) -> list[int]:
    """Indices of the frames on display at these times, each once."""
    # Stamps are whole numbers of the stream's unit: allow half a millisecond.
    indices = np.searchsorted(scan.times, np.asarray(times) + 5e-4, side="right") - 1
    return sorted({max(0, int(index)) for index in indices})


def extract_key_frames(data: bytes, config: VideoConfig) -> list[KeyFrame]:
    """The key frames of a video file, at least one. Raises `SampleError`."""
    return list(read_key_frames(data, config)[0])


def read_key_frames(data: bytes, config: VideoConfig) -> tuple[Iterator[KeyFrame], float]:
    """The key frames of a video file, at least one, decoded as they are asked for; the seconds until its last stream's end.

    Raises `SampleError` (`empty_video`, `undecodable_video`, `bad_time_stamps`, `video_too_long`, `image_too_large`), and
    so does the iterator.
    """
    scan = scan_video(data)
    cuts = find_cuts(scan.differences, scan.times, config.scenes) if config.detect_scenes else []
    starts = [float(scan.times[0]), *(float(scan.times[cut]) for cut in cuts)]
    times = key_frame_times(starts, scan.duration_seconds, config.keyframe_seconds)
    indices = frames_at(times, scan)
    if config.max_keyframes:
        indices = indices[: config.max_keyframes]
    pictures = read_frames(data, scan, indices)
    frames = (KeyFrame(float(scan.times[index]), pixels) for index, pixels in zip(indices, pictures, strict=True))
    return frames, max(scan.duration_seconds, scan.file_seconds)
