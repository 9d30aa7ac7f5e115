"""Video decoding with PyAV: times and small views of all frames, colours of the kept ones only.

Converting frames to RGB costs about twice as much as decoding them, so a first pass looks at
every frame's planes without conversion and a second one converts what was chosen.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipeline.sources.image import MAX_PIXELS
from data_pipeline.sources.samples import SampleError
from data_pipeline.video.scenes import difference

# Longer between two frames, and the time stamps are taken for wrong: every second of a video costs time and memory.
MAX_GAP_SECONDS = 3600.0
MAX_FRAMES = 2_000_000  # 18 hours at 30 frames a second
# What a dataset may hold, whatever its files are called. FFmpeg tells formats by content, and some of those that it knows
# are lists of addresses: it would open sockets and other files.
VIDEO_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
VIEW_SIZE = 48  # samples along each side of a frame's small view
# Formats with 8-bit Y, U and V planes, which can be sampled where they lie.
_PLANAR_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


@dataclass
class VideoScan:
    """What a pass over all frames tells. F frames in order of display."""

    stamps: np.ndarray  # int64 [F]; time stamps in the stream's own unit, or ordinals
    seekable: bool  # do the stamps come from the stream?
    times: np.ndarray  # float64 [F]; seconds from where the file's first stream begins, as transcripts count
    intra: np.ndarray  # bool [F]; can decoding start here?
    differences: np.ndarray  # float64 [F]; of each frame's small view from that of the frame decoded before it
    file_seconds: float = 0.0  # of the longest stream, as the file says; 0: it does not

    @property
    def duration_seconds(self) -> float:
        """Until the last frame's end, taking it to be shown as long as the mean of the others."""
        num_frames = len(self.times)
        last = (self.times[-1] - self.times[0]) / (num_frames - 1) if num_frames > 1 else 0.0
        return float(self.times[-1] + last)


def scan_video(data: bytes) -> VideoScan:
    """Decode all frames without colour conversion.

    Packets that do not decode are skipped and counted. Raises `SampleError`: `empty_video`,
    `undecodable_video` when not one frame can be had or more packets are broken than whole, `video_too_long`,
    `bad_time_stamps`. Memory: some 100 bytes a frame.
    """
    if not data:
        raise SampleError("empty_video")
    stamps: list[int | None] = []
    intra: list[bool] = []
    differences: list[float] = []
    view: np.ndarray | None = None
    num_errors = 0
    with open_video(data) as (container, stream):
        seconds_per_stamp = float(stream.time_base or 0)
        seconds_per_frame = 1 / float(stream.average_rate or 25)
        delay = _delay_seconds(container, stream)
        file_seconds = (container.duration or 0) / av.time_base
        for frame in decoded_frames(container, stream):
            if frame is None:
                num_errors += 1
                continue
            stamps.append(frame.pts)
            intra.append(bool(frame.key_frame))
            before, view = view, _small_view(frame)
            differences.append(0.0 if before is None else difference(before, view))
            if len(stamps) > MAX_FRAMES:
                raise SampleError("video_too_long", f"more than {MAX_FRAMES:,} frames")
    if not stamps or num_errors > len(stamps):
        raise SampleError("undecodable_video", f"{len(stamps)} frames, {num_errors} broken packets")
    known = [stamp for stamp in stamps if stamp is not None]
    seekable = len(set(known)) == len(stamps) and seconds_per_stamp > 0
    numbers = np.asarray(known if seekable else range(len(stamps)), np.int64)
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    times = (numbers - numbers[0]) * (seconds_per_stamp if seekable else seconds_per_frame)
    if len(times) > 1 and np.diff(times).max() > MAX_GAP_SECONDS:
        raise SampleError("bad_time_stamps", f"{np.diff(times).max():,.0f} seconds between two frames")
    changes = np.asarray(differences)[order]
    return VideoScan(numbers, seekable, times + delay, np.asarray(intra)[order], changes, file_seconds)


