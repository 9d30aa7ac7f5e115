"""`nextstate distill`: a model's own answers, judged, as token files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import check_writable, file_errors_are_user_errors
from data_pipeline.storage.folder_claim import claim_folder
from launch.generation.distill_options import DistillOptions
from model.errors import Problems
from training.inference.choice import check_choice
from training.inference.prompts import InferenceOptions
from training.objectives.grpo.grpo_options import PromptsEntry

HELP = """Write what a model answers to prompts as token files, the good answers only.

For the stage that makes a post-trained model decode images in parallel (stage=dida), and for any other that learns from
answers. Prompts and rewards are named as those of reinforcement learning. Of each prompt's answers the best ones with at
least smallest_reward are kept, token by token decoded; `pack` reads the files as those of tokenize. A file that is done
is not done again; parts of a large job run side by side.

examples:
  nextstate distill checkpoint=runs/mine/rl target=runs/mine/tokens/dida/distilled prompts.t2i.options.path=prompts.jsonl \\
      prompts.t2i.path=file rewards.signals.ocr.path=text_rendering rewards.signals.ocr.range=[0,1] smallest_reward=8
  nextstate distill checkpoint=runs/mine/rl target=T prompts.t2i.path=mine.Prompts num_parts=64 part=3
  nextstate pack target=runs/mine/packed/dida/distilled tokens.distilled=runs/mine/tokens/dida/distilled sequence_length=16384"""


@dataclass
class Config(DistillOptions):
    checkpoint: str = ""  # a stage folder (its newest checkpoint) or a checkpoint folder
    target: str = ""  # folder of token files
    prompts: dict[str, PromptsEntry] = field(default_factory=dict)  # by task: path, options; each is answered once
    answers: InferenceOptions = field(default_factory=InferenceOptions)
    text_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    vision_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    num_parts: int = 1  # of a job that runs in several processes
    part: int = 0  # which one this is: it writes every num_parts-th file
    json: bool = False  # answer with one JSON object

    def validate(self) -> None:
        problems = Problems()
        for name in ("checkpoint", "target"):
            problems.check(bool(getattr(self, name)), name, "is required", f"{name}=FOLDER")
        problems.check(bool(self.prompts), "prompts", "there is nothing to ask", "prompts.t2i.options.path=FILE")
        problems.check(self.num_parts > 0, "num_parts", "must be positive", "num_parts=1")
        problems.check(0 <= self.part < max(1, self.num_parts), "part", f"there is no part {self.part}", "part=0")
        self.answers.validate(problems, "answers")
        self.validate_distill(problems)
        problems.raise_if_any()


@file_errors_are_user_errors("the target")
def run(config: Config) -> dict[str, Any]:
    """Answers what is not answered yet; the answer counts this part's files."""
    config.validate()
    check_choice(config.checkpoint, text_tokenizer=config.text_tokenizer, vision_tokenizer=config.vision_tokenizer)
    from launch.generation.distill_inputs import load_judges, load_prompts

    own = {name: getattr(config, name) for name in DistillOptions.__dataclass_fields__}
    options, target = DistillOptions(**own), Path(config.target)
    prompts = load_prompts(config.prompts)
    judges = load_judges(options.rewards, prompts)
    check_writable(target)
    from launch.generation.distillation import Distiller
    from training.inference.model import InferenceModel

    model = InferenceModel.load(config.checkpoint, config.text_tokenizer, config.vision_tokenizer, config.answers)
    distiller = Distiller(options, model, prompts, judges, target)
    with claim_folder(target, "distill", distiller.fingerprint):
        distiller.check_target()
        numbers = range(config.part, distiller.num_files, config.num_parts)
        done = [distiller.is_done(number) for number in numbers]
        manifests = [distiller.manifest(number) for number in numbers]
    refused: Counter[str] = Counter()
    for manifest in manifests:
        refused.update(manifest["quarantined"])
    return {
        "num_documents": sum(manifest["num_documents"] for manifest in manifests),
        "num_tokens": sum(manifest["num_tokens"] for manifest in manifests),
        "refused": dict(refused),
        "num_files": len(manifests),
        "skipped_files": sum(done),
        "target": str(target),
    }
