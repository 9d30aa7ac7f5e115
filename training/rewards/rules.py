"""Rules that compare what is in a picture with what was asked for: how many things, which colours, which places.

What is in a picture says a `SceneReader`, named by dotted path, which knows the world that the pictures show. What was
asked for stands in the answer's `fields["scenes"]`: a list with the things in each picture, one JSON object a thing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from model.registry import find_class, made_with
from training.rewards.base import Answer

Thing = dict[str, Any]  # attribute -> JSON value: {"shape": "cross", "color": "red", "row": 0, "column": 2}


@dataclass(frozen=True)
class SceneReading:
    """What a reader sees in a picture."""

    things: list[Thing]
    num_unreadable: int = 0  # further things of which it cannot tell what they are


class SceneReader(Protocol):
    """Reads pictures of one world."""

    version: str

    def read(self, picture: np.ndarray) -> SceneReading:
        """picture: uint8 [H, W, 3]."""
        ...


@dataclass
class SceneMatch:
    """How well the pictures show exactly the things asked for: 1.0 all of them and nothing else, 0.0 none.

    For each picture twice the number of things that agree, over the number of things asked for and seen (Dice's
    coefficient), so that what is missing and what is too much cost alike. A picture that is missing, not whole or more
    than asked for counts as 0. Answers whose prompt has no "scenes" are not judged.
    """

    reader: str  # dotted path of a class with the members of `SceneReader`
    reader_options: dict[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "scene"
    attributes: ClassVar[tuple[str, ...] | None] = None  # that must agree; None: all that a thing has

    def __post_init__(self) -> None:
        found = find_class("scene reader", self.reader, {}, "reader")
        self._reader: SceneReader = made_with(found, "scene reader", self.reader_options, "reader_options")
        self.version = f"1+{self._reader.version}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score(answer) for answer in answers]

    def wanted(self, answer: Answer) -> list[list[Thing]] | None:
        """The things that each picture is to show; None: the prompt does not say."""
        scenes = answer.fields.get("scenes")
        return scenes if isinstance(scenes, list) else None

    def _score(self, answer: Answer) -> float | None:
        scenes = self.wanted(answer)
        if scenes is None:
            return None
        pairs = zip(scenes, answer.images, strict=False)
        shares = [self._share(wanted, picture) for wanted, picture in pairs if picture is not None]
        return sum(shares) / max(1, len(scenes), len(answer.images))

    def _share(self, wanted: Sequence[Thing], picture: np.ndarray) -> float:
        seen = self._reader.read(picture)
        asked = Counter(map(self.key, wanted))
        found = Counter(map(self.key, seen.things))
        total = asked.total() + found.total() + seen.num_unreadable
        return 2 * (asked & found).total() / total if total else 1.0

    def key(self, thing: Thing) -> Hashable:
        """Two things agree when their keys do."""
        if self.attributes is None:
            return tuple(sorted(thing.items()))
        return tuple(thing.get(attribute) for attribute in self.attributes)


@dataclass
class CountMatch(SceneMatch):
    """As many things as asked for, whatever they are."""

    name: ClassVar[str] = "count"
    attributes: ClassVar[tuple[str, ...] | None] = ()


@dataclass
class ColorMatch(SceneMatch):
    """The colours asked for, as often as asked for."""

    name: ClassVar[str] = "color"
    attributes: ClassVar[tuple[str, ...] | None] = ("color",)


@dataclass
class ShapeMatch(SceneMatch):
    """The shapes asked for, as often as asked for."""

    name: ClassVar[str] = "shape"
    attributes: ClassVar[tuple[str, ...] | None] = ("shape",)


@dataclass
class PlaceMatch(SceneMatch):
    """Something at each of the places asked for, and nowhere else."""

    name: ClassVar[str] = "place"
    attributes: ClassVar[tuple[str, ...] | None] = ("row", "column")


@dataclass
class Permanence(SceneMatch):
    """The next state shows the things of the prompt's last picture, wherever they are by then: none lost, none new.

    `attributes` stay as they are while things move. Prompts without a picture are not judged.
    """

    name: ClassVar[str] = "permanence"
    attributes: ClassVar[tuple[str, ...] | None] = ("shape", "color")

    def wanted(self, answer: Answer) -> list[list[Thing]] | None:
        if not answer.prompt_images:
            return None
        return [self._reader.read(answer.prompt_images[-1]).things] * max(1, len(answer.images))
