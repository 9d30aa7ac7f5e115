"""Real files from pictures and frames: PNG, JPEG and H.264 in MP4, the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.video.decode import open_video
from data_pipeline.video.encode import mp4_bytes

__all__ = ["jpeg_bytes", "mp4_bytes", "mp4_frames", "png_bytes"]

JPEG_QUALITY = 92


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def jpeg_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def mp4_frames(data: bytes, times_seconds: Sequence[float]) -> list[np.ndarray]:
    """The decoded frames shown nearest to the given times, uint8 [H, W, 3] each."""
    with open_video(data) as (container, stream):
        frames = list(container.decode(stream))
    nearest = [min(frames, key=lambda frame: abs((frame.time or 0.0) - time)) for time in times_seconds]
    return [frame.to_ndarray(format="rgb24") for frame in nearest]
