"""Options of the objective `dida`: `stage.objective.*`. Importing this module is cheap: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import Problems
from model.parallel.layout_rules import add_to, divided_sizes
from training.config import TrainConfig, check_data
from training.contracts.layout import ParallelLayout, Rows
from training.objectives.token_options import NextTokenOptions

PATHS = ("metric", "uniform", "mask")


@dataclass
class DidaOptions(NextTokenOptions):
    """Parallel image decoding: images as noisy copies behind their documents, beside the next token of the documents.

    What Emu3.5 does not publish of DiDA, our choice: path, times, weights, and that headers and ends of rows stay clean.
    """

    path: str = "metric"  # metric | uniform | mask: how codes become noise
    c: float | None = None  # of the metric path; null: calibrated on the stage's data for `decoding_steps`
    alpha: float = 0.9  # of the metric path, when c is given
    decoding_steps: int = 8  # for which c is calibrated
    time_shift: float = 1.0  # above 1: more of the training near noise
    latest_time: float = 0.999  # of the uniform draw of each image's time
    copy_tokens: int = 0  # room for copies behind each row; 0: as many as the row has
    copies_an_image: int = 1  # each at a time of its own; more lessons for each reading of the document
    clean_weight: float = 1.0  # of the next-token loss, which keeps token-by-token decoding as it is
    clean_prefix_share: float = 0.0  # of the copies whose first codes stay clean, as `verified` decoding has them
    vision_tokenizer: str | None = None  # folder; null: the one that the data name

    def validate(self, problems: Problems, key: str) -> None:
        super().validate(problems, key)
        problems.check(
            self.document_attention == "document",
            f"{key}.document_attention",
            "copies stand behind their own documents",
            f"{key}.document_attention=document",
        )
        problems.check(
            self.path in PATHS, f"{key}.path", f"unknown value {self.path!r}", f"{key}.path={'|'.join(PATHS)}"
        )
        problems.check(self.c is None or self.c > 0, f"{key}.c", "must be positive", f"{key}.c=10")
        problems.check(self.alpha > 0, f"{key}.alpha", "must be positive", f"{key}.alpha=0.9")
        problems.check(self.time_shift > 0, f"{key}.time_shift", "must be positive", f"{key}.time_shift=1")
        problems.check(self.decoding_steps > 0, f"{key}.decoding_steps", "must be positive", f"{key}.decoding_steps=8")
        problems.check(0 < self.latest_time < 1, f"{key}.latest_time", "must be in (0, 1)", f"{key}.latest_time=0.999")
        problems.check(self.copy_tokens >= 0, f"{key}.copy_tokens", "must not be negative", f"{key}.copy_tokens=0")
        problems.check(
            self.copies_an_image > 0, f"{key}.copies_an_image", "must be positive", f"{key}.copies_an_image=1"
        )
        problems.check(self.clean_weight >= 0, f"{key}.clean_weight", "must not be negative", f"{key}.clean_weight=1")
        problems.check(
            0 <= self.clean_prefix_share <= 1,
            f"{key}.clean_prefix_share",
            "must be in [0, 1]",
            f"{key}.clean_prefix_share=0",
        )

    def validate_run(self, problems: Problems, config: TrainConfig) -> None:
        """As of next-token stages; the rows that the ranks share are those with copies."""
        config.model.validate(problems, "model")
        check_data(config, problems)
        stage = config.stage
        length = stage.sequence_length + self.room(stage.sequence_length)
        rows = Rows(length, stage.micro_batch_size, stage.global_batch_size)
        add_to(problems, ParallelLayout.of(config.parallel).problems(divided_sizes(config.model), rows))

    def room(self, sequence_length: int) -> int:
        """Tokens behind each row that copies may take."""
        return self.copy_tokens or sequence_length
