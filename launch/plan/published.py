"""Step times that others have published, and what this model says of the same configurations.

What a publisher does not state is assumed by one rule for all of its rows, written beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Batch, Layout
from launch.plan.shape import ModelShape
from launch.plan.timing import Efficiencies, Implementation, Machine, StepModel
from model.parallel.devices import find_device

MEGATRON = "Megatron-LM README, images/model_table.png"
FOUNDRY = "llm-foundry scripts/train/benchmarking/README.md"
TITAN_2024 = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_2025 = "torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
BRIDGE = "Megatron-Bridge docs/performance-summary-archive.md, 25.11 and 26.02"


@dataclass(frozen=True)
class PublishedRun:
    """One configuration and its published throughput."""

    name: str
    source: str
    shape: ModelShape
    layout: Layout
    batch: Batch
    implementation: Implementation
    device: str
    tokens_per_second: float  # of one accelerator

    @property
    def publisher(self) -> str:
        return self.name.split()[0]

    def predicted(self, efficiencies: Efficiencies) -> float:
        """Tokens per second of one accelerator."""
        cluster = ClusterConfig(name=self.device, device=self.device)
        machine = Machine(find_device(self.device), cluster, efficiencies)
        step = StepModel(self.shape, self.layout, self.batch, machine, self.implementation).step()
        return self.batch.tokens / step.total / self.layout.world_size


@dataclass(frozen=True)
class HeldOutError:
    """Of one device: |predicted / published - 1| over rows whose publisher was left out of the fit."""

    num_rows: int
    mean: float
    worst: float

    def told(self) -> str:
        return f"{self.mean:.1%} on average, {self.worst:.1%} at worst, over {self.num_rows} rows"


# What `launch.plan.accuracy.held_out_errors` finds; a test computes it again.
HELD_OUT_ERRORS = {"h100": HeldOutError(26, 0.082, 0.352), "h100_500w": HeldOutError(11, 0.081, 0.245)}


def told_accuracy(device: str) -> str:
    """What is known of the step times' error on a device, for people."""
    known = HELD_OUT_ERRORS.get(device)
    if known is None:
        return f"no published run on {device} is known: the error of its step times is not known either"
    return f"step times of publishers left out of the fit were off by {known.told()} of this device"


def gpt(num_layers: int, hidden: int, heads: int, vocabulary_rows: int) -> ModelShape:
    """GPT-3's structure: as many key as query heads, an ungated MLP four times as wide."""
    return ModelShape(
        num_layers, hidden, 4 * hidden, heads, heads, hidden // heads, vocabulary_rows, gated=False, qk_norm=False
    )


def llama(num_layers: int, hidden: int, ffn: int, heads: int) -> ModelShape:
    """Llama 3.1 (arXiv 2407.21783, Table 3): 8 key heads of width 128, 128,256 ids."""
    return ModelShape(num_layers, hidden, ffn, heads, 8, 128, 128_256, qk_norm=False)


def causal(sequence_length: int, rows: int) -> Batch:
    return Batch(sequence_length, rows, sequence_length / 2)


