"""Runs of others with their published throughput, as far as their pages say how they were run.

Taken are the rows for dense decoders on a device of `model.parallel.devices`, of 7e9 parameters and more (all of a table that has one row a
size) and 2,048 tokens and more, in bf16 or in fp8 with one scale a tensor. Left out are MXFP8, NVFP4 and fp8 by rows (the plan has
no such formats), what the page itself calls a flaw, runs without a compiler where the page has the same run with one, older releases of the same
configuration, fine-tuning (the lengths of documents are not told) and tables that do not tell micro-batch or batch. What a publisher
does not state is assumed by one rule for all of its rows, written beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Batch, Layout
from launch.plan.shape import ModelShape
from launch.plan.timing import Efficiencies, Implementation, Machine, StepModel
from model.parallel.devices import find_device


@dataclass(frozen=True)
class PublishedRun:
    """One configuration and its published throughput."""

    publisher: str
    name: str
    source: str
    shape: ModelShape
    layout: Layout
    batch: Batch
    implementation: Implementation
    device: str
    tokens_per_second: float  # of one accelerator
    network_gigabits_per_second: float = 400.0  # of one accelerator

    def predicted(self, efficiencies: Efficiencies) -> float:
        """Tokens per second of one accelerator."""
        cluster = ClusterConfig(
            name=self.device,
            device=self.device,
            accelerators_per_fast_domain=72 if self.device == "gb200" else 8,
            network_gigabits_per_second=self.network_gigabits_per_second,
        )
        machine = Machine(find_device(self.device), cluster, efficiencies)
        step = StepModel(self.shape, self.layout, self.batch, machine, self.implementation).step()
        return self.batch.tokens / step.total / self.layout.world_size


def gpt(num_layers: int, hidden: int, heads: int, vocabulary_rows: int) -> ModelShape:
    """GPT-3's structure: as many key as query heads, an ungated MLP four times as wide."""
    return ModelShape(
        num_layers, hidden, 4 * hidden, heads, heads, hidden // heads, vocabulary_rows, gated=False, qk_norm=False
    )


def llama(
    num_layers: int, hidden: int, ffn: int, heads: int, groups: int = 8, vocabulary_rows: int = 128_256
) -> ModelShape:
    """Llama's structure with heads of width 128; the defaults are those of Llama 3.1 (arXiv 2407.21783, Table 3)."""
    return ModelShape(num_layers, hidden, ffn, heads, groups, 128, vocabulary_rows, qk_norm=False)


LLAMA_3 = {"8B": llama(32, 4096, 14336, 32), "70B": llama(80, 8192, 28672, 64), "405B": llama(126, 16384, 53248, 128)}
# arXiv 2307.09288; 34b as the released Code Llama.
LLAMA_2 = {
    "7B": llama(32, 4096, 11008, 32, 32, 32_000),
    "13B": llama(40, 5120, 13824, 40, 40, 32_000),
    "34B": llama(48, 8192, 22016, 64, 8, 32_000),
    "70B": llama(80, 8192, 28672, 64, 8, 32_000),
}


def causal(sequence_length: int, rows: int) -> Batch:
    return Batch(sequence_length, rows, sequence_length / 2)


def fields_of(table: str) -> Iterator[list[str]]:
    """The rows of a table of words."""
    return (line.split() for line in table.strip().splitlines())


# name, heads, hidden, layers, tensor, pipeline, rows of a step, model TFLOP/s of an accelerator
MEGATRON = """
1.7B   16  2048  24 1  1  192 408.8
7.1B   32  4096  30 2  1  192 465.9
16B    48  6144  32 4  1  192 489.1
32B    56  7168  48 8  1  192 459.6
70B    64  8192  84 8  2  384 419.7
119B   80 10240  92 8  4  768 420.5
177B   96 12288  96 8  6 1152 432.8
314B  128 16384  96 8  8 1536 474.4
462B  144 18432 112 8 16 3072 459.9
"""


