"""Different pictures that a vision tokenizer gives the same codes: after it, nothing can tell them apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.wrapper import encode_pixels

MAX_NAMES = 100  # of pairs that are listed
IMAGES_AT_ONCE = 128


def colliding_captions(model: IBQ, images: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Captions whose pictures (uint8 [H, W, 3], one each) differ and have the same codes: groups of two or more."""
    by_size: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for caption, image in images.items():
        by_size[image.shape].append(caption)
    groups: dict[tuple[tuple[int, ...], bytes], dict[bytes, str]] = defaultdict(dict)
    model.eval()
    for captions in by_size.values():
        for first in range(0, len(captions), IMAGES_AT_ONCE):
            some = captions[first : first + IMAGES_AT_ONCE]
            codes = encode_pixels(model, np.stack([images[caption] for caption in some]))
            for caption, own in zip(some, codes, strict=True):
                groups[own.shape, own.tobytes()].setdefault(images[caption].tobytes(), caption)  # equal ones count once
    model.train()
    return [sorted(found.values()) for found in groups.values() if len(found) > 1]


def describe_collisions(model: IBQ, captioned: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, object]:
    """For each view's area in pixels: how many pairs of captions collide, and their names, "a / b"."""
    described: dict[str, object] = {}
    for area, images in captioned.items():
        groups = colliding_captions(model, images)
        names = [f"{one} / {other}" for group in groups for at, one in enumerate(group) for other in group[at + 1 :]]
        described[f"colliding_captions_{area}"] = len(names)
        described[f"colliding_captions_{area}_of"] = len(images)
        described[f"colliding_captions_{area}_names"] = names[:MAX_NAMES]
    return described
