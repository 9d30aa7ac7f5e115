"""Options of the objective `dida`: `stage.objective.*`. Importing this module is cheap: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.durable import absent
from model.errors import Problems
from training.objectives.copy_options import CopyOptions

PATHS = ("metric", "uniform", "mask")
STARTS = ("noise", "reference")


@dataclass
class DidaOptions(CopyOptions):
    """Parallel image decoding: images as noisy copies behind their documents, beside the next token of the documents.

    What Emu3.5 does not publish of DiDA, our choice: path, times, weights, and that headers and ends of rows stay clean.
    """

    path: str = "metric"  # metric | uniform | mask: how codes become noise
    start: str = "noise"  # noise | reference: images behind another one of their grid begin as that one
    c: float | None = None  # of the metric path; null: calibrated on the stage's data for `decoding_steps`
    alpha: float = 0.9  # of the metric path, when c is given
    decoding_steps: int = 8  # for which c is calibrated
    time_shift: float = 1.0  # above 1: more of the training near noise
    latest_time: float = 0.999  # of the uniform draw of each image's time
    copies_an_image: int = 1  # each at a time of its own; more lessons for each reading of the document
    clean_prefix_share: float = 0.0  # of the copies whose first codes stay clean, as `verified` decoding has them
    vision_tokenizer: str | None = None  # folder; null: the one that the data name

    def validate(self, problems: Problems, key: str) -> None:
        super().validate(problems, key)
        problems.check(
            self.path in PATHS, f"{key}.path", f"unknown value {self.path!r}", f"{key}.path={'|'.join(PATHS)}"
        )
        problems.check(
            self.start in STARTS, f"{key}.start", f"unknown value {self.start!r}", f"{key}.start={'|'.join(STARTS)}"
        )
        problems.check(self.c is None or self.c > 0, f"{key}.c", "must be positive", f"{key}.c=10")
        problems.check(self.alpha > 0, f"{key}.alpha", "must be positive", f"{key}.alpha=0.9")
        problems.check(self.time_shift > 0, f"{key}.time_shift", "must be positive", f"{key}.time_shift=1")
        problems.check(self.decoding_steps > 0, f"{key}.decoding_steps", "must be positive", f"{key}.decoding_steps=8")
        problems.check(0 < self.latest_time < 1, f"{key}.latest_time", "must be in (0, 1)", f"{key}.latest_time=0.999")
        problems.check(
            self.copies_an_image > 0, f"{key}.copies_an_image", "must be positive", f"{key}.copies_an_image=1"
        )
        problems.check(
            0 <= self.clean_prefix_share <= 1,
            f"{key}.clean_prefix_share",
            "must be in [0, 1]",
            f"{key}.clean_prefix_share=0",
        )

    def missing_inputs(self, key: str) -> list[str]:
        return absent({f"{key}.vision_tokenizer": self.vision_tokenizer})
