"""Frames to a file: H.264 in MP4, the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np

ENCODER_OPTIONS = {
    "preset": "ultrafast",
    "crf": "10",
    "threads": "1",
    "x264-params": "log-level=none:keyint=8:scenecut=0",
}


def mp4_bytes(frames: Sequence[np.ndarray], frames_per_second: int) -> bytes:
    """Encode uint8 [H, W, 3] frames of even sides; a frame object that occurs again is converted once."""
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
