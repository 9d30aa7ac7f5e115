"""`nextstate pack`: token files -> rows of fixed length."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from model.errors import UserError

HELP = "pack token files into rows of fixed length, mixing sources; continues where it was stopped"


@dataclass
class HeldOut:
    """Documents of a validation set: those listed, and a share of the others."""

    share: float = 0.0  # of the documents; chosen by their ids, so the same ones whatever else is packed
    documents: str | None = None  # a list of documents, in the form of `removed`


@dataclass
class Config:
    tokens: dict[str, str] = field(default_factory=dict)  # source name -> folder of token files
    target: str = ""  # folder of the packed files
    removed: str | None = None  # a list of documents to leave out, one JSON object a line: {"document": 123}
    # Of documents that are more alike all but the first are left out. null: the maximum of the filter near_duplicates.
    max_similarity: float | None = None  # of documents, by their signatures; null: as they were tokenized; 1: any
    held_out: dict[str, HeldOut] = field(
        default_factory=dict
    )  # validation sets, by any name: rows in target/held_out/NAME
    sequence_length: int = 32_768  # tokens of a row
    rows_per_shard: int = 8_192  # rows of one file
    window_rows: int = 256  # documents of so many rows wait to be chosen from
    minimum_piece_tokens: int = 8  # text is not cut into pieces shorter than this
    seed: int = 1234  # of the order of the documents
    json: bool = False  # print one JSON object on stdout at the end
    former_names: ClassVar[dict[str, str]] = {"open_bins": "window_rows"}


def run(config: Config) -> dict[str, Any]:
    """Pack; returns target, fill, num_rows, num_tokens, num_real_tokens, sources, counts_by_class, quarantined, held_out."""
    from data_pipeline.packing.held_out import HeldOutSet
    from data_pipeline.packing.pack import PackConfig, pack

    if not config.target:
        raise UserError("no target folder is given", fix="target=FOLDER")
    settings = PackConfig(
        sequence_length=config.sequence_length,
        rows_per_shard=config.rows_per_shard,
        window_rows=config.window_rows,
        minimum_piece_tokens=config.minimum_piece_tokens,
        seed=config.seed,
    )
    removed = _listed(config.removed)
    held_out = {name: HeldOutSet(one.share, _listed(one.documents)) for name, one in config.held_out.items()}
    return asdict(pack(dict(config.tokens), config.target, settings, removed, held_out, config.max_similarity))


def _listed(path: str | None) -> frozenset[int]:
    from data_pipeline.packing.removed import read_removed

    return read_removed(path) if path is not None else frozenset()
