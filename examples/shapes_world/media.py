"""Real files from pictures and frames: PNG, JPEG and H.264 in MP4, the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image

from data_pipeline.video.decode import open_video

JPEG_QUALITY = 92
ENCODER_OPTIONS = {
    "preset": "ultrafast",
    "crf": "10",
    "threads": "1",
    "x264-params": "log-level=none:keyint=8:scenecut=0",
}


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def jpeg_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def mp4_bytes(frames: Sequence[np.ndarray], frames_per_second: int) -> bytes:
    """Encode uint8 [H, W, 3] frames; a frame object that occurs again is converted once."""
    buffer = io.BytesIO()
    converted: dict[int, av.VideoFrame] = {}
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options=ENCODER_OPTIONS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(frames):
            frame = converted.get(id(pixels))
            if frame is None:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
                converted[id(pixels)] = frame
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def mp4_frames(data: bytes, times_seconds: Sequence[float]) -> list[np.ndarray]:
    """The decoded frames shown nearest to the given times, uint8 [H, W, 3] each."""
    with open_video(data) as (container, stream):
        frames = list(container.decode(stream))
    nearest = [min(frames, key=lambda frame: abs((frame.time or 0.0) - time)) for time in times_seconds]
    return [frame.to_ndarray(format="rgb24") for frame in nearest]
