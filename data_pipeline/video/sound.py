"""The sound of a film as speech recognizers take it: one channel, 16,000 samples a second, on the clock of its pictures."""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np

from data_pipeline.sources.samples import SampleError
from data_pipeline.video.decode import MAX_GAP_SECONDS, decoded_frames, open_video

SAMPLE_RATE = 16_000
MAX_SOUND_SECONDS = 2 * 3600  # 230 MB of samples
_GAP_SECONDS = 0.1  # a longer one between what a stream has and what its time stamps say is silence


def read_sound(data: bytes) -> Iterator[np.ndarray]:
    """Blocks of samples, int16 [n]; the first one is at the time 0 of `VideoScan.times`, and gaps are silence.

    Raises `SampleError`: `no_sound`, `undecodable_sound` when not one packet decodes, `sound_too_long`, `bad_time_stamps`, and what
    `open_video` raises.
    """
    limit = MAX_SOUND_SECONDS * SAMPLE_RATE
    num_samples = num_errors = 0
    with open_video(data) as (container, _):
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise SampleError("no_sound", "no stream of sound that has a decoder")
        begins = (container.start_time or 0) / av.time_base
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        for frame in decoded_frames(container, stream):
            if frame is None:
                num_errors += 1
                continue
            silence = 0.0 if frame.time is None else frame.time - begins - num_samples / SAMPLE_RATE
            if silence > MAX_GAP_SECONDS:
                raise SampleError("bad_time_stamps", f"{silence:,.0f} seconds without sound")
            blocks = [np.zeros(int(silence * SAMPLE_RATE), np.int16)] if silence > _GAP_SECONDS else []
            blocks += [_samples(part) for part in resampler.resample(frame)]
            for block in blocks:
                num_samples += len(block)
                if num_samples > limit:
                    raise SampleError("sound_too_long", f"more than {MAX_SOUND_SECONDS:,} seconds")
                yield block
        yield from map(_samples, resampler.resample(None))
    if not num_samples:
        raise SampleError("undecodable_sound", f"{num_errors} broken packets")


def _samples(frame: av.AudioFrame) -> np.ndarray:
    found: np.ndarray = frame.to_ndarray().reshape(-1)
    return found
