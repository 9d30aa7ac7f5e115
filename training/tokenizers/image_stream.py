"""Images for the vision tokenizer from corpora of any size: an index of the shards, and reads when they are needed.

What a step sees is a pure function of (seed, first sample), as with `ImageSource`: a draw names a sample, the index
names its bytes. Decoded images are kept in a cache of bounded size, which changes nothing but the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline.sources.image import ImageConfig, smart_resize
from data_pipeline.sources.patterns import find_shards
from data_pipeline.sources.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from data_pipeline.sources.shards import DamageError, places_in
from data_pipeline.storage.descriptors import read_exactly
from data_pipeline.storage.read_ahead import Readers
from model.errors import UserError
from training.tokenizers.image_data import (
    BATCH_STREAM,
    HELD_BACK_STREAM,
    BatchShare,
    normalized,
    sample_pictures,
    seen_by,
    squares,
    stack_by_size,
)
from training.tokenizers.tokenizer_options import ImageCorpus, ImageDataOptions, View

MEMBER_DTYPE = np.dtype([("shard", "<i4"), ("kind", "<i2"), ("offset", "<i8"), ("size", "<i8")])
MAX_DRAWS = 100  # of samples in a row that cannot be read, before the corpus is given up
KINDS = sorted({*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS})


class CorpusIndex:
    """Where the pictures of a corpus lie: 22 bytes a file, whatever its size. Only headers are read to make it."""

    def __init__(self, name: str, corpus: ImageCorpus, num_bad: Counter[str]):
        self.paths = find_shards([corpus.path], "path")
        members: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        num_members = 0
        for shard, path in enumerate(self.paths):
            found: list[tuple[int, int, int, int]] = []  # members of this shard
            first: list[int] = []  # of each sample
            previous = None
            for key, kind, offset, size in _pictures_of(path, num_bad):
                if key != previous:
                    first.append(num_members + len(found))
                    previous = key
                found.append((shard, kind, offset, size))
            num_members += len(found)
            members.append(np.array(found, dtype=MEMBER_DTYPE))
            starts.append(np.array(first, dtype=np.int64))
        self.members = np.concatenate(members)
        self.starts = np.concatenate([*starts, [num_members]])  # of each sample, and the end
        if len(self) < 2:
            raise UserError(
                "a corpus of the vision tokenizer has no usable images",
                where=f"{name}: {corpus.path}",
                expected="at least 2 samples with pictures",
                got=f"{len(self)}, bad: {dict(num_bad)}",
            )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def parts(self, sample: int) -> dict[str, bytes]:
        """The files of a sample, read from its shard at their places."""
        found: dict[str, bytes] = {}
        for number in range(self.starts[sample], self.starts[sample + 1]):
            member = self.members[number]
            path = self.paths[member["shard"]]
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = read_exactly(descriptor, int(member["size"]), int(member["offset"]), path)
            finally:
                os.close(descriptor)
            found[f"{number}.{KINDS[member['kind']]}"] = data
        return found


def _pictures_of(path: Path, num_bad: Counter[str]) -> Iterator[tuple[str, int, int, int]]:
    """(key, kind, offset, bytes) of each picture and video of a shard; a damaged end is counted and passed over."""
    num_bytes = path.stat().st_size
    try:
        for place in places_in(path):
            suffix = place.extension.rsplit(".", 1)[-1] if place else ""
            if place is None or suffix not in KINDS:
                continue
            if place.offset + place.size > num_bytes:
                num_bad["truncated_tar"] += 1
                return
            yield place.key, KINDS.index(suffix), place.offset, place.size
    except DamageError:
        num_bad["truncated_tar"] += 1


def file_digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class StreamingImageSource:
    """Batches of images, as a pure function of (seed, first sample). `training.objectives.offline_rows.Rows`."""

    def __init__(self, options: ImageDataOptions, factor: int, seed: int, share: BatchShare):
        self.options, self.factor, self.seed, self.share = options, factor, seed, share
        self.source_names = list(options.corpora)
        self.num_bad: Counter[str] = Counter()  # by reason; a sample counts each time it is read
        self.captioned: dict[
            int, dict[str, np.ndarray]
        ] = {}  # as `ImageSource`'s; pictures are taken whatever the kind
        self.corpora = [CorpusIndex(name, corpus, self.num_bad) for name, corpus in options.corpora.items()]
        self._corpus_shares = normalized([corpus.weight for corpus in options.corpora.values()])
        self._view_shares = normalized([view.share for view in options.views])
        self._cache: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()
        self.cached_bytes = 0
        self._lock = threading.Lock()
        self._readers = Readers(options.num_readers, "images")
        self._ahead: dict[int, list[list[Future[list[np.ndarray]]]]] = {}  # by first sample, of the next batch at most
        self._held_back_samples = [self._choose_held_back(index) for index in range(len(self.corpora))]
        self._held_back_files = {
            file_digest(data)
            for corpus, samples in enumerate(self._held_back_samples)
            for sample in samples
            for data in self.corpora[corpus].parts(sample).values()
        }
        self.held_back = {
            name: [
                self._resize(picture, options.views[0].area)
                for sample in sorted(self._held_back_samples[corpus])
                for picture in self._pictures(corpus, sample)[:1]
            ]
            for corpus, name in enumerate(self.source_names)
        }
        self.fingerprint = self._fingerprint()

    def _choose_held_back(self, corpus: int) -> set[int]:
        size = len(self.corpora[corpus])
        count = max(1, min(self.options.num_held_back // len(self.corpora), size // 4))
        rng = np.random.default_rng((self.seed, HELD_BACK_STREAM, corpus))
        return set(rng.choice(size, count, replace=False).tolist())

    def _fingerprint(self) -> str:
        """Of the options and of what lies where; how images are kept and read does not count."""
        values = asdict(self.options) | {"cache_bytes": 0, "num_readers": 0}
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([values, self.seed, self.share.global_batch_size]).encode())
        for corpus in self.corpora:
            digest.update(json.dumps([path.name for path in corpus.paths]).encode())
            digest.update(corpus.members.tobytes())
        return digest.hexdigest()

    def batch(self, first_sample: int) -> list[np.ndarray]:
        """As `ImageSource`'s. The pictures of the batch behind it are read meanwhile."""
        drawn = self._ahead.pop(first_sample, None) or self._begin(first_sample)
        behind = first_sample + self.share.global_batch_size
        self._ahead = {behind: self._begin(behind)}
        return [
            array for parts in drawn for array in stack_by_size([image for part in parts for image in part.result()])
        ]

    def _begin(self, first_sample: int) -> list[list[Future[list[np.ndarray]]]]:
        """Has the images of each of this replica's micro-batches read."""
        rng = np.random.default_rng((self.seed, BATCH_STREAM, first_sample))
        view_index = int(rng.choice(len(self._view_shares), p=self._view_shares))
        view, size = self.options.views[view_index], self.share.global_batch_size
        corpora = rng.choice(len(self.corpora), size=size, p=self._corpus_shares).tolist()
        seeds = rng.integers(2**63, size=size).tolist()
        return [
            [self._readers.submit(self._seen, view, corpora[place], seeds[place]) for place in places]
            for places in self.share.micro_batches
        ]

    def _seen(self, view: View, corpus: int, seed: int) -> list[np.ndarray]:
        return seen_by(view, self._resize(self._draw(corpus, seed), view.area))

    def _draw(self, corpus: int, seed: int) -> np.ndarray:
        """One picture (or a random square of it); samples that are held back or cannot be read are drawn again."""
        rng = np.random.default_rng(seed)
        index, options = self.corpora[corpus], self.options.corpora[self.source_names[corpus]]
        for _ in range(MAX_DRAWS):
            sample = int(rng.integers(len(index)))
            if sample in self._held_back_samples[corpus]:
                continue
            pictures = self._pictures(corpus, sample)
            if pictures:
                picture = pictures[int(rng.integers(len(pictures)))]
                return next(squares(picture, min(1, options.random_squares), rng))
        raise UserError(
            "a corpus of the vision tokenizer has almost no usable images",
            where=self.options.corpora[self.source_names[corpus]].path,
            got=f"bad: {dict(self.num_bad)}",
        )

    def _pictures(self, corpus: int, sample: int) -> list[np.ndarray]:
        key = (corpus, sample)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        num_bad: Counter[str] = Counter()
        parts = self.corpora[corpus].parts(sample)
        if sample not in self._held_back_samples[corpus]:  # the same file may lie in the shards twice
            parts = {name: data for name, data in parts.items() if file_digest(data) not in self._held_back_files}
        pictures = sample_pictures(parts, self.options, num_bad)
        with self._lock:
            self.num_bad.update(num_bad)
            if key not in self._cache:
                self._cache[key] = pictures
                self.cached_bytes += sum(picture.nbytes for picture in pictures)
            while self.cached_bytes > self.options.cache_bytes:
                _, dropped = self._cache.popitem(last=False)
                self.cached_bytes -= sum(picture.nbytes for picture in dropped)
        return pictures

    def _resize(self, picture: np.ndarray, area: int) -> np.ndarray:
        return smart_resize(picture, ImageConfig(max_area=area, min_area=area), self.factor)

    def close(self) -> None:
        for future in (future for parts in self._ahead.values() for part in parts for future in part):
            future.cancel()
        self._readers.close()
