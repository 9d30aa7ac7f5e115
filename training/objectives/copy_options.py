"""Options of the objectives that learn from copies of images. Importing this module is cheap: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import Problems
from model.parallel.layout_rules import add_to, divided_sizes
from training.config import TrainConfig, check_data
from training.contracts.layout import ParallelLayout, Rows
from training.objectives.token_options import NextTokenOptions


@dataclass
class CopyOptions(NextTokenOptions):
    """The next token of packed rows, and copies of their images."""

    copy_tokens: int = 0  # room for copies behind each row; 0: as many as the row has
    clean_weight: float = 1.0  # of the next-token loss, which keeps token-by-token decoding as it is
    clean_tokens: int = 0  # with clean_weight 0: room for what copies see, other tokens are left out; 0: rows whole

    def validate(self, problems: Problems, key: str) -> None:
        super().validate(problems, key)
        problems.check(
            self.document_attention == "document",
            f"{key}.document_attention",
            "copies stand behind their own documents",
            f"{key}.document_attention=document",
        )
        problems.check(self.copy_tokens >= 0, f"{key}.copy_tokens", "must not be negative", f"{key}.copy_tokens=0")
        problems.check(self.clean_weight >= 0, f"{key}.clean_weight", "must not be negative", f"{key}.clean_weight=1")
        problems.check(self.clean_tokens >= 0, f"{key}.clean_tokens", "must not be negative", f"{key}.clean_tokens=0")
        problems.check(
            not self.clean_tokens or self.clean_weight == 0,
            f"{key}.clean_tokens",
            "leaves out tokens that clean_weight asks to learn",
            f"{key}.clean_weight=0, or {key}.clean_tokens=0",
        )

    def validate_run(self, problems: Problems, config: TrainConfig) -> None:
        """As of next-token stages; the rows that the ranks share are those with copies."""
        config.model.validate(problems, "model")
        check_data(config, problems)
        stage = config.stage
        rows = Rows(self.row_length(stage.sequence_length), stage.micro_batch_size, stage.global_batch_size)
        add_to(problems, ParallelLayout.of(config.parallel).problems(divided_sizes(config.model), rows))

    def row_length(self, sequence_length: int) -> int:
        """Tokens of a row with its copies: the same for all."""
        return (self.clean_tokens or sequence_length) + self.room(sequence_length)

    def room(self, sequence_length: int) -> int:
        """Tokens behind each row that copies may take."""
        return self.copy_tokens or sequence_length


@dataclass
class DiagonalOptions(CopyOptions):
    """Images decoded by anti-diagonals: copies that are read so, behind their documents, beside the next token."""
