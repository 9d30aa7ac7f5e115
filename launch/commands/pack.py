"""`nextstate pack`: token files -> rows of fixed length."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from model.errors import UserError

HELP = "pack token files into rows of fixed length, mixing sources; continues where it was stopped"


@dataclass
class Config:
    tokens: dict[str, str] = field(default_factory=dict)  # source name -> folder of token files
    target: str = ""  # folder of the packed files
    removed: str | None = None  # a list of documents to leave out, one JSON object a line: {"document": 123}
    sequence_length: int = 32_768  # tokens of a row
    rows_per_shard: int = 8_192  # rows of one file
    window_rows: int = 256  # documents of so many rows wait to be chosen from
    minimum_piece_tokens: int = 8  # text is not cut into pieces shorter than this
    seed: int = 1234  # of the order of the documents
    json: bool = False  # print one JSON object on stdout at the end
    former_names: ClassVar[dict[str, str]] = {"open_bins": "window_rows"}


def run(config: Config) -> dict[str, Any]:
    """Pack; returns target, fill, num_rows, num_tokens, num_real_tokens, sources, counts_by_class, quarantined."""
    from data_pipeline.packing.pack import PackConfig, pack
    from data_pipeline.packing.removed import read_removed

    if not config.target:
        raise UserError("no target folder is given", fix="target=FOLDER")
    settings = PackConfig(
        sequence_length=config.sequence_length,
        rows_per_shard=config.rows_per_shard,
        window_rows=config.window_rows,
        minimum_piece_tokens=config.minimum_piece_tokens,
        seed=config.seed,
    )
    removed = read_removed(config.removed) if config.removed is not None else frozenset()
    return asdict(pack(dict(config.tokens), config.target, settings, removed))
