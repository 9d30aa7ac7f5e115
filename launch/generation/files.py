"""What is written of answers: PNG files, rollouts as a strip and as MP4, and the trace."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.video.encode import mp4_bytes
from model.durable import replace_file
from training.inference.answering import Answering
from training.inference.model import InferenceModel

GAP_PIXELS = 2  # between the frames of a strip


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def strip_of(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames side by side on white, uint8 [H, W, 3]."""
    height = max(frame.shape[0] for frame in frames)
    columns = []
    for frame in frames:
        column = np.full((height, frame.shape[1] + GAP_PIXELS, 3), 255, np.uint8)
        column[: frame.shape[0], : frame.shape[1]] = frame
        columns.append(column)
    return np.concatenate(columns, axis=1)[:, :-GAP_PIXELS]


def movie_of(frames: Sequence[np.ndarray], frames_per_second: int) -> bytes:
    """MP4 of frames in the size of the last one, with an even number of rows and columns as H.264 wants them."""
    height, width = (side + side % 2 for side in frames[-1].shape[:2])
    return mp4_bytes([resized(frame, height, width) for frame in frames], frames_per_second)


def resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def save_answer(
    model: InferenceModel, answering: Answering, folder: Path, stem: str, shown: Sequence[np.ndarray], fps: int
) -> dict[str, Any]:
    """Writes the pictures `STEM_0.png`, ... and of a rollout also `STEM_strip.png` and `STEM.mp4` (behind `shown`).

    Returns `parts` (in order), `pictures`, and for a rollout `strip` and `movie`: names of files in `folder`.
    """
    parts: list[dict[str, Any]] = []
    frames: list[np.ndarray] = []
    names: list[str] = []
    for part in answering.parts:
        if part.codes is None:
            parts.append({"text": part.text} | ({"given": True} if part.is_given else {}))
            continue
        frames.append(model.picture(part.codes))
        names.append(f"{stem}_{len(names)}.png")
        replace_file(folder / names[-1], png_bytes(frames[-1]))
        parts.append({"picture": names[-1], "grid": list(part.codes.shape)})
    written: dict[str, Any] = {"parts": parts, "pictures": names}
    if answering.is_rollout and frames:
        height, width = frames[-1].shape[:2]
        film = [resized(frame, height, width) for frame in (*shown, *frames)]
        replace_file(folder / f"{stem}_strip.png", png_bytes(strip_of(film)))
        replace_file(folder / f"{stem}.mp4", movie_of(film, fps))
        written |= {"strip": f"{stem}_strip.png", "movie": f"{stem}.mp4"}
    return written


def trace_of(answering: Answering, seed: int) -> dict[str, Any]:
    """How an answer came about. `ids`: what the model generated; `turns`: how many batches it took part in."""
    return {
        "seed": seed,
        "index": answering.draw,
        "prompt_tokens": answering.num_prompt_tokens,
        "ids": answering.ids,
        "grid": list(answering.grid) if answering.grid else None,
        "turns": answering.num_turns,
        "forwards": answering.num_forwards,
        "seconds": round(answering.seconds, 6),
        "finished": answering.finished,
    }
