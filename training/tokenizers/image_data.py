"""Images for the vision tokenizer, out of raw webdataset shards of any kind, held in memory at training size.

What a step sees is a pure function of (seed, first sample). A picture comes at several sizes ("views"), since a
tokenizer has to work at all resolutions that the later stages use.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class BatchShare:
    """What one replica takes of a global batch: micro-batches that lie one behind the other, as many as the others.

    Where a micro-batch begins does not depend on the number of replicas, so that a loss which compares the pictures of
    one forward pass (even use of the codes, the adversary's batch norms) does not either.
    """

    global_batch_size: int
    micro_batch_size: int
    replica: int = 0
    num_replicas: int = 1

    @property
    def micro_batches(self) -> list[range]:
        """Places in the global batch."""
        own = self.global_batch_size // self.num_replicas
        first, size = self.replica * own, self.micro_batch_size
        return [range(start, min(start + size, first + own)) for start in range(first, first + own, size)]


class ImageSource:
    """Batches of images, as a pure function of (seed, first sample). `training.objectives.offline_rows.Rows`."""

    def __init__(self, options: ImageDataOptions, factor: int, seed: int, share: BatchShare):
        self.options, self.factor, self.seed, self.share = options, factor, seed, share
        self.source_names = list(options.corpora)
        self.num_bad: Counter[str] = Counter()  # by reason
        self.held_back: dict[str, list[np.ndarray]] = {}  # by corpus, whole pictures at the first view's size
        # By the area of each view, then by caption: the first whole picture of each, at most MAX_CAPTIONED.
        self.captioned: dict[int, dict[str, np.ndarray]] = {view.area: {} for view in options.views}
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([_described(options), seed, share.global_batch_size]).encode())
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
        """This replica's images of one global batch: arrays uint8 [n, H, W, 3], one for each size in a micro-batch."""
        rng = np.random.default_rng((self.seed, BATCH_STREAM, first_sample))
        view_index = int(rng.choice(len(self._view_shares), p=self._view_shares))
        view, size = self.options.views[view_index], self.share.global_batch_size
        corpora = [
            self.images[view.area][index] for index in rng.choice(len(self._corpus_shares), size, p=self._corpus_shares)
        ]
        chosen = [images[int(rng.integers(len(images)))] for images in corpora]
        return [
            array
            for places in self.share.micro_batches
            for array in stack_by_size([shown for place in places for shown in seen_by(view, chosen[place])])
        ]

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


def seen_by(view: View, image: np.ndarray) -> list[np.ndarray]:
    """What a view takes of an image of its area."""
    return busiest_crops(image, view.crop, view.crops_per_image) if view.crop else [image]


def stack_by_size(images: list[np.ndarray]) -> list[np.ndarray]:
    """Images of the same size stacked, sizes in order of first occurrence."""
    groups: dict[tuple[int, ...], list[np.ndarray]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    return [np.stack(group) for group in groups.values()]