def _megatron() -> list[PublishedRun]:
    """Model FLOPs are counted in Megatron's convention: attention in full, not halved by causality.

    Not stated: the micro-batch (one row; all four rows of a rank where there is no pipeline) and the chunks of a stage
    (two layers each where that divides, else one, as NVIDIA's published recipes have it)).
    Stated: gradients, weights and tensor-parallel communication overlap.
    """
    table = [
        ("1.7B", 16, 2048, 24, 1, 1, 192, 408.8),
        ("7.1B", 32, 4096, 30, 2, 1, 192, 465.9),
        ("16B", 48, 6144, 32, 4, 1, 192, 489.1),
        ("32B", 56, 7168, 48, 8, 1, 192, 459.6),
        ("70B", 64, 8192, 84, 8, 2, 384, 419.7),
        ("119B", 80, 10240, 92, 8, 4, 768, 420.5),
        ("177B", 96, 12288, 96, 8, 6, 1152, 432.8),
        ("314B", 128, 16384, 96, 8, 8, 1536, 474.4),
        ("462B", 144, 18432, 112, 8, 16, 3072, 459.9),
    ]
    runs = []
    for name, heads, hidden, layers, tensor, pipeline, rows, teraflops in table:
        shape, batch = gpt(layers, hidden, heads, 131_072), causal(4096, rows)
        per_stage = layers // pipeline
        chunks = 1 if pipeline == 1 else per_stage // (2 if per_stage % 2 == 0 else 1)
        micro_batch = 1 if pipeline > 1 else rows // 48
        layout = Layout(tensor, pipeline, 1, 48, micro_batch, virtual_pipeline=chunks)
        speed = teraflops * 1e12 / shape.flops_per_token(batch.sequence_length)
        implementation = Implementation(overlaps_tensor=True, overlaps_data=True)
        runs.append(PublishedRun(f"Megatron {name}", MEGATRON, shape, layout, batch, implementation, "h100", speed))
    return runs


def _foundry() -> list[PublishedRun]:
    """MPT: GPT-3's structure, 50,368 ids (its yamls). Fully sharded over all ranks, bf16.

    Not stated: the network, taken as 400 Gb/s an accelerator; the type in which gradients are reduced (bf16, PyTorch's
    default with its mixed precision setting).
    """
    sizes = {"70b": (80, 8192, 64), "30b": (48, 7168, 56), "13b": (40, 5120, 40), "7b": (32, 4096, 32)}
    table = [
        ("70b", 2048, 512, 8, 4096, "full", 1007),
        ("70b", 2048, 128, 8, 1024, "full", 1058),
        ("70b", 2048, 64, 8, 2048, "full", 1039),
        ("30b", 2048, 512, 8, 4096, "full", 2115),
        ("30b", 2048, 128, 8, 1024, "full", 2199),
        ("30b", 2048, 32, 14, 1344, "full", 2308),
        ("30b", 4096, 8, 1, 168, "full", 1802),
        ("30b", 8192, 8, 1, 168, "full", 1384),
        ("13b", 2048, 512, 16, 8192, "full", 4952),
        ("13b", 4096, 8, 10, 240, "full", 4717),
        ("13b", 16384, 8, 3, 72, "full", 2985),
        ("13b", 32768, 8, 1, 24, "full", 1976),
        ("7b", 2048, 128, 6, 768, "none", 10475),
        ("7b", 2048, 8, 6, 48, "none", 10643),
    ]
    runs = []
    for size, length, ranks, micro_batch, rows, recompute, speed in table:
        layout = Layout(1, 1, 1, ranks, micro_batch, recompute, fully_sharded=True)
        implementation = Implementation(overlaps_data=True, gradient_bytes=2)
        runs.append(
            PublishedRun(
                f"llm-foundry {size}, {length} x {ranks}",
                FOUNDRY,
                gpt(*sizes[size], 50_368),
                layout,
                causal(length, rows),
                implementation,
                "h100",
                speed,
            )
        )
    return runs


LLAMA = {"8B": llama(32, 4096, 14336, 32), "70B": llama(80, 8192, 28672, 64), "405B": llama(126, 16384, 53248, 128)}


