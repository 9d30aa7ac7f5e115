"""Images for the vision tokenizer, out of raw webdataset shards of any kind, held in memory at training size.

What a step sees is a pure function of (seed, first sample). A picture comes at several sizes ("views"), since a
tokenizer has to work at all resolutions that the later stages use.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from data_pipeline.kinds.named_parts import PartsConfig
from data_pipeline.kinds.registry import KindSet, read_shard
from data_pipeline.sources import BadSample, Sample, SampleError
from data_pipeline.sources.image import ImageConfig, decode_image, smart_resize
from data_pipeline.sources.patterns import find_shards
from data_pipeline.sources.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from data_pipeline.video.keyframes import VideoConfig, extract_key_frames
from model.errors import UserError
from training.tokenizers.tokenizer_options import ImageCorpus, ImageDataOptions, View

HELD_BACK_STREAM = 1  # keeps the draws of one purpose apart from another's
BATCH_STREAM = 2
MAX_CAPTIONED = 2_000  # pictures of different captions whose codes are compared in the end
MIN_SAMPLES_TO_HOLD_BACK = 4  # a corpus of fewer holds back single pictures


class ImageSource:
    """Batches of images, as a pure function of (seed, first sample). `training.objectives.offline_rows.Rows`."""

    def __init__(
        self, options: ImageDataOptions, factor: int, seed: int, global_batch_size: int, micro_batch_size: int
    ):
        self.options, self.factor, self.seed = options, factor, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.source_names = list(options.corpora)
        self.num_bad: Counter[str] = Counter()  # by reason
        self.held_back: dict[str, list[np.ndarray]] = {}  # by corpus, whole pictures at the first view's size
        # By the area of each view, then by caption: the first whole picture of each, at most MAX_CAPTIONED.
        self.captioned: dict[int, dict[str, np.ndarray]] = {view.area: {} for view in options.views}
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([_described(options), seed, global_batch_size]).encode())
        # [area][corpus][image], uint8 [H, W, 3]; views of the same area share them
        self.images: dict[int, list[list[np.ndarray]]] = {
            view.area: [[] for _ in self.source_names] for view in options.views
        }
        for corpus_index, (name, corpus) in enumerate(options.corpora.items()):
            self._load(corpus_index, name, corpus, digest)
        self.fingerprint = digest.hexdigest()
        self._corpus_shares = normalized([corpus.weight for corpus in options.corpora.values()])
        self._view_shares = normalized([view.share for view in options.views])

    def _load(self, corpus_index: int, name: str, corpus: ImageCorpus, digest: hashlib.blake2b) -> None:
        """Nothing of a picture that is held back, and no picture equal to one, is trained on."""
        rng = np.random.default_rng((self.seed, HELD_BACK_STREAM, corpus_index))
        found = list(self._read_pictures(corpus))
        if len(found) < 2:
            raise UserError(
                "a corpus of the vision tokenizer has no usable images",
                where=f"{name}: {corpus.path}",
                expected="at least 2",
                got=f"{len(found)}, bad: {dict(self.num_bad)}",
            )
        first_area = self.options.views[0].area
        wanted = self.options.num_held_back // len(self.source_names)
        chosen = choose_held_back([sample for sample, _, _ in found], wanted, rng)
        held_back = [self._resize(found[index][1], first_area) for index in sorted(chosen)]
        self.held_back[name] = held_back
        known = {image.tobytes() for image in held_back}
        for image in held_back:
            digest.update(image.tobytes())
        for index, (_, picture, caption) in enumerate(found):
            self._keep_captioned(caption, picture)
            if index in chosen or self._resize(picture, first_area).tobytes() in known:
                continue
            for square in squares(picture, corpus.random_squares, rng):
                sized = {area: self._resize(square, area) for area in self.images}
                digest.update(sized[first_area].tobytes())
                for area, image in sized.items():
                    self.images[area][corpus_index].append(image)

    def _keep_captioned(self, caption: str, picture: np.ndarray) -> None:
        for area, kept in self.captioned.items():
            if caption and caption not in kept and len(kept) < MAX_CAPTIONED:
                kept[caption] = self._resize(picture, area)

    def _read_pictures(self, corpus: ImageCorpus) -> Iterator[tuple[int, np.ndarray, str]]:
        """(number of the sample, decoded picture, its caption or ""), as many as make `max_images` images."""
        paths = find_shards([corpus.path], "path")
        num_left = max(2, corpus.max_images // max(1, corpus.random_squares))
        kinds = KindSet(corpus.kinds, corpus.parts)
        for number, sample in enumerate(sample for path in paths for sample in read_shard(path, kinds)):
            if isinstance(sample, BadSample):
                self.num_bad[sample.reason] += 1
                continue
            pictures = sample_pictures(kinds[sample.kind].images(sample), self.options, self.num_bad)
            caption = _caption(sample)
            for picture in pictures:
                if num_left == 0:
                    return
                num_left -= 1
                yield number, picture, caption

    def _resize(self, picture: np.ndarray, area: int) -> np.ndarray:
        return smart_resize(picture, ImageConfig(max_area=area, min_area=area), self.factor)

    def batch(self, first_sample: int) -> list[np.ndarray]:
        """The images of one global batch: arrays uint8 [n, H, W, 3] of one size each, n bounded by the micro-batch."""
        rng = np.random.default_rng((self.seed, BATCH_STREAM, first_sample))
        view_index = int(rng.choice(len(self._view_shares), p=self._view_shares))
        view = self.options.views[view_index]
        chosen: list[np.ndarray] = []
        for corpus_index in rng.choice(len(self._corpus_shares), size=self.global_batch_size, p=self._corpus_shares):
            images = self.images[view.area][corpus_index]
            image = images[int(rng.integers(len(images)))]
            chosen += busiest_crops(image, view.crop, view.crops_per_image) if view.crop else [image]
        return stack_by_size(chosen, images_at_once(view, self.micro_batch_size))

    def close(self) -> None:
        """Nothing is held open."""


def _caption(sample: Sample) -> str:
    """Of a picture that is its sample's only one; else empty."""
    try:
        return sample.text("txt") if sample.kind == "image_text" else ""
    except SampleError:
        return ""


