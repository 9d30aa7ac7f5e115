"""Token-id layout: `[text | structure and reserved | visual]`, contiguous; which id means what.

The `emu35` preset holds the ids of the released tokenizer (github.com/baaivision/Emu3.5, `src/tokenizer_emu3_ibq`,
282,926 ids). The `compact` preset has the same structure around a small text vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from model.errors import Problems, UserError

if TYPE_CHECKING:  # every command imports this module
    import numpy as np


class TokenClass(IntEnum):
    """The class a label belongs to; the loss has one weight for each."""

    TEXT = 0
    VISUAL = 1
    STRUCTURE = 2


# Order of the structure ids of the compact preset, counted from `text_size`.
STRUCTURE_NAMES = (
    "pad",
    "bos",
    "eos",
    "boi",
    "eoi",
    "img",
    "eol",
    "eof",
    "tms",
    "bss",
    "ess",
    "boc",
    "eoc",
    "bog",
    "eog",
)

# Released ids (Emu3.5 `src/utils/model_utils.py`); `<|extra_i|>` is 151,646 + i.
EMU35_STRUCTURE = {
    "pad": 151643,
    "bos": 151849,
    "eos": 151850,
    "boi": 151852,
    "eoi": 151853,
    "img": 151851,
    "eol": 151846,
    "eof": 151847,
    "tms": 151848,
    "bss": 151746,
    "ess": 151747,
    "boc": 151696,
    "eoc": 151697,
    "bog": 151706,
    "eog": 151707,
}
EMU35_TEXT_SIZE = 151_643
EMU35_VISUAL_START = 151_854
EMU35_VISUAL_SIZE = 131_072


@dataclass
class VocabularyConfig:
    """Which ids exist. `text_size` and `reserved_size` are read by the `compact` preset only."""

    preset: str = "compact"  # compact | emu35
    text_size: int = 1024  # number of text ids (the SentencePiece model's vocabulary)
    reserved_size: int = 32  # structure ids, the named ones first
    visual_size: int = 512  # number of codes of the vision tokenizer
    pad_multiple: int = 128  # the embedding is padded to a multiple of this, whatever the layout

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.preset in ("compact", "emu35"),
            f"{key}.preset",
            f"unknown preset {self.preset!r}",
            f"{key}.preset=compact or emu35",
        )
        problems.check(
            self.reserved_size >= len(STRUCTURE_NAMES),
            f"{key}.reserved_size",
            f"must hold the {len(STRUCTURE_NAMES)} structure ids, got {self.reserved_size}",
            f"{key}.reserved_size=32",
        )
        for name in ("text_size", "visual_size", "pad_multiple"):
            problems.check(getattr(self, name) > 0, f"{key}.{name}", "must be positive")
        if self.preset == "emu35":
            for name in ("text_size", "reserved_size", "visual_size"):
                self.check_unset(problems, key, name, "the ids of preset=emu35 are fixed")

    def check_unset(self, problems: Problems, key: str, name: str, reason: str) -> None:
        """A size that nothing reads is a mistake when it is set to something else than its default."""
        is_default = getattr(self, name) == getattr(VocabularyConfig(), name)
        problems.check(is_default, f"{key}.{name}", f"has no effect: {reason}", f"leave {key}.{name} out")


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one vocabulary. `size` counts real ids, `padded_size` the rows of the embedding."""

    text_size: int
    structure: dict[str, int]
    visual_start: int
    visual_size: int
    padded_size: int

    @classmethod
    def from_config(cls, config: VocabularyConfig) -> Vocabulary:
        if config.preset == "emu35":
            text_size, structure = EMU35_TEXT_SIZE, dict(EMU35_STRUCTURE)
            visual_start, visual_size = EMU35_VISUAL_START, EMU35_VISUAL_SIZE
        else:
            text_size = config.text_size
            structure = {name: text_size + index for index, name in enumerate(STRUCTURE_NAMES)}
            visual_start, visual_size = text_size + config.reserved_size, config.visual_size
        size = visual_start + visual_size
        padded_size = -(-size // config.pad_multiple) * config.pad_multiple
        return cls(text_size, structure, visual_start, visual_size, padded_size)

    @property
    def size(self) -> int:
        return self.visual_start + self.visual_size

    def __getattr__(self, name: str) -> int:
        """`vocabulary.bos`, `vocabulary.boi`, ...: the id of a structure token."""
        structure = self.__dict__.get("structure", {})
        if name in structure:
            result: int = structure[name]
            return result
        raise AttributeError(name)

    def is_visual(self, ids: Any) -> Any:
        """Elementwise for numpy arrays and torch tensors: is the id a visual code?"""
        return (ids >= self.visual_start) & (ids < self.size)

    def codes_to_ids(self, codes: Any) -> Any:
        return codes + self.visual_start

    def ids_to_codes(self, ids: Any) -> Any:
        return ids - self.visual_start

    def check_codes(self, codes: np.ndarray) -> None:
        if codes.size and (codes.min() < 0 or codes.max() >= self.visual_size):
            raise UserError(
                "visual codes outside the vocabulary: the vision tokenizer does not match it",
                expected=f"codes in [0, {self.visual_size})",
                got=f"[{codes.min()}, {codes.max()}]",
                fix="set vocabulary.visual_size to the tokenizer's codebook size",
            )

    def describe(self) -> dict[str, Any]:
        """What a manifest records, so that files of another vocabulary are refused."""
        return {
            "text_size": self.text_size,
            "structure": self.structure,
            "visual_start": self.visual_start,
            "visual_size": self.visual_size,
            "size": self.size,
            "padded_size": self.padded_size,
        }


# Parts of a description that say nothing about the ids of a file: of any file, and of one without pictures.
_LAYOUT_ONLY, _OF_PICTURES = ("padded_size",), ("visual_size", "size", "padded_size")


def description_of_ids(description: Mapping[str, Any], *, has_pictures: bool) -> dict[str, Any]:
    """Of a vocabulary's `describe()` what two files must share to lie in one row, or a model to read a file.

    Ids of pictures come last, so that texts alone are the same whatever number of them follows.
    """
    left_out = _LAYOUT_ONLY if has_pictures else _OF_PICTURES
    return {key: value for key, value in description.items() if key not in left_out}