def _megatron() -> Iterator[PublishedRun]:
    """4,096 tokens, 131,072 ids, 48 data-parallel ranks. Model FLOPs count attention in full, not halved by causality.

    Not stated: the micro-batch (one row; all four rows of a rank where there is no pipeline) and the chunks of a stage
    (two layers each where that divides, else one, as NVIDIA's published recipes have it).
    Stated: gradients, weights and tensor-parallel communication overlap.
    """
    program = Implementation(overlaps_tensor=True, overlaps_data=True, own_attention=True)
    for name, *words, teraflops in fields_of(MEGATRON):
        heads, hidden, layers, tensor, pipeline, rows = map(int, words)
        shape, batch = gpt(layers, hidden, heads, 131_072), causal(4096, rows)
        per_stage = layers // pipeline
        chunks = 1 if pipeline == 1 else per_stage // (2 if per_stage % 2 == 0 else 1)
        layout = Layout(tensor, pipeline, 1, 48, 1 if pipeline > 1 else rows // 48, virtual_pipeline=chunks)
        speed = float(teraflops) * 1e12 / shape.flops_per_token(batch.sequence_length)
        source = "Megatron-LM README, images/model_table.png"
        yield PublishedRun("Megatron", name, source, shape, layout, batch, program, "h100", speed)


# device, model, tokens of a row, accelerators, micro-batch, rows of a step, recompute, bytes in which weights are gathered, speed
FOUNDRY = """
h100      70b  2048 512  8 4096 full 4  1007
h100      70b  2048 256  8 2048 full 4  1035
h100      70b  2048 128  8 1024 full 4  1058
h100      30b  2048 512  8 4096 full 4  2115
h100      30b  2048 256  8 2048 full 4  2148
h100      30b  2048 128  8 1024 full 4  2199
h100      13b  2048 512 16 8192 full 4  4952
h100      13b  2048 256 16 4096 full 4  4989
h100      13b  2048 128 16 2048 full 4  5080
h100      7b   2048 512  6 3072 none 4  9670
h100      7b   2048 256  6 1536 none 4 10119
h100      7b   2048 128  6  768 none 4 10475
h100      70b  2048  64  8 2048 full 4  1039
h100      70b  2048  32  2 1024 full 4   882
h100      30b  8192   8  1  168 full 4  1384
h100      30b  4096   8  1  168 full 4  1802
h100      30b  2048  32 14 1344 full 4  2308
h100      30b  2048  16 10  480 full 4  2263
h100      30b  2048   8  3  504 full 4  2002
h100      13b 32768   8  1   24 full 4  1976
h100      13b 16384   8  3   72 full 4  2985
h100      13b  4096   8 10  240 full 4  4717
h100      13b  2048  64  2  128 none 4  4800
h100      13b  2048  32  2   64 none 4  4811
h100      13b  2048  16  2   32 none 4  4767
h100      13b  2048   8  2   16 none 4  4792
h100      7b  65536   8  1   16 full 4  1956
h100      7b  32768   8  2   32 full 4  3318
h100      7b   8192   8  8  128 full 4  6935
h100      7b   4096   8 16  256 full 4  8611
h100      7b   2048   8  6   48 none 4 10643
a100_80gb 70b  2048  64  8 2048 full 2   410
a100_80gb 70b  2048  32  2 1024 full 2   373
a100_80gb 30b  8192   8  1  168 full 4   574
a100_80gb 30b  4096   8  1  168 full 4   814
a100_80gb 30b  2048   8  3  504 full 4   916
a100_80gb 13b 32768   8  1   24 full 4  1016
a100_80gb 13b 16384   8  3   72 full 4  1431
a100_80gb 13b  8192   8  5  120 full 4  1795
a100_80gb 13b  4096   8 10  240 full 4  2060
a100_80gb 13b  2048   8  2   48 none 4  2262
a100_80gb 7b  65536   8  1   16 full 4  1013
a100_80gb 7b  32768   8  2   32 full 4  1672
a100_80gb 7b  16384   8  4   64 full 4  2453
a100_80gb 7b   8192   8  8  128 full 4  3206
a100_80gb 7b   4096   8 16  256 full 4  3684
a100_80gb 7b   2048   8  6   96 none 4  4641
a100_40gb 70b  2048 128  4  512 full 2   376
a100_40gb 70b  2048  64  2  128 full 2   276
a100_40gb 30b  2048 128  6  768 full 2   865
a100_40gb 30b  2048  32  4  128 full 2   857
a100_40gb 13b  8192   8  1  128 full 2  1407
a100_40gb 13b  4096   8  2  256 full 2  1603
a100_40gb 13b  2048 128 16 2048 full 2  1972
a100_40gb 13b  2048  64 16 1024 full 2  1976
a100_40gb 13b  2048  32 14  448 full 2  1998
a100_40gb 13b  2048  16 10  160 full 2  1993
a100_40gb 13b  2048   8  4  512 full 2  1668
a100_40gb 7b  16384   8  1   32 full 2  2249
a100_40gb 7b   8192   8  3   96 full 2  2887
a100_40gb 7b   4096   8  6  192 full 2  3366
a100_40gb 7b   2048 128 18 2304 full 2  3623
a100_40gb 7b   2048  64 18 1152 full 2  3665
a100_40gb 7b   2048  32 18  576 full 2  3725
a100_40gb 7b   2048  16 16  256 full 2  3645
a100_40gb 7b   2048   8 12  384 full 2  3679
"""


def _foundry() -> Iterator[PublishedRun]:
    """MPT: GPT-3's structure, 50,368 ids (its yamls). Fully sharded over all ranks, bf16, FlashAttention.

    The bytes are those of the column MP Mode in Composer, which these runs used: PURE gathers in bf16, DEFAULT gathered in float32 when
    the tables were made; both reduce gradients in bf16. Not stated: the H100s' network, taken as 400 Gb/s an accelerator; that of
    the A100s is stated as 1,600 Gb/s a node.
    """
    sizes = {"70b": (80, 8192, 64), "30b": (48, 7168, 56), "13b": (40, 5120, 40), "7b": (32, 4096, 32)}
    for device, size, *words, recompute, gathered, speed in fields_of(FOUNDRY):
        length, ranks, micro_batch, rows = map(int, words)
        program = Implementation(overlaps_data=True, gradient_bytes=2, gathered_bytes=int(gathered))
        yield PublishedRun(
            "llm-foundry",
            f"{size}, {length} x {ranks}",
            "llm-foundry scripts/train/benchmarking/README.md",
            gpt(*sizes[size], 50_368),
            Layout(1, 1, 1, ranks, micro_batch, recompute, fully_sharded=True),
            causal(length, rows),
            program,
            device,
            float(speed),
            network_gigabits_per_second=400 if device == "h100" else 200,
        )


TITAN_2024 = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_2025 = "torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
TRAINY = "torchtitan benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md"
# page, name, model, tensor, pipeline, chunks, context, data, micro-batch, rows of a step, tokens of a row, format, recompute, speed
TITAN = """
2024 bf16                 8B 1 1 1 1   8  2  16   8192 bf16      half  6667
2024 fp8                  8B 1 1 1 1   8  2  16   8192 fp8       half  8532
2024 bf16                 8B 1 1 1 1 128  2 256   8192 bf16      half  6514
2024 fp8                  8B 1 1 1 1 128  2 256   8192 fp8       half  8380
2025 TP                  70B 8 1 1 1  32 16 512   8192 bf16      full  597.3
2025 async_TP            70B 8 1 1 1  32 16 512   8192 bf16async full  652.4
2025 fp8_TP              70B 8 1 1 1  32 16 512   8192 fp8       full  809.8
2025 fp8_async_TP        70B 8 1 1 1  32 16 512   8192 fp8async  full  942.4
2024 fp8_TP              70B 8 1 1 1  32 16 512   8192 fp8       full  829
2024 fp8_async_TP        70B 8 1 1 1  32 16 512   8192 fp8async  full  876
2025 TP                   8B 8 1 1 1   8 12  96   8192 bf16      half 4378
2025 async_TP             8B 8 1 1 1   8 12  96   8192 bf16async half 4809.4
2025 fp8_TP               8B 8 1 1 1   8 12  96   8192 fp8       half 5078.1
2025 fp8_async_TP         8B 8 1 1 1   8 12  96   8192 fp8async  half 5570.1
2024 fp8_1F1B           405B 8 8 1 1   8  4 256   8192 fp8async  full  100
2024 fp8_interleaved    405B 8 8 2 1   8  4 256   8192 fp8async  full  128
2024 fp8                  8B 1 1 1 1   8  1   8  32768 fp8       full 3890
2024 fp8_CP               8B 1 1 1 2   4  1   4  65536 fp8       full 2540
2024 fp8_CP               8B 1 1 1 4   2  1   2 131072 fp8       full 1071
2024 fp8_CP               8B 1 1 1 8   1  1   1 262144 fp8       full  548
2024 fp8                405B 8 8 1 1   8  1  64  32768 fp8async  full   76
2024 fp8_CP             405B 8 8 1 2   4  1  32  65536 fp8async  full   47
2024 fp8_CP             405B 8 8 1 4   2  1  16 131072 fp8async  full   31
2024 fp8_CP             405B 8 8 1 8   1  1   8 262144 fp8async  full   16
"""


def _titan() -> Iterator[PublishedRun]:
    """Llama 3.1 with torch.compile; fully sharded; tensor parallel, pipelined where stated. FlashAttention 2.

    By its code of those days: selective recomputation computes every second matrix product again and no attention (`half`); a pipeline
    has as many micro-batches as stages, two chunks a stage where interleaved, and gathers weights once a step; gradients are reduced in float32.
    """
    for page, name, size, *words, number_format, recompute, speed in fields_of(TITAN):
        tensor, pipeline, chunks, context, data, micro_batch, rows, length = map(int, words)
        layout = Layout(tensor, pipeline, context, data, micro_batch, virtual_pipeline=chunks, fully_sharded=True)
        program = Implementation(
            overlaps_tensor=number_format.endswith("async"),
            overlaps_data=True,
            fp8=number_format.startswith("fp8"),
            recomputed_products=0.5 if recompute == "half" else 0.0,
            gathers_once=pipeline > 1,
        )
        yield PublishedRun(
            "torchtitan",
            f"{size} {name.replace('_', ' ')}, {length} x {layout.world_size}, {page}",
            TITAN_2024 if page == "2024" else TITAN_2025,
            LLAMA_3[size],
            replace(layout, recompute="full") if recompute == "full" else layout,
            causal(length, rows),
            program,
            "h100_500w",
            float(speed),
        )


def _trainy() -> Iterator[PublishedRun]:
    """Llama 3.1 8B with torchtitan (its rules hold) in fp8 on H200, which gathers weights in fp8 too, as its command says."""
    program = Implementation(overlaps_data=True, fp8=True, recomputed_products=0.5, gathered_bytes=1)
    for ranks, speed in ((32, 10_938), (64, 10_753)):
        layout = Layout(1, 1, 1, ranks, 2, fully_sharded=True)
        batch = causal(8192, 2 * ranks)
        yield PublishedRun("Trainy", f"8B fp8 x {ranks}", TRAINY, LLAMA_3["8B"], layout, batch, program, "h200", speed)


NEMO_PAGE = "NeMo user guide 24.12, performance_summary"
BRIDGE_PAGE = "Megatron-Bridge docs/performance-summary-archive.md, 25.11 and 26.02"
# page, model, device, tensor, pipeline, chunks, context, data, micro-batch, rows of a step, tokens of a row, sharded, speed
NEMO = """
nemo   GPT-5B     h100   1  1  1 1  64 4 2048 2048 no  23406
nemo   GPT-20B    h100   2  1  1 1  32 2  256 2048 no   5851
nemo   GPT-175B   h100   4  8  6 1   4 1  256 2048 no    716
nemo   GPT-175B   h100   4  8  6 1  16 2 2048 2048 no    825
nemo   Llama2-7B  h100   1  1  1 1   8 1  128 4096 no  16934
nemo   Llama2-13B h100   1  4 10 1   4 1  128 4096 no   8715
nemo   Llama2-70B h100   4  4 20 1   4 1  128 4096 no   1728
nemo   Nemotron-340B h100 8 8 12 1   2 1   32 4096 no    326
nemo   Llama3-8B  h100   1  1  1 2   4 1  128 8192 no  12273
nemo   Llama3-70B h100   4  4  5 2   2 1  128 8192 no   1524
bridge Llama3-8B  h100   1  1  1 1   8 1  128 8192 yes 14451
bridge Llama3-8B  b200   1  1  1 1   8 2  128 8192 no  30624
bridge Llama3-8B  gb200  1  1  1 1   8 2  128 8192 no  31508
bridge Llama3-70B h100   4  8  5 1   2 1  128 8192 no   1602
bridge Llama3-70B h100   4  8  5 1   2 1  256 8192 no   1621
bridge Llama3-70B gb200  1  1  1 1  64 2  256 8192 yes  4040
bridge Llama3-405B h100  8  8  8 2   8 1  512 8192 no    292
bridge Llama3-405B h100  8  8  8 2   8 1 1536 8192 no    311
bridge Llama3-405B gb200 4 16  4 1   4 1 1536 8192 no    793
bridge Llama3-405B b200  4  8  8 2   2 1   64 8192 no    661
"""
NEMO_SHAPES = {
    **{f"Llama2-{size}": shape for size, shape in LLAMA_2.items()},
    **{f"Llama3-{size}": shape for size, shape in LLAMA_3.items()},
    "GPT-5B": gpt(24, 4096, 32, 51_200),
    "GPT-20B": gpt(44, 6144, 48, 51_200),
    "GPT-175B": gpt(96, 12288, 96, 51_200),
    # arXiv 2406.11704: an ungated MLP, 8 key heads, 256,000 ids. The two smaller Nemotrons' shapes are not published with it.
    "Nemotron-340B": ModelShape(96, 18432, 73728, 96, 8, 192, 256_000, gated=False, qk_norm=False),
}


def _nemo() -> Iterator[PublishedRun]:
    """fp8 with one scale a tensor, attention by cuDNN.

    By the recipes in the repository: all communication overlaps, weights are gathered in fp8 and gradients reduced in bf16.
    """
    program = Implementation(
        overlaps_tensor=True, overlaps_data=True, fp8=True, gradient_bytes=2, gathered_bytes=1, own_attention=True
    )
    for page, name, device, *words, sharded, speed in fields_of(NEMO):
        tensor, pipeline, chunks, context, data, micro_batch, rows, length = map(int, words)
        layout = Layout(
            tensor, pipeline, context, data, micro_batch, virtual_pipeline=chunks, fully_sharded=sharded == "yes"
        )
        source = NEMO_PAGE if page == "nemo" else BRIDGE_PAGE
        title = f"{name} fp8 x {layout.world_size}, {rows} rows" + (f", CP {context}" if context > 1 else "")
        shape, batch = NEMO_SHAPES[name], causal(length, rows)
        yield PublishedRun("NeMo", title, source, shape, layout, batch, program, device, float(speed))


# model, share of the layers that are computed again, tokens/s on 128 A100, on 96 H100
IBM = """
7B  0.00 4550 9600
13B 0.39 2150 4850
34B 1.00  820 1830
70B 1.00  410  890
"""


def _ibm() -> Iterator[PublishedRun]:
    """Llama 2 with torch.compile at 4,096 tokens, two rows a rank; 7B shares weights within a node (HSDP), others over all ranks.

    The share computed again is three times HFU / MFU - 1 of its table. bf16 for weights and gradients alike (its policy).
    The networks, 400 and 800 Gb/s, are not said to be a node's or an accelerator's; taken as an accelerator's.
    """
    for size, share, a100, h100 in fields_of(IBM):
        again = float(share)
        program = Implementation(
            overlaps_data=True,
            gradient_bytes=2,
            recomputed_products=again,
            recomputed_attention=again,
            sharding_ranks=8 if size == "7B" else 0,
        )
        for device, ranks, network, speed in (("a100_80gb", 128, 400.0, a100), ("h100", 96, 800.0, h100)):
            layout = Layout(1, 1, 1, ranks, 2, fully_sharded=True)
            yield PublishedRun(
                "IBM",
                f"{size} x {ranks}",
                "foundation-model-stack/fms-fsdp README",
                LLAMA_2[size],
                layout,
                causal(4096, 2 * ranks),
                program,
                device,
                float(speed),
                network,
            )


def published_runs() -> list[PublishedRun]:
    return [*_megatron(), *_foundry(), *_titan(), *_trainy(), *_nemo(), *_ibm()]
