"""The options of `nextstate convert` and what they must be."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.config import ModelConfig
from model.errors import Problems
from model.vision_tokenizer.config import VisionTokenizerConfig

ACTIONS = ("init", "from_hf", "to_hf", "reshard", "verify", "surgery", "merge", "to_peft")
LAYOUT_NAMES = ("emu35", "qwen3", "emu3", "ibq")
# Keys that some actions alone read; set for another one they would change nothing.
_RANKS = ("init", "from_hf", "reshard", "surgery", "merge")
READ_BY = {
    "model": ("init", "from_hf", "surgery"),
    "vision_tokenizer": ("from_hf",),
    "tensor": _RANKS,
    "pipeline": _RANKS,
    "shard_gigabytes": ("to_hf",),
    "untie": ("from_hf", "surgery"),
    "ignore": ("from_hf", "surgery"),
    "surgery": ("surgery",),
}
VERIFY = ("auto", "logits", "keys", "none")


@dataclass
class SurgeryOptions:
    """How the new vocabulary rows of `convert surgery` start."""

    rows: str = "mean"  # normal | mean (of the text rows, with noise of their covariance) | codebook
    std: float | None = None  # of rows=normal; null: the model's init_std
    noise: float = 1.0  # of rows=mean: covariance of the noise in units of the text rows' own
    codebook: str | None = None  # of rows=codebook: a vision tokenizer, ours or a published one
    copied_rows: int | None = None  # null: 151,646 for the emu35 vocabulary, otherwise the text ids


@dataclass
class ConvertConfig:
    action: str = ""  # init | from_hf | to_hf | reshard | verify | surgery | merge | to_peft
    source: str | None = None  # a stage or checkpoint folder, or a published one (for from_hf also a file)
    target: str | None = None  # the folder that is made; of verify: the export that is compared
    layout: str | None = None  # emu35 | qwen3 | emu3 | ibq; null: as config.json of the source says
    model: ModelConfig | None = None  # chosen as model=NAME; null: as the source says
    vision_tokenizer: VisionTokenizerConfig | None = None  # sizes for layout=ibq; null: config.yaml
    seed: int = 0  # of fresh weights and of new rows
    dtype: str | None = None  # float32 | bfloat16; null: as stored
    tensor: int = 1  # tensor-parallel layout of the written checkpoint
    pipeline: int = 1  # pipeline-parallel layout of the written checkpoint
    shard_gigabytes: float = 5.0  # largest file of an export
    threads: int = 4  # reading and writing at a time
    untie: bool = False  # copy a tied embedding into an output head of its own
    ignore: list[str] = field(default_factory=list)  # patterns of source tensors to leave out
    verify: str = "auto"  # auto (logits up to 300 million parameters, else keys) | logits | keys | none
    num_tokens: int = 256  # that verify runs through both sides
    text_tokenizer: str | None = None  # folder or file that goes along; null: that of the run or the export, if found
    surgery: SurgeryOptions = field(default_factory=SurgeryOptions)
    json: bool = False  # print one JSON object on stdout

    def validate(self) -> None:
        problems = Problems()
        problems.check(
            self.action in ACTIONS,
            "action",
            f"unknown action {self.action!r}" if self.action else "is required",
            "nextstate convert " + " | ".join(ACTIONS),
        )
        if self.action in ACTIONS:
            self._validate_places(problems)
            self._validate_read(problems)
        problems.check(
            self.layout in (None, *LAYOUT_NAMES),
            "layout",
            f"unknown layout {self.layout!r}",
            f"layout={LAYOUT_NAMES[0]}",
        )
        problems.check(
            self.dtype in (None, "float32", "bfloat16"), "dtype", f"unknown dtype {self.dtype!r}", "dtype=bfloat16"
        )
        problems.check(self.verify in VERIFY, "verify", f"unknown value {self.verify!r}", "verify=keys")
        for name in ("tensor", "pipeline", "threads", "shard_gigabytes", "num_tokens"):
            value = getattr(self, name)
            problems.check(value > 0, name, f"must be positive, got {value}", f"{name}=1")
        problems.check(
            self.surgery.rows in ("normal", "mean", "codebook"),
            "surgery.rows",
            f"unknown value {self.surgery.rows!r}",
            "surgery.rows=mean",
        )
        if self.model is not None:
            self.model.validate(problems)
        problems.raise_if_any()

    def _validate_places(self, problems: Problems) -> None:
        needed = {"target": True, "source": self.action != "init"}
        for name, is_needed in needed.items():
            problems.check(not is_needed or bool(getattr(self, name)), name, "is required", f"{name}=FOLDER")
        if self.action in ("init", "surgery"):
            problems.check(self.model is not None, "model", "is required", "model=toy")
        if self.action in ("to_hf", "verify"):
            problems.check(self.layout is not None, "layout", "is required", f"layout={' | '.join(LAYOUT_NAMES)}")
        if self.action == "init":
            problems.check(self.source is None, "source", "fresh weights have no source", "leave source out")

    def _validate_read(self, problems: Problems) -> None:
        for name, actions in READ_BY.items():
            is_set = getattr(self, name) != getattr(PLAIN, name)
            problems.check(
                self.action in actions or not is_set,
                name,
                f"has no effect with {self.action}; {', '.join(actions)} read it",
                f"leave {name} out",
            )


PLAIN = ConvertConfig()
