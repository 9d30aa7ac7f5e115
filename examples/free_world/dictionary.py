"""A dictionary counted from captioned training pictures, with no network: the baseline of the free world's words.

It knows that grounds are grey and come again every 8 pixels, that "and" joins what is said of two bodies, and that a body's
name is the three words "size colour shape". All else is counted: how "small red square" looks, and where "left of" puts it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.sources.image import decode_image
from examples.free_world.bodies import SIDE
from examples.free_world.judge import MIN_PIXELS, MIN_SATURATION, patches, saturation
from examples.shapes_world.dictionary import samples
from model.errors import UserError
from training.inference.baselines import Ask, Pictures
from training.inference.evaluation import EvaluationPrompt

GAP = 2.0  # pixels between two looks
PERIOD = 8  # pixels after which a ground comes again
STEP = 4  # pixels between the places that are tried for a body
ATTEMPTS = 200  # at a picture with all that its caption says
Key = tuple[str, str, str]  # size, colour, shape


@dataclass(frozen=True)
class Look:
    pixels: np.ndarray  # uint8 [h, w, 3]
    mask: np.ndarray  # bool [h, w]


@dataclass(frozen=True)
class Placed:
    """A look in a picture; `top` and `left` of its box."""

    look: Look
    top: int
    left: int

    @property
    def middle(self) -> np.ndarray:
        """(right, down) in pixels."""
        height, width = self.look.mask.shape
        return np.array([self.left + width / 2, self.top + height / 2])

    def is_apart(self, other: Placed) -> bool:
        (height, width), (other_height, other_width) = self.look.mask.shape, other.look.mask.shape
        return (
            self.top + height + GAP < other.top
            or other.top + other_height + GAP < self.top
            or self.left + width + GAP < other.left
            or other.left + other_width + GAP < self.left
        )


class Dictionary:
    """`corpora` holds the raw shards of `free_image_text`, as training reads them."""

    def __init__(self, corpora: str, num_pictures: int = 1000):
        shards = Path(corpora) / "free_image_text"
        pictures = [
            (decode_image(parts["png"]), parts["txt"].decode())
            for parts in itertools.islice(samples(shards), num_pictures)
        ]
        if not pictures:
            raise UserError(
                "no captioned pictures to count", where=str(shards), fix="baselines.dictionary.corpora=FOLDER"
            )
        self.level = float(np.median(np.stack([picture for picture, _ in pictures])))
        self.looks = self._count_looks(pictures)
        self.relations = self._count_relations(pictures)

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]:
        answer = {"t2i": self.draw, "x2i": self.edit}
        return [[answer[prompt.format](prompt)] for prompt in prompts]

    # Answering

    def draw(self, prompt: EvaluationPrompt) -> np.ndarray:
        """All bodies whose names are known, where the relations say; what has no place after all attempts is left out."""
        rng, best = np.random.default_rng(0), list[Placed]()
        num_known = sum(self._parts(phrase)[0] is not None for phrase in prompt.text.split(" and "))
        for _ in range(ATTEMPTS):
            placed = self._arrange(prompt.text, rng)
            best = max(best, placed, key=len)
            if len(best) == num_known:
                break
        picture = np.full((SIDE, SIDE, 3), round(self.level), np.uint8)
        for one in best:
            put(picture, one)
        return picture

    def edit(self, prompt: EvaluationPrompt) -> np.ndarray:
        """The last word takes the place of the word of its kind in the name of what is named; a name alone takes it away."""
        picture, words = prompt.images[-1].copy(), prompt.text.split()
        named = [key for key in self.looks if key[1:] in set(itertools.pairwise(words))]
        bodies = found_bodies(picture)
        if not named or not bodies:
            return picture
        body, key = min(itertools.product(bodies, named), key=lambda pair: distance(pair[0].look, self.looks[pair[1]]))
        erase(picture, body)
        size, color, shape = key
        changed = [(words[-1], color, shape), (size, words[-1], shape)]  # one of them is no name that was ever seen
        for look in [self.looks[one] for one in changed if one in self.looks]:
            left, top = body.middle - np.array(look.mask.shape[::-1]) / 2
            put(picture, Placed(look, int(top), int(left)))
        return picture

    def _arrange(self, text: str, rng: np.random.Generator) -> list[Placed]:
        placed: dict[tuple[str, str], Placed] = {}
        for phrase in text.split(" and "):
            key, relation, other = self._parts(phrase)
            if key is None:
                continue
            towards, anchor = self.relations.get(relation), placed.get(other)
            for place in rng.permutation((SIDE // STEP) ** 2):
                down, right = divmod(int(place), SIDE // STEP)
                one = Placed(self.looks[key], STEP * down, STEP * right)
                if not fits(one) or not all(map(one.is_apart, placed.values())):
                    continue
                if towards is None or anchor is None or float(towards @ (one.middle - anchor.middle)) >= GAP:
                    placed[key[1:]] = one
                    break
        return list(placed.values())

    def _parts(self, phrase: str) -> tuple[Key | None, str, tuple[str, str]]:
        """The name that is known, the words after it up to "the", and the pair after that."""
        words = phrase.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        at = next((number for number, triple in enumerate(triples) if triple in self.looks), None)
        relation, _, other = " ".join(words[at + 3 :] if at is not None else []).partition(" the ")
        pair = (*other.split(), "", "")[:2]
        return None if at is None else triples[at], relation, (pair[0], pair[1])

    # Counting

    def _count_looks(self, pictures: list[tuple[np.ndarray, str]]) -> dict[Key, Look]:
        """The first that is seen alone under each name."""
        looks: dict[Key, Look] = {}
        for picture, text in pictures:
            bodies, words = found_bodies(picture), text.split()
            if len(bodies) == 1 and " and " not in text:
                looks.setdefault((words[-3], words[-2], words[-1]), bodies[0].look)
        return looks

    def _count_relations(self, pictures: list[tuple[np.ndarray, str]]) -> dict[str, np.ndarray]:
        """For each relation the axis and the way on which pairs of bodies agree most: a unit vector (right, down)."""
        seen: dict[str, list[np.ndarray]] = defaultdict(list)
        for picture, text in pictures:
            phrases, bodies = text.split(" and "), found_bodies(picture)
            if len(phrases) != 2 or len(bodies) != 2:
                continue
            (one, _, _), (two, relation, _) = self._parts(phrases[0]), self._parts(phrases[1])
            if one is None or two is None or not relation:
                continue
            second = min(bodies, key=lambda body: distance(body.look, self.looks[two]))
            first = next(body for body in bodies if body is not second)
            seen[relation].append(np.sign(second.middle - first.middle))
        means = {relation: np.mean(signs, axis=0) for relation, signs in seen.items()}
        return {relation: np.sign(mean) * (np.abs(mean) == np.abs(mean).max()) for relation, mean in means.items()}


def found_bodies(picture: np.ndarray) -> list[Placed]:
    """What has a colour, patch by patch."""
    found = []
    for mask in patches(saturation(picture) > MIN_SATURATION):
        if mask.sum() >= MIN_PIXELS:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            found.append(Placed(Look(picture[box].copy(), mask[box]), int(rows[0]), int(columns[0])))
    return found


def distance(one: Look, other: Look) -> float:
    """In levels, over the larger of both boxes; what only one has counts in full."""
    height, width = np.maximum(one.mask.shape, other.mask.shape)
    layers = []
    for look in (one, other):
        layer = np.zeros((height, width, 3), np.float32)
        layer[: look.mask.shape[0], : look.mask.shape[1]] = np.where(look.mask[..., None], look.pixels, 0)
        layers.append(layer)
    return float(np.abs(layers[0] - layers[1]).mean())


def fits(one: Placed) -> bool:
    height, width = one.look.mask.shape
    return min(one.top, one.left) >= GAP and one.top + height <= SIDE - GAP and one.left + width <= SIDE - GAP


def put(picture: np.ndarray, one: Placed) -> None:
    """In place; what reaches over the edge is cut."""
    height, width = (
        min(size, SIDE - start) for size, start in zip(one.look.mask.shape, (one.top, one.left), strict=True)
    )
    place = picture[one.top : one.top + height, one.left : one.left + width]
    mask = one.look.mask[:height, :width]
    place[mask] = one.look.pixels[:height, :width][mask]


def erase(picture: np.ndarray, body: Placed) -> None:
    """The ground comes back, in place: what the rest of the picture has most often at the same place of its period."""
    height, width = body.look.mask.shape
    grey = saturation(picture) <= MIN_SATURATION / 4
    around = np.zeros_like(grey)
    around[max(0, body.top - 1) : body.top + height + 1, max(0, body.left - 1) : body.left + width + 1] = True
    for down, right in itertools.product(range(PERIOD), range(PERIOD)):
        alike = np.s_[down::PERIOD, right::PERIOD]
        picture[alike][(around & ~grey)[alike]] = np.median(picture[alike][grey[alike]], axis=0)
