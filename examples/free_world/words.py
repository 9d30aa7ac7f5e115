"""What is said of a scene: its bodies in any order, and where they lie to one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from examples.free_world.bodies import Body, Scene, is_held_out

CLEAR_PIXELS = 8.0  # a relation that is said holds by at least so much
HOLDS_PIXELS = 1.0  # and counts as shown from here on
THING = "thing"  # stands for a shape that is not said
WHAT_NEXT = "what comes next"
OPENINGS = ("", "there is ", "a picture of ")
RELATIONS: dict[str, Callable[[Body, Body], float]] = {  # by how many pixels it holds
    "left of": lambda one, other: other.x - one.x,
    "right of": lambda one, other: one.x - other.x,
    "above": lambda one, other: other.y - one.y,
    "below": lambda one, other: one.y - other.y,
}

Frame = TypeVar("Frame")


def with_words_between(frames: Sequence[Frame]) -> list[Frame | str]:
    """A film as a document: from the third on, words ask for each frame before it comes."""
    parts: list[Frame | str] = list(frames[:2])
    for frame in frames[2:]:
        parts += [WHAT_NEXT, frame]
    return parts


@dataclass(frozen=True)
class Relation:
    one: tuple[str, str]  # pair of the body that is placed
    words: str
    other: tuple[str, str]

    def holds(self, scene: Scene) -> bool:
        """Of the first bodies of these pairs; False where one is missing."""
        by_pair = {body.pair: body for body in scene}
        if self.one not in by_pair or self.other not in by_pair:
            return False
        return RELATIONS[self.words](by_pair[self.one], by_pair[self.other]) > HOLDS_PIXELS


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Relation, ...]]:
    """A caption and the relations that it states.

    The bodies come in a random order; each but the first is placed to one that was named before, by a relation that
    clearly holds, where there is one.
    """
    return told(scene, {body: body.name for body in scene}, rng)


def describe_in_part(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that says each body's colour or its shape, or both, and never both of a held-out pair."""
    return told(scene, {body: name_in_part(body, rng) for body in scene}, rng)[0]


def name_in_part(body: Body, rng: np.random.Generator) -> str:
    names = [f"{body.color} {THING}", body.shape]
    if not is_held_out(*body.pair):
        names.append(body.name)
    return names[rng.integers(len(names))]


def told(scene: Scene, names: dict[Body, str], rng: np.random.Generator) -> tuple[str, tuple[Relation, ...]]:
    order = [scene[index] for index in rng.permutation(len(scene))]
    phrases, relations = [], []
    for number, body in enumerate(order):
        phrase = f"a {body.size} {names[body]}"
        choices = [
            (words, other)
            for other in order[:number]
            for words, margin in RELATIONS.items()
            if margin(body, other) >= CLEAR_PIXELS and list(names.values()).count(names[other]) == 1
        ]
        if choices:
            words, other = choices[rng.integers(len(choices))]
            phrase += f" {words} the {names[other]}"
            relations.append(Relation(body.pair, words, other.pair))
        phrases.append(phrase)
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    return opening + " and ".join(phrases), tuple(relations)