def _titan() -> list[PublishedRun]:
    """Llama 3.1 with torch.compile at 8,192 tokens; fully sharded, tensor parallel where stated.

    Not stated: the chunks of the interleaved 405B run (two a stage).
    """
    table = [
        ("8B bf16 x 8", TITAN_2024, "8B", Layout(1, 1, 1, 8, 2, "selective"), 16, 8192, False, False, 6667),
        ("8B fp8 x 8", TITAN_2024, "8B", Layout(1, 1, 1, 8, 2, "selective"), 16, 8192, True, False, 8532),
        ("8B bf16 x 128", TITAN_2024, "8B", Layout(1, 1, 1, 128, 2, "selective"), 256, 8192, False, False, 6514),
        ("70B bf16, TP", TITAN_2025, "70B", Layout(8, 1, 1, 32, 16, "full"), 512, 8192, False, False, 597),
        ("70B bf16, async TP", TITAN_2025, "70B", Layout(8, 1, 1, 32, 16, "full"), 512, 8192, False, True, 652),
        ("70B fp8, TP", TITAN_2024, "70B", Layout(8, 1, 1, 32, 16, "full"), 512, 8192, True, False, 829),
        ("70B fp8, async TP", TITAN_2024, "70B", Layout(8, 1, 1, 32, 16, "full"), 512, 8192, True, True, 876),
        (
            "405B fp8, interleaved",
            TITAN_2024,
            "405B",
            Layout(8, 8, 1, 8, 1, "full", virtual_pipeline=2),
            256,
            8192,
            True,
            True,
            128,
        ),
        ("8B fp8 x 8, 32768", TITAN_2024, "8B", Layout(1, 1, 1, 8, 1, "full"), 8, 32768, True, False, 3890),
        ("8B fp8, CP 2, 65536", TITAN_2024, "8B", Layout(1, 1, 2, 4, 1, "full"), 4, 65536, True, False, 2540),
        ("405B fp8, 32768", TITAN_2024, "405B", Layout(8, 8, 1, 8, 1, "full"), 64, 32768, True, True, 76),
    ]
    runs = []
    for name, source, size, layout, rows, length, fp8, overlaps, speed in table:
        implementation = Implementation(overlaps_tensor=overlaps, overlaps_data=True, fp8=fp8)
        runs.append(
            PublishedRun(
                f"torchtitan {name}",
                source,
                LLAMA[size],
                replace(layout, fully_sharded=True),
                causal(length, rows),
                implementation,
                "h100_500w",
                speed,
            )
        )
    return runs


def _bridge() -> list[PublishedRun]:
    """Llama 3 in fp8 with current scaling at 8,192 tokens; tensor-parallel communication overlaps, as its recipes say."""
    overlapping = Implementation(overlaps_tensor=True, overlaps_data=True, fp8=True)
    table = [
        ("8B fp8 x 8", "8B", Layout(1, 1, 1, 8, fully_sharded=True), 128, 14451),
        ("70B fp8 x 64", "70B", Layout(4, 8, 1, 2, virtual_pipeline=5), 256, 1621),
        ("405B fp8 x 1024", "405B", Layout(8, 8, 2, 8, virtual_pipeline=8), 1536, 311),
    ]
    return [
        PublishedRun(
            f"Megatron-Bridge {name}", BRIDGE, LLAMA[size], layout, causal(8192, rows), overlapping, "h100", speed
        )
        for name, size, layout, rows, speed in table
    ]


def published_runs() -> list[PublishedRun]:
    return [*_megatron(), *_foundry(), *_titan(), *_bridge()]


def compare(efficiencies: Efficiencies | None = None) -> dict[str, Any]:
    """Predicted against published throughput of every configuration; errors are signed shares of the published."""
    rates = efficiencies or Efficiencies()
    rows: list[dict[str, Any]] = []
    for run in published_runs():
        predicted = run.predicted(rates)
        rows.append(
            {
                "name": run.name,
                "source": run.source,
                "accelerators": run.layout.world_size,
                "device": run.device,
                "published": round(run.tokens_per_second, 1),
                "predicted": round(predicted, 1),
                "error": round(predicted / run.tokens_per_second - 1, 4),
            }
        )
    errors = [abs(row["error"]) for row in rows]
    return {
        "runs": rows,
        "mean_absolute_error": round(sum(errors) / len(errors), 4),
        "worst_error": max(errors),
        "held_out": {device: asdict(error) for device, error in HELD_OUT_ERRORS.items()},
    }
