"""Options of reinforcement learning: `stage.objective.*` of `grpo`. Importing this module is cheap: no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from model.durable import absent
from model.errors import Problems
from model.generation.settings import SamplingConfig
from model.registry import absent_class
from training.config import TrainConfig, check_layout
from training.inference.prompts import InferenceOptions
from training.objectives.grpo.advantages import AdvantageOptions
from training.rewards.system import RewardsConfig

STAGE_KEYS = ("steps", "sequence_length", "global_batch_size", "micro_batch_size", "optimizer", "initialize_from")


@dataclass
class PromptsEntry:
    """The prompts of one task."""

    path: str = "file"  # file | package.module.Class of your own with `questions()`
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class; of `file`: path
    weight: float = 1.0  # share of this task's prompts in every batch; 0 leaves it out


@dataclass
class ModalityWeights:
    """What the mean over all tokens of a kind counts in the loss: images have 50 times the tokens of texts."""

    text: float = 1.0  # text and structure that was chosen, not forced
    image: float = 0.5  # visual codes (the weight that pretraining has; not published for RL)

    def validate(self, problems: Problems, key: str) -> None:
        for name, weight in asdict(self).items():
            problems.check(weight >= 0, f"{key}.{name}", f"must not be negative, got {weight}", f"{key}.{name}=1.0")
        problems.check(self.text + self.image > 0, key, "nothing would be learnt", f"{key}.image=0.5")


@dataclass
class GrpoOptions:
    """Group-relative policy optimization (arXiv 2402.03300) on text and image tokens alike.

    `stage.global_batch_size` counts answers: Emu3.5 has 640, 8 for each prompt (arXiv 2510.26583, section 4.2). A row
    is a prompt and its answer, at most `stage.sequence_length` tokens.
    """

    stage_keys: ClassVar[tuple[str, ...]] = STAGE_KEYS
    fixed: ClassVar[tuple[str, ...]] = ("group_size", "sampling", "answers", "updates")

    prompts: dict[str, PromptsEntry] = field(default_factory=dict)  # by task; all tasks stand in every batch
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    text_tokenizer: str | None = None  # folder; null: the one that the initial checkpoint names
    vision_tokenizer: str | None = None  # likewise

    group_size: int = 8  # answers to each prompt
    # Temperatures, length and guidance of the rollouts. Guidance 1: none, half the cost. Another scale is trained with
    # exactly the distribution that was sampled, over both contexts.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    answers: InferenceOptions = field(default_factory=InferenceOptions)
    offload: bool = False  # gradients are freed and the optimizer's state waits on the host until all answers are there
    max_refills: int = 1  # rounds of further prompts in place of groups that teach nothing
    updates: int = 1  # optimizer steps on the same answers; 1: the ratio is 1 and the clip without effect

    advantages: AdvantageOptions = field(default_factory=AdvantageOptions)
    ratio: str = "token"  # token | segment: one ratio for an image or a run of text (GSPO, arXiv 2507.18071)
    clip_low: float = 0.2  # the ratio is held above 1 - clip_low, and
    clip_high: float = 0.28  # below 1 + clip_high (DAPO, arXiv 2503.14476); for segments about 3e-4 and 4e-4
    importance_cap: float = 2.0  # of pi / mu, where the sampler's numbers are not the trainer's; 0: not corrected
    kl_weight: float = 0.0  # of the KL to the weights that the stage started from; 0: no reference is kept
    weights: ModalityWeights = field(default_factory=ModalityWeights)

    keep_every_steps: int = 50  # the best and the worst answers of every n-th step are kept as pictures; 0: none

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            bool(self.prompts), f"{key}.prompts", "no task has prompts", f"+{key}.prompts.t2i.options.path=FILE"
        )
        for task, entry in self.prompts.items():
            problems.check(
                bool(task), f"{key}.prompts", "prompts without a task: their name says which rewards judge them"
            )
            problems.check(entry.weight >= 0, f"{key}.prompts.{task}.weight", "must not be negative")
        problems.check(
            any(entry.weight > 0 for entry in self.prompts.values()), f"{key}.prompts", "no task has a weight"
        )
        self.rewards.validate(problems, f"{key}.rewards")
        problems.check(
            self.group_size >= 2, f"{key}.group_size", "one answer compares with none", f"{key}.group_size=8"
        )
        self._validate_sampling(problems, key)
        self.answers.validate(problems, f"{key}.answers")
        problems.check(self.max_refills >= 0, f"{key}.max_refills", "must not be negative", f"{key}.max_refills=1")
        problems.check(self.updates > 0, f"{key}.updates", "must be positive", f"{key}.updates=1")
        self.advantages.validate(problems, f"{key}.advantages")
        problems.check(
            self.ratio in ("token", "segment"), f"{key}.ratio", f"unknown value {self.ratio!r}", f"{key}.ratio=token"
        )
        problems.check(0 < self.clip_low < 1, f"{key}.clip_low", "must be in (0, 1)", f"{key}.clip_low=0.2")
        for name in ("clip_high", "importance_cap", "kl_weight", "keep_every_steps"):
            problems.check(getattr(self, name) >= 0, f"{key}.{name}", "must not be negative", f"{key}.{name}=0")
        self.weights.validate(problems, f"{key}.weights")

    def missing_inputs(self, key: str) -> list[str]:
        files = {
            f"{key}.prompts.{task}.options.path": entry.options.get("path")
            for task, entry in self.prompts.items()
            if entry.path == "file" and entry.weight > 0
        }
        named = {f"{key}.{name}": getattr(self, name) for name in ("text_tokenizer", "vision_tokenizer")}
        own = {f"{key}.prompts.{task}": ("source of prompts", entry.path) for task, entry in self.prompts.items()}
        own |= {f"{key}.rewards.signals.{name}": ("reward", one.path) for name, one in self.rewards.signals.items()}
        lines = [absent_class(kind, path, where) for where, (kind, path) in own.items() if "." in path]
        return absent(files | named | {f"{key}.rewards.scales": self.rewards.scales}) + [line for line in lines if line]

    def _validate_sampling(self, problems: Problems, key: str) -> None:
        """What is cut from the sampler's distribution, the trainer would have to cut too: 20 KB a token at top-k 5120."""
        self.sampling.validate(problems, f"{key}.sampling")
        for name in ("text", "image"):
            phase, where = getattr(self.sampling, name), f"{key}.sampling.{name}"
            problems.check(phase.temperature > 0, f"{where}.temperature", "greedy answers are all the same")
            problems.check(
                phase.top_k == 0, f"{where}.top_k", "rollouts draw from the whole distribution", f"{where}.top_k=0"
            )
            problems.check(
                phase.top_p == 1, f"{where}.top_p", "rollouts draw from the whole distribution", f"{where}.top_p=1"
            )

    def validate_run(self, problems: Problems, config: TrainConfig) -> None:
        stage, layout = config.stage, config.parallel
        config.model.validate(problems, "model")
        check_layout(config, problems)
        problems.check(
            layout.pipeline == 1,
            "parallel.pipeline",
            "answers are drawn from the training weights, which needs the whole depth of the model on each rank",
            "parallel.pipeline=1, with more of parallel.tensor",
        )
        problems.check(
            layout.context == 1, "parallel.context", "an answer is one row of one rank", "parallel.context=1"
        )
        problems.check(
            self.group_size < 1 or stage.global_batch_size % self.group_size == 0,
            "stage.global_batch_size",
            f"{stage.global_batch_size} answers are not a multiple of {self.group_size} for each prompt",
            f"stage.global_batch_size={max(1, stage.global_batch_size // max(1, self.group_size)) * self.group_size}",
        )
        problems.check(
            stage.sequence_length <= config.model.max_sequence_length,
            "stage.sequence_length",
            f"{stage.sequence_length} is above model.max_sequence_length ({config.model.max_sequence_length})",
            f"model.max_sequence_length={stage.sequence_length}",
        )
        problems.check(
            self.sampling.max_new_tokens < stage.sequence_length,
            "stage.objective.sampling.max_new_tokens",
            f"{self.sampling.max_new_tokens} leaves no room for a prompt in a row of {stage.sequence_length} tokens",
        )
        problems.check(
            stage.initialize_from is not None,
            "stage.initialize_from",
            "reinforcement learning starts from a model that answers",
            "stage.initialize_from=runs/demo/sft",
        )
        problems.check(
            config.model.dropout == 0,
            "model.dropout",
            "would make the trainer's distribution another one than the sampler's",
            "model.dropout=0",
        )