def _described(options: ImageDataOptions) -> dict[str, Any]:
    """What decides the images. Kinds and parts are left out where they say what was so before they could be chosen."""
    described = asdict(options)
    for name, corpus in options.corpora.items():
        if not corpus.kinds:
            del described["corpora"][name]["kinds"]
        if corpus.parts == PartsConfig():
            del described["corpora"][name]["parts"]
    return described


def sample_pictures(parts: dict[str, bytes], options: ImageDataOptions, num_bad: Counter[str]) -> list[np.ndarray]:
    """Pictures and key frames of a sample, uint8 [H, W, 3]; unreadable parts are counted in `num_bad`."""
    pictures = []
    for extension, data in parts.items():
        suffix = extension.rsplit(".", 1)[-1]
        try:
            if suffix in IMAGE_EXTENSIONS:
                pictures.append(decode_image(data))
            elif suffix in VIDEO_EXTENSIONS:
                config = VideoConfig(keyframe_seconds=options.keyframe_seconds)
                pictures += [frame.pixels for frame in extract_key_frames(data, config)]
        except SampleError as error:
            num_bad[error.reason] += 1
    return pictures


def choose_held_back(samples: list[int], count: int, rng: np.random.Generator) -> set[int]:
    """Which pictures are held back, given the sample of each: about `count`, at most a quarter, at least one.

    Pictures of one sample resemble each other (frames of a video, an edit and its source), so whole samples are
    held back where there are four or more.
    """
    units = np.asarray(samples) if len(set(samples)) >= MIN_SAMPLES_TO_HOLD_BACK else np.arange(len(samples))
    names = np.unique(units)
    chosen: set[int] = set()
    for unit in rng.permutation(names)[: max(1, len(names) // 4)]:
        if chosen and len(chosen) >= count:
            break
        chosen |= set(np.flatnonzero(units == unit).tolist())
    return chosen


def normalized(weights: list[float]) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    result: np.ndarray = values / values.sum()
    return result


def squares(picture: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` random squares of a picture, from a quarter of its shorter side up; the whole of it for 0."""
    if count == 0:
        yield picture
        return
    height, width = picture.shape[:2]
    shorter = min(height, width)
    for _ in range(count):
        side = int(rng.integers(max(1, shorter // 4), shorter + 1))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        yield picture[top : top + side, left : left + side]


def busiest_crops(image: np.ndarray, side: int, count: int) -> list[np.ndarray]:
    """The `count` squares of `side` pixels, on a grid, whose values spread most; the whole image if it is smaller."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    if rows * columns == 0:
        return [image]
    tiles = image[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side, side, 3)
    spread = tiles.reshape(len(tiles), -1, 3).astype(np.float32).std(axis=1).sum(axis=1)
    return [tiles[index] for index in np.argsort(-spread, kind="stable")[:count]]


def images_at_once(view: View, micro_batch_size: int) -> int:
    """Arrays of one forward pass: the images of a micro-batch, or all squares cut out of them."""
    return micro_batch_size * (view.crops_per_image if view.crop else 1)


def stack_by_size(images: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """Images of the same size stacked, at most `limit` of them, sizes in order of first occurrence."""
    groups: dict[tuple[int, ...], list[np.ndarray]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    return [
        np.stack(group[start : start + limit]) for group in groups.values() for start in range(0, len(group), limit)
    ]