def read_frames(data: bytes, scan: VideoScan, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames at these ascending indices of the scan, each once, upright RGB, uint8 [H, W, 3] each.

    One at a time: those of a long video do not fit in memory. Raises `SampleError`.
    """
    num_given = 0
    if scan.seekable:
        for frame in _read_by_seeking(data, scan, indices):
            yield frame
            num_given += 1
    if num_given < len(indices):  # the container's index is missing or wrong
        for frame in _read_from_start(data, scan, indices[num_given:]):
            yield frame
            num_given += 1
    if num_given < len(indices):
        raise SampleError("undecodable_video", "frames of the first pass are gone in the second")


def _read_by_seeking(data: bytes, scan: VideoScan, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Jumps where an intra frame lies between a wanted frame and the next wanted one; ends at one that is not found."""
    intra = np.flatnonzero(scan.intra)
    position = 0  # index of the next frame that decoding on would give
    converter = VideoReformatter()
    with open_video(data) as (container, stream):
        frames = decoded_frames(container, stream)
        for index in indices:
            before = intra[intra <= index]
            if len(before) and before[-1] > position:
                container.seek(int(scan.stamps[before[-1]]), stream=stream)
                frames = decoded_frames(container, stream)
            reached = (frame for frame in frames if frame is not None and frame.pts >= scan.stamps[index])
            frame = next(reached, None)
            if frame is None or frame.pts != scan.stamps[index]:
                return
            yield _to_rgb(frame, stream, converter)
            position = index + 1


def _read_from_start(data: bytes, scan: VideoScan, indices: Sequence[int]) -> Iterator[np.ndarray]:
    wanted = {int(scan.stamps[index]) for index in indices}
    waiting = deque(int(scan.stamps[index]) for index in indices)
    found: dict[int, np.ndarray] = {}  # those that came before an earlier one
    num_frames = 0
    converter = VideoReformatter()
    with open_video(data) as (container, stream):
        for frame in decoded_frames(container, stream):
            if frame is None:
                continue
            stamp = frame.pts if scan.seekable else num_frames
            num_frames += 1
            if stamp in wanted:
                found[stamp] = _to_rgb(frame, stream, converter)
            while waiting and waiting[0] in found:
                yield found.pop(waiting.popleft())


@contextlib.contextmanager
def open_video(data: bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file of one of `VIDEO_FORMATS` and its best video stream: the one place where videos are opened for reading.

    Raises `SampleError("undecodable_video")`.
    """
    # No protocol at all: what such a file refers to outside of itself is never opened.
    options = {"format_whitelist": ",".join(VIDEO_FORMATS), "protocol_whitelist": ""}
    try:
        container = av.open(io.BytesIO(data), mode="r", metadata_errors="ignore", container_options=options)
    except (av.FFmpegError, ValueError) as error:
        raise SampleError("undecodable_video", str(error)) from error
    with container:
        # A cover picture is no video.
        streams = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise SampleError("undecodable_video", "no video stream")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise SampleError("undecodable_video", "no decoder for its codec")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        # A second decoding thread saves no time in all; shards are what runs side by side.
        stream.codec_context.thread_count = 1
        yield container, stream


def decoded_frames(container: av.container.InputContainer, stream: Any) -> Iterator[Any]:
    """Frames of a stream of pictures or sound from where the container stands; None for each packet that does not decode."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            yield None
            return
        try:
            yield from stream.decode(packet)
        except av.FFmpegError:
            yield None


def _small_view(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [3, VIEW_SIZE, VIEW_SIZE]: each plane at the points of a grid, not averaged."""
    if frame.format.name not in _PLANAR_FORMATS:
        frame = frame.reformat(width=VIEW_SIZE, height=VIEW_SIZE, format="yuv444p")
    view = np.empty((3, VIEW_SIZE, VIEW_SIZE), np.uint8)
    for number, plane in enumerate(frame.planes):
        pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows = np.arange(VIEW_SIZE) * plane.height // VIEW_SIZE
        columns = np.arange(VIEW_SIZE) * plane.width // VIEW_SIZE
        view[number] = pixels[rows[:, None], columns]
    return view


def _delay_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long after the file's first stream the video begins."""
    if stream.start_time is None or stream.time_base is None or container.start_time is None:
        return 0.0
    delay = float(stream.start_time * stream.time_base) - container.start_time / av.time_base
    return delay if 0 < delay < MAX_GAP_SECONDS else 0.0


def _to_rgb(frame: av.VideoFrame, stream: av.VideoStream, converter: VideoReformatter) -> np.ndarray:
    """uint8 [H, W, 3] as it is shown: pixels that are not square are made so, then it is turned upright.

    One converter serves a file's frames: to set one up, and threads for it, takes longer than a small frame does.
    """
    height, width = frame.height, frame.width
    ratio = float(stream.sample_aspect_ratio or 1) or 1.0
    if ratio > 1:
        width = round(width * ratio)
    elif ratio < 1:
        height = round(height / ratio)
    if height * width > MAX_PIXELS:
        raise SampleError("image_too_large", f"{width} x {height}")
    shown = converter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    return upright(shown.to_ndarray(), frame.rotation)


def upright(pixels: np.ndarray, rotation_degrees: int) -> np.ndarray:
    """Turn a frame counterclockwise by what its display matrix says, to a quarter turn."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation_degrees / 90)))
