"""`nextstate plan`: will it fit, how fast will it be, what will it cost, in which layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launch.cluster.profile import ClusterConfig
from model.errors import Problems
from training.config import TrainConfig
from training.contracts import zero
from training.contracts.layout import RECOMPUTE

HELP = """Know memory, step time and cost of a stage on a cluster before it is spent, and the best layouts for it.

Nothing is built and no accelerator is needed. parallel.* is the stage's own layout; the search looks at all others too.

examples:
  nextstate plan model=emu35_34b stage=pretrain_1 cluster=h100 cluster.num_accelerators=1024
  nextstate plan model=emu35_34b stage=sft_1 cluster=h200 cluster.num_accelerators=64 json=true
  nextstate plan stage=pretrain_1 parallel.tensor=4 parallel.pipeline=2 document_tokens=4000
  nextstate plan engine=deepspeed stage=sft_1 cluster.num_accelerators=8
  nextstate plan check=published
  nextstate plan simulate=true cluster.num_accelerators=7168"""


@dataclass
class Config(TrainConfig):
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    recompute: list[str] = field(default_factory=lambda: list(RECOMPUTE))  # choices that the search may take
    document_tokens: int | None = None  # mean length of a document; null: a row is one document
    attention_flops: str = "causal"  # causal | full: how attention counts in the MFU
    simulate: bool = False  # build every part of the stage's own layout on the meta device
    check: str = "layouts"  # layouts | published: compare the model with published runs

    def validate(self) -> None:
        problems = Problems()
        stage = self.stage
        problems.check(
            stage.objective_name == "next_token",
            "stage",
            f"{stage.objective_name} stages are not planned",
            "stage=pretrain_1",
        )
        for name in ("steps", "sequence_length", "global_batch_size"):
            value = getattr(stage, name)
            problems.check(0 < value < 2**40, f"stage.{name}", f"{value} is out of range", f"stage.{name}=1000")
        self.model.validate(problems)
        self.cluster.validate(problems)
        problems.check(
            bool(self.recompute) and set(self.recompute) <= set(RECOMPUTE),
            "recompute",
            f"choices are {', '.join(RECOMPUTE)}, got {list(self.recompute)}",
            "recompute=[none,full]",
        )
        problems.check(
            self.document_tokens is None or 0 < self.document_tokens <= stage.sequence_length,
            "document_tokens",
            f"must be in [1, {stage.sequence_length}], got {self.document_tokens}",
            "document_tokens=null",
        )
        problems.check(
            self.attention_flops in ("causal", "full"),
            "attention_flops",
            f"unknown value {self.attention_flops!r}",
            "attention_flops=causal",
        )
        problems.check(
            self.check in ("layouts", "published"), "check", f"unknown value {self.check!r}", "check=published"
        )
        if self.engine == "deepspeed":
            zero.check(self.deepspeed, problems)
        problems.raise_if_any()


def run(config: Config) -> dict[str, Any]:
    if config.check == "published":
        from launch.plan.accuracy import compare

        return compare()
    from launch.plan.answer import answer, dry_run

    if config.simulate:
        return dry_run(config, config.cluster, config.document_tokens)
    if config.engine == "deepspeed":
        from launch.plan import zero_answer

        return zero_answer.answer(
            config, config.cluster, recompute=list(config.recompute), document_tokens=config.document_tokens
        )
    return answer(
        config,
        config.cluster,
        recompute=list(config.recompute),
        document_tokens=config.document_tokens,
        attention_flops=config.attention_flops,
    )


def render(found: dict[str, Any]) -> str:
    from launch.plan import answer, zero_answer

    if found.get("engine") == "deepspeed":
        return zero_answer.render(found)
    if "runs" in found:
        return answer.render_published(found)
    return answer.render_dry_run(found) if "parts_built" in found else answer.render(found)
