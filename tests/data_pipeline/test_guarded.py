"""What a picture or video may do to a job: formats that are never opened, and the limits of the process that decodes."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from test_video_frames import gradient, make_video

from data_pipeline.kinds import guarded
from data_pipeline.kinds.base import MediaDecoder, Pixels
from data_pipeline.kinds.guarded import DecoderDiedError, DecoderProcess, GuardedDecoder
from data_pipeline.sources import SampleError
from data_pipeline.sources.image import PICTURE_FORMATS, ImageConfig, decode_image
from data_pipeline.video.decode import open_video
from data_pipeline.video.keyframes import VideoConfig

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (ImageConfig(max_area=48 * 48), VideoConfig(keyframe_seconds=1.0), 8)
SDP = b"v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=x\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\nm=video 45678 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
LISTS = {
    "sdp": SDP,
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "rtsp": b"rtsp://127.0.0.1/x\n",
}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_a_text_named_mp4_opens_no_socket_and_no_file(name: str) -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(SampleError) as caught, open_video(LISTS[name]):
        assert psutil.Process().num_fds() == before
    assert caught.value.reason == "undecodable_video"


def test_postscript_named_jpg_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(SampleError, match="corrupt_image"):
        decode_image(page)
    assert not (tmp_path / "started").exists()


def test_pictures_and_videos_are_opened_in_one_place_each() -> None:
    Image.init()
    assert set(PICTURE_FORMATS) <= set(Image.OPEN)  # a name that Pillow does not know would end in a KeyError
    # The reward service's own pictures come by a wire, as PNG alone.
    expected_pictures = ["data_pipeline/sources/image.py", "training/rewards/wire.py"]
    opened: dict[str, list[str]] = {"Image": [], "av": []}
    for folder in ("model", "data_pipeline", "training", "launch", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for library, arguments in re.findall(r"\b(Image|av)\.open\((.*)", path.read_text(encoding="utf-8")):
                if not (library == "av" and '"w"' in arguments):
                    opened[library].append(str(path.relative_to(ROOT)))
    expected_videos = ["data_pipeline/video/cues.py", "data_pipeline/video/decode.py"]
    assert opened == {"Image": expected_pictures, "av": expected_videos}


def test_the_other_process_gives_the_same_pictures() -> None:
    film = make_video([gradient(number) for number in range(40)])
    (expected, seconds), (found, told) = (decoder(*SETTINGS).film(film) for decoder in (MediaDecoder, GuardedDecoder))
    assert told == seconds
    assert [(one.time_ms, one.original_size) for one in found] == [(one.time_ms, one.original_size) for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
    with pytest.raises(SampleError, match="undecodable_video: "):
        GuardedDecoder(*SETTINGS).film(b"no video")
    with pytest.raises(SampleError, match="corrupt_image"):
        GuardedDecoder(*SETTINGS).picture(b"no picture")


class Hostile(MediaDecoder):
    """Stands for files that FFmpeg or Pillow dies of; `data` says how."""

    def picture(self, data: bytes) -> Pixels:
        if data == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif data == b"hunger":
            bytearray(guarded.MEMORY_BYTES + 1)
        elif data == b"spin":
            while True:
                pass
        return Pixels(np.zeros((1, 1, 3), np.uint8), (1, 1))


def test_a_file_that_breaks_the_decoder_is_named_and_the_next_one_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "CPU_SECONDS", 0.1)
    decoder, process = pickle.dumps(Hostile(*SETTINGS)), DecoderProcess()
    try:
        for how, error, told in (
            (b"crash", DecoderDiedError, "signal 11"),
            (b"hunger", SampleError, "too_much_memory"),
            (b"spin", SampleError, "decoding_took_too_long"),
        ):
            with pytest.raises(error, match=told):
                process.ask(decoder, "picture", how)
            head, content = process.ask(decoder, "picture", b"good")[0][0]
            assert (head["shape"], len(content)) == ([1, 1, 3], 3)
    finally:
        process.close()


def test_a_decoder_that_waits_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, process = pickle.dumps(MediaDecoder(*SETTINGS)), DecoderProcess()
    try:
        with pytest.raises(SampleError, match="corrupt_image"):
            process.ask(decoder, "picture", b"no picture")
        assert process._child is not None
        os.kill(process._child.pid, signal.SIGSTOP)
        while psutil.Process(process._child.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        monkeypatch.setattr(guarded, "_PATIENCE_SECONDS", 0.05)
        started = time.monotonic()
        with pytest.raises(SampleError, match="waits for something"):
            process.ask(decoder, "picture", b"no picture")
        assert time.monotonic() - started < 30
    finally:
        process.close()


def test_a_large_picture_is_converted_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_filters_image import encode

    rng = np.random.default_rng(0)
    modes = {
        "RGB": rng.integers(0, 256, (37, 21, 3), np.uint8),
        "RGBA": rng.integers(0, 256, (37, 21, 4), np.uint8),
        "I;16": rng.integers(0, 65_536, (37, 21), np.uint16),
    }
    files = [encode(Image.fromarray(pixels), "png") for pixels in modes.values()]
    files.append(encode(Image.fromarray(modes["RGBA"]).quantize(16), "png"))
    files.append(encode(Image.fromarray(rng.random((37, 21), np.float32)), "tiff"))
    whole = [decode_image(data) for data in files]
    monkeypatch.setattr("data_pipeline.sources.image._STRIP_PIXELS", 50)
    for data, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(decode_image(data), expected)
