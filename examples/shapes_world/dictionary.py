"""A dictionary counted from captioned training pictures and clips, with no network: the baseline of the shapes world.

It knows that a picture has 3 x 3 cells, that "and" joins what is said of two shapes, and that a place comes after "at".
All else is counted: which cell "top left" fills, how "red circle" looks there, how far "right" moves what is named.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.kinds.registry import read_shard
from data_pipeline.sources import BadSample
from data_pipeline.sources.image import decode_image
from examples.shapes_world.media import mp4_frames
from examples.shapes_world.world import GRID
from model.errors import UserError
from training.inference.baselines import Ask, Pictures
from training.inference.evaluation import EvaluationPrompt

FILLED = 12.0  # mean distance from the background, in levels, that makes a cell filled
Cell = tuple[int, int]
Pair = tuple[str, str]  # two words that follow one another: "red circle"


class Dictionary:
    """`corpora` holds the raw shards of `shapes_image_text` and `shapes_video`, as training reads them."""

    def __init__(self, corpora: str, num_pictures: int = 300, num_clips: int = 100, image_pixels: int = 48):
        self.pixels = image_pixels
        self.cell = image_pixels // GRID
        pictures = list(itertools.islice(self._captioned(Path(corpora) / "shapes_image_text"), num_pictures))
        if not pictures:
            raise UserError("no captioned pictures to count", where=corpora, fix="baselines.dictionary.corpora=FOLDER")
        self.background = np.median(np.stack([picture for picture, _ in pictures]), axis=(0, 1, 2))
        self.places = self._count_places(pictures)
        self.looks = self._count_looks(pictures)
        clips = list(itertools.islice(self._clips(Path(corpora) / "shapes_video"), num_clips))
        self.moves = self._count_moves(clips)

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]:
        answer = {"t2i": self.draw, "x2i": self.edit, "interleaved": self.go_on}
        return [[answer[prompt.format](prompt)] for prompt in prompts]

    # Answering

    def draw(self, prompt: EvaluationPrompt) -> np.ndarray:
        picture = np.tile(self.background, (self.pixels, self.pixels, 1)).astype(np.uint8)
        for phrase in prompt.text.split(" and "):
            self._put(picture, self.place_of(phrase), self.look_of(phrase))
        return picture

    def edit(self, prompt: EvaluationPrompt) -> np.ndarray:
        """The last word takes the place of the first of the pair that is named."""
        picture = prompt.images[-1].copy()
        pair, last = self.pair_of(prompt.text), prompt.text.split()[-1]
        if pair is not None:
            self._put(picture, self.place_of(prompt.text), self.looks.get((last, pair[1])))
        return picture

    def go_on(self, prompt: EvaluationPrompt) -> np.ndarray:
        """What is named moves as its last word has moved others."""
        before, words = prompt.images[-1], [part for part in prompt.parts if isinstance(part, str)][-1]
        picture, moved = before.copy(), []
        for phrase in words.split(" and "):
            look = self.look_of(phrase)
            if look is not None:
                here = min(self._cells(), key=lambda cell: np.abs(self._patch(before, cell) - look).mean())
                rows, columns = self.moves.get(phrase.split()[-1], (0, 0))
                self._put(picture, here, np.tile(self.background, (self.cell, self.cell, 1)))
                moved.append(((here[0] + rows, here[1] + columns), look))
        for there, look in moved:
            self._put(picture, there, look)
        return picture

    def place_of(self, phrase: str) -> Cell:
        """The cell that the words after "at", each by itself, are found with most."""
        known = [self.places[word] for word in phrase.partition(" at ")[2].split() if word in self.places]
        return max(self._cells(), key=lambda cell: sum(float(shares[cell]) for shares in known))

    def pair_of(self, phrase: str) -> Pair | None:
        return next((pair for pair in itertools.pairwise(phrase.split()) if pair in self.looks), None)

    def look_of(self, phrase: str) -> np.ndarray | None:
        pair = self.pair_of(phrase)
        return None if pair is None else self.looks[pair]

    # Counting

    def _count_places(self, pictures: list[tuple[np.ndarray, str]]) -> dict[str, np.ndarray]:
        """For each word after "at", log shares [GRID, GRID] of the cells filled beside it, in pictures with one filled cell."""
        counts: dict[str, np.ndarray] = defaultdict(lambda: np.full((GRID, GRID), 0.1))
        for picture, text in pictures:
            filled = self.filled(picture)
            if len(filled) == 1:
                for word in text.partition(" at ")[2].split():
                    counts[word][filled[0]] += 1
        return {word: np.log(count / count.sum()) for word, count in counts.items()}

    def _count_looks(self, pictures: list[tuple[np.ndarray, str]]) -> dict[Pair, np.ndarray]:
        """The median of the cells that a phrase of the caption is about, for each pair of words before "at"."""
        seen: dict[Pair, list[np.ndarray]] = defaultdict(list)
        for picture, text in pictures:
            for phrase in text.split(" and "):
                words = phrase.partition(" at ")[0].split()
                seen[words[-2], words[-1]].append(self._patch(picture, self.place_of(phrase)))
        return {pair: np.median(patches, axis=0) for pair, patches in seen.items()}

    def _count_moves(self, clips: list[tuple[list[np.ndarray], str]]) -> dict[str, Cell]:
        """For each last word of a sentence about one shape, the step from one second to the next, in cells."""
        seen: dict[str, list[Cell]] = defaultdict(list)
        for frames, text in clips:
            filled = [self.filled(frame) for frame in frames]
            if all(len(cells) == 1 for cells in filled):
                for (before,), (after,) in itertools.pairwise(filled):
                    seen[text.split()[-1]].append((after[0] - before[0], after[1] - before[1]))
        return {word: max(set(steps), key=steps.count) for word, steps in seen.items()}

    def filled(self, picture: np.ndarray) -> list[Cell]:
        return [
            cell
            for cell in self._cells()
            if np.linalg.norm(self._patch(picture, cell) - self.background, axis=-1).mean() > FILLED
        ]

    # Pictures

    def _captioned(self, folder: Path) -> Iterator[tuple[np.ndarray, str]]:
        for parts in samples(folder):
            picture = next(content for name, content in parts.items() if name in ("png", "jpg"))
            yield self._shrunk(decode_image(picture)), parts["txt"].decode()

    def _clips(self, folder: Path) -> Iterator[tuple[list[np.ndarray], str]]:
        """Frames from the middles of seconds, and the sentence said between the first two."""
        for parts in samples(folder):
            words = [str(word["word"]) for word in json.loads(parts["words.json"])]
            sentence = " ".join(words[: len(words) // 2])
            yield [self._shrunk(frame) for frame in mp4_frames(parts["mp4"], (0.5, 1.5, 2.5))], sentence

    def _shrunk(self, picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((self.pixels, self.pixels), Image.Resampling.BICUBIC))

    def _cells(self) -> list[Cell]:
        return list(itertools.product(range(GRID), range(GRID)))

    def _patch(self, picture: np.ndarray, cell: Cell) -> np.ndarray:
        return picture[self._rows(cell)].astype(np.float32)

    def _put(self, picture: np.ndarray, cell: Cell, look: np.ndarray | None) -> None:
        if look is not None and all(0 <= place < GRID for place in cell):
            picture[self._rows(cell)] = look.round().astype(np.uint8)

    def _rows(self, cell: Cell) -> tuple[slice, slice]:
        (top, left), side = (place * self.cell for place in cell), self.cell
        return slice(top, top + side), slice(left, left + side)


def samples(folder: Path) -> Iterator[dict[str, bytes]]:
    for shard in sorted(folder.glob("*.tar")):
        for sample in read_shard(shard):
            if not isinstance(sample, BadSample):
                yield sample.parts
