"""Rewards read from pixels alone: edits by structural similarity, and a weak no-reference proxy of looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from training.rewards.base import Answer

SSIM_WINDOW = 7  # pixels; that of skimage, and the least side of a picture that can be compared
FULL_CHANGE = 0.5  # dissimilarity 1 - SSIM inside the box that counts as changed; noise of a codec is far below
RGB_TO_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass
class EditFidelity:
    """An edit of the first prompt picture: unchanged outside of `fields["edit_boxes"]`, changed inside. In [0, 1].

    Boxes are [top, left, bottom, right] in shares of the picture. Worth: mean SSIM outside x min(1, mean (1 - SSIM)
    inside / `FULL_CHANGE`): a copy of the source is worth nothing, nor is another picture. An answer of another size is
    brought to the source's. Judges where something changed, not what to: other rewards do.
    """

    name: ClassVar[str] = "edit_fidelity"
    version: ClassVar[str] = "1"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float | None:
        boxes = answer.fields.get("edit_boxes")
        if not boxes or not answer.prompt_images or min(answer.prompt_images[0].shape[:2]) < SSIM_WINDOW:
            return None
        if not answer.images or answer.images[0] is None:
            return 0.0
        source = answer.prompt_images[0]
        alike = ssim_map(source, resized_like(answer.images[0], source))
        inside = box_mask(boxes, source.shape[:2])
        if inside.all() or not inside.any():
            return None
        kept = max(0.0, float(alike[~inside].mean()))
        changed = min(1.0, float((1.0 - alike[inside]).mean()) / FULL_CHANGE)
        return kept * changed


def ssim_map(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [H, W]: structural similarity (Wang et al. 2004) around each pixel of two uint8 [H, W, 3], over colours."""
    from skimage.metrics import structural_similarity

    _, full = structural_similarity(  # type: ignore[no-untyped-call]
        one, other, win_size=SSIM_WINDOW, channel_axis=2, data_range=255, full=True
    )
    found: np.ndarray = full.mean(axis=2)
    return found


def resized_like(picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    if picture.shape == like.shape:
        return picture
    return np.asarray(Image.fromarray(picture).resize((like.shape[1], like.shape[0]), Image.Resampling.BICUBIC))


def box_mask(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], True inside any box."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    for top, left, bottom, right in boxes:
        mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return mask


@dataclass
class RuleAesthetic:
    """Colourfulness (Hasler and Süsstrunk 2003), contrast and sharpness of the pictures; a weak proxy of looks.

    The mean of three shares, each full at a value that lively photographs reach: colourfulness 60, a standard
    deviation of luminance of 64, a mean Laplacian of 16.
    """

    name: ClassVar[str] = "rule_aesthetic"
    version: ClassVar[str] = "1"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score([image for image in answer.images if image is not None]) for answer in answers]

    def _score(self, images: Sequence[np.ndarray]) -> float | None:
        return float(np.mean([looks(image) for image in images])) if images else 0.0


def looks(picture: np.ndarray) -> float:
    """In [0, 1], of uint8 [H, W, 3]."""
    red, green, blue = (picture[:, :, channel].astype(np.float64) for channel in range(3))
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    colorfulness = spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean())
    luminance = picture @ np.array(RGB_TO_LUMINANCE)
    inner = luminance[1:-1, 1:-1]
    around = luminance[:-2, 1:-1] + luminance[2:, 1:-1] + luminance[1:-1, :-2] + luminance[1:-1, 2:]
    sharpness = float(np.abs(4 * inner - around).mean()) if inner.size else 0.0
    shares: list[Any] = [colorfulness / 60, luminance.std() / 64, sharpness / 16]
    return round(float(np.mean([min(1.0, share) for share in shares])), 9)
