"""What the model alone says about a layout of ranks: which of its sizes are divided among them. Imports no torch.

What a stage and its engine add stands in `training/contracts/layout.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from model.config import ModelConfig
from model.errors import Problems
from model.vocabulary import Vocabulary

# Which ranks divide which size. The heads and query groups of a layer, the columns of its MLP and the rows of the
# vocabulary are cut among tensor ranks, whole layers among pipeline stages.
DIVIDED_BY = {
    "num_attention_heads": "tensor",
    "num_query_groups": "tensor",
    "ffn_hidden_size": "tensor",
    "padded_vocabulary": "tensor",
    "num_layers": "pipeline",
}


class LayoutProblem(NamedTuple):
    """One reason why a layout is impossible; `key` and `fix` name options of the command that is refused."""

    key: str
    message: str
    fix: str


def add_to(problems: Problems, found: list[LayoutProblem]) -> None:
    for one in found:
        problems.add(*one)


def divided_sizes(model: ModelConfig) -> dict[str, int]:
    """The sizes that `DIVIDED_BY` names. The vocabulary is left out where its own padding is no number to divide by."""
    sizes = {name: int(getattr(model, name)) for name in DIVIDED_BY if name != "padded_vocabulary"}
    if model.vocabulary.pad_multiple > 0:
        sizes["padded_vocabulary"] = Vocabulary.from_config(model.vocabulary).padded_size
    return sizes


def positive_problems(ranks: Mapping[str, int], section: str) -> list[LayoutProblem]:
    """`section` stands before the keys of the command's options: "parallel." or nothing."""
    return [
        LayoutProblem(f"{section}{name}", f"must be positive, got {value}", f"{section}{name}=1")
        for name, value in ranks.items()
        if value < 1
    ]


def division_problems(
    sizes: Mapping[str, int], ranks: Mapping[str, int], *, section: str, of: str = "model."
) -> list[LayoutProblem]:
    """The sizes that do not divide evenly among positive `ranks` (tensor, pipeline); `of` stands before their names."""
    found = []
    for name, size in sizes.items():
        kind = DIVIDED_BY[name]
        if size % ranks[kind]:
            title = "the padded vocabulary" if name == "padded_vocabulary" else f"{of}{name}"
            fix = f"{section}{kind}=1"
            if name == "padded_vocabulary" and of:
                fix += f" or {of}vocabulary.pad_multiple={128 * ranks[kind]}"
            found.append(LayoutProblem(f"{section}{kind}", f"{ranks[kind]} does not divide {title} ({size})", fix))
    return found


def split_problems(model: ModelConfig, ranks: Mapping[str, int], *, section: str, of: str) -> list[LayoutProblem]:
    """Why this model's tensors cannot be cut for such a layout; empty when they can."""
    return positive_problems(ranks, section) or division_problems(divided_sizes(model), ranks, section=section, of=of)
