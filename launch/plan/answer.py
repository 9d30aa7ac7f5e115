"""From the configuration of `nextstate plan` to its answer, and the answer as a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launch.cluster.profile import ClusterConfig
from launch.plan.layout import Layout, largest_data
from launch.plan.memory import MASTER_BYTES, MOMENT_BYTES, RESERVED_BYTES, RESERVED_SHARE
from launch.plan.packed_lengths import NUM_ROWS, mean_document_tokens
from launch.plan.published import told_accuracy
from launch.plan.search import Plan, Problem, check_layout, plan_layout, search
from launch.plan.stage import layout_of, problem_of
from launch.plan.timing import Efficiencies
from model.errors import UserError
from model.parallel.devices import find_device
from training.config import TrainConfig

TOKEN_BYTES = 4.024  # of packed files with their sidecars (docs/data_formats.md)
NUM_RANKED = 10
TIGHT_SHARE = 0.1  # of the usable memory, free: below it the allocator may cost time that no forecast counts


def make_problem(
    config: TrainConfig, cluster: ClusterConfig, document_tokens: float | None, attention_flops: str
) -> Problem:
    device = find_device(cluster.device)
    return problem_of(config, cluster, device, document_tokens=document_tokens, attention_flops=attention_flops)


def own_layout(config: TrainConfig, problem: Problem) -> Layout:
    """The stage's own layout; where it leaves the data-parallel ranks at one, as many as there is room for."""
    layout = layout_of(config)
    if layout.data != 1 or min(layout.tensor, layout.pipeline, layout.context, layout.micro_batch) < 1:
        return layout
    data = largest_data(layout, problem.batch, problem.cluster.num_accelerators)
    return replace(layout, data=max(1, data))


def answer(
    config: TrainConfig,
    cluster: ClusterConfig,
    *,
    recompute: list[str],
    document_tokens: int | None,
    attention_flops: str,
) -> dict[str, Any]:
    """The whole answer: the best layouts, the stage's own one, storage, and what was assumed."""
    measured = mean_document_tokens(config) if document_tokens is None else None
    problem = make_problem(config, cluster, document_tokens or measured, attention_flops)
    own = own_layout(config, problem)
    problems = check_layout(problem, own)
    plans = search(problem, recompute)
    return {
        "model": config.model.name,
        "stage": config.stage.name,
        "parameters": problem.shape.total_parameters(),
        "batch": {
            "rows": problem.batch.global_batch_size,
            "sequence_length": problem.batch.sequence_length,
            "tokens": problem.batch.tokens,
            "steps": problem.num_steps,
        },
        "best": {**plans[0].to_dict(), **details(plans[0])},
        "ranked": [plan.to_dict() for plan in plans[:NUM_RANKED]],
        "stage_layout": stage_layout(problem, own, problems),
        "storage": storage(problem, plans[0]),
        "assumptions": assumptions(problem, attention_flops) | {"documents": told_documents(document_tokens, measured)},
    }


def told_documents(given: int | None, measured: float | None) -> str:
    """Where the lengths of documents are from."""
    if given is not None:
        return f"{given:,} tokens, as document_tokens says"
    if measured is not None:
        return f"{measured:,.0f} tokens for the mean token, in the first {NUM_ROWS} packed rows of the mixture"
    return "a row is one document, the dearest case: there are no packed rows to look at, and no document_tokens"


def dry_run(config: TrainConfig, cluster: ClusterConfig, document_tokens: int | None) -> dict[str, Any]:
    """Builds every part of the stage's own layout; see `launch.plan.simulate`."""
    problem = make_problem(config, cluster, document_tokens, "causal")
    layout = own_layout(config, problem)
    problems = check_layout(problem, layout)
    if problems:
        raise UserError(
            "the layout cannot run on this cluster: " + "; ".join(problems),
            where="parallel",
            got=layout.overrides(),
            fix=f"cluster.num_accelerators={layout.world_size}",
        )
    from launch.plan.simulate import simulate  # imports torch and megatron

    return {"model": config.model.name, **simulate(config.model, layout, problem.batch)}


def details(plan: Plan) -> dict[str, Any]:
    """Where memory and time of one plan go; memory of the first and of the last pipeline stage."""
    from launch.plan.memory import stage_memory

    last = plan.layout.pipeline - 1
    stages = {
        f"stage_{stage}": stage_memory(plan.problem.shape, plan.layout, plan.problem.batch, stage).to_dict()
        for stage in sorted({0, last // 2, last})
    }
    return {"memory_by_stage": stages, "step": plan.step.to_dict()}


def stage_layout(problem: Problem, layout: Layout, problems: list[str]) -> dict[str, Any]:
    if problems:
        return {"overrides": layout.overrides(), "possible": False, "problems": problems}
    return {"possible": True, **plan_layout(problem, layout).to_dict()}


def storage(problem: Problem, plan: Plan) -> dict[str, Any]:
    """Checkpoints and tokens. A checkpoint holds weights, master weights and both moments."""
    shape = problem.shape
    master = MASTER_BYTES if shape.dtype_bytes != 4 else 0
    checkpoint = shape.total_parameters() * (shape.dtype_bytes + master + MOMENT_BYTES)
    rate = problem.cluster.storage_gigabytes_per_second * 1e9
    tokens = problem.batch.tokens * problem.num_steps
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoint_seconds": round(checkpoint / rate, 1),
        "tokens": tokens,
        "token_bytes_if_each_is_read_once": round(tokens * TOKEN_BYTES),
        "read_bytes_per_second": round(plan.tokens_per_second * TOKEN_BYTES),
    }


def assumptions(problem: Problem, attention_flops: str) -> dict[str, Any]:
    device, cluster = problem.device, problem.cluster
    return {
        "flops": "6 for each parameter of a matrix product (input embedding excluded) and token, plus attention: "
        + ("each token attends to half of its document" if attention_flops == "causal" else "as if it were not causal"),
        "flops_per_token": problem.shape.flops_per_token(problem.mfu_attended_tokens),
        "attended_tokens": problem.batch.attended_tokens,
        "device": device.title,
        "peak_flops_per_second": device.bf16_flops_per_second,
        "device_source": device.source,
        "memory_bytes": device.memory_bytes,
        "usable_memory_bytes": round(problem.usable_bytes),
        "reserved": f"{RESERVED_BYTES} bytes and {RESERVED_SHARE:.0%} for driver, communication and allocator",
        "network_gigabits_per_second": cluster.network_gigabits_per_second,
        "accelerators_per_fast_domain": cluster.accelerators_per_fast_domain,
        "storage_gigabytes_per_second": cluster.storage_gigabytes_per_second,
        "efficiencies": dict(Efficiencies().__dict__),
        "engine": "this project's: communication is not overlapped, gradients are reduced in float32, no interleaving",
        "accuracy": f"{told_accuracy(device.name)}; differences below the mean error do not rank layouts",
        "published_runs": "nextstate plan check=published compares the step times with published ones",
    }


def render(found: dict[str, Any]) -> str:
    best, batch = found["best"], found["batch"]
    lines = [
        f"{found['model']} ({found['parameters'] / 1e9:.2f}B parameters with padding), {found['stage']}: "
        f"{batch['rows']} rows x {batch['sequence_length']:,} tokens, {batch['steps']:,} steps",
        f"{found['assumptions']['device']}, {found['assumptions']['usable_memory_bytes'] / 1e9:.1f} GB usable",
        "",
        "  # tensor pipeline context  data rows recompute   memory GB  free GB    step s     tokens/s   MFU     days   hours (k)",
    ]
    for number, plan in enumerate(found["ranked"], 1):
        lines.append(
            f"{number:>3} {plan['tensor']:>6} {plan['pipeline']:>8} {plan['context']:>7} {plan['data']:>5} "
            f"{plan['micro_batch']:>4} {plan['recompute']:<10} {plan['memory_bytes'] / 1e9:>10.1f} "
            f"{plan['margin_bytes'] / 1e9:>8.1f} {plan['step_seconds']:>9.3f} {plan['tokens_per_second']:>12,.0f} "
            f"{plan['mfu']:>5.1%} {plan['days']:>8,.1f} {plan['accelerator_hours'] / 1000:>11,.1f}"
        )
    own = found["stage_layout"]
    verdict = (
        "; ".join(own["problems"])
        if not own["possible"]
        else f"{'fits' if own['fits'] else 'does not fit'} ({own['memory_bytes'] / 1e9:.1f} GB), "
        f"{own['step_seconds']:.3f} s a step"
    )
    lines += ["", f"the stage's own layout ({own['overrides']}): {verdict}", "", "the best layout, in parts:"]
    for stage, parts in best["memory_by_stage"].items():
        lines.append(f"  {stage}: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()) + " GB")
    lines.append("  step: " + ", ".join(f"{name} {value:.3f}" for name, value in best["step"].items()) + " s")
    stored = found["storage"]
    lines += [
        f"  checkpoint: {stored['checkpoint_bytes'] / 1e9:,.0f} GB, {stored['checkpoint_seconds']:,.0f} s to write; "
        f"tokens: {stored['token_bytes_if_each_is_read_once'] / 1e12:,.1f} TB",
        f"  use it: {best['overrides']}",
        "",
        f"FLOPs: {found['assumptions']['flops']}",
        f"documents: {found['assumptions']['documents']}",
        f"engine: {found['assumptions']['engine']}",
        f"accuracy: {found['assumptions']['accuracy']}",
    ]
    if best["margin_bytes"] < TIGHT_SHARE * found["assumptions"]["usable_memory_bytes"]:
        lines.append(
            f"memory: the best layout leaves less than {TIGHT_SHARE:.0%} free. An allocator that has to clear up slows a step, which is not in "
            "the forecast: of published runs that were as full some took 1.3 times as long"
        )
    return "\n".join(lines)


def render_dry_run(found: dict[str, Any]) -> str:
    lines = [
        f"{found['model']} on {found['world_size']:,} ranks ({found['layout']})",
        f"{found['parts_built']} distinct parts built, each held by {found['ranks_of_each_part']} ranks; together "
        f"{found['parameters']:,} parameters and {found['padding_parameters']:,} of padding, as published",
        "weights of a rank: "
        + ", ".join(f"{size / 1e9:.3f} GB" for size in found["weights_bytes_by_stage"])
        + ", as planned",
    ]
    for stage, groups in found["collectives_of_one_step"].items():
        lines.append(f"{stage}, one step:")
        lines += [
            f"  {group:<17} {operation:<15} {entry['count']:>7,} x, {entry['bytes'] / 1e9:>10.3f} GB"
            for group, operations in groups.items()
            for operation, entry in operations.items()
        ]
    return "\n".join([*lines, f"{found['seconds']} s"])


def render_published(found: dict[str, Any]) -> str:
    """Forecast against published, row by row, then the errors by device and publisher as in docs/planning.md."""
    lines = [
        "| publisher | configuration | device | accelerators | published tokens/s | forecast | error |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['publisher']} | {row['name']} | {row['device']} | {row['accelerators']} | {row['published']:,.0f} "
        f"| {row['forecast']:,.0f} | {row['error']:+.1%} |"
        for row in found["runs"]
    ]
    lines += ["", "each row is forecast with efficiencies fitted on the other publishers' rows", ""]
    return "\n".join(lines + told_errors(found["held_out"]))


def told_errors(held_out: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Mean and worst error by kind: of all rows, by device, by publisher."""
    lines = ["| rows | number | mean error | worst | beyond 20% |", "|---|---|---|---|---|"]
    return lines + [
        f"| {'all' if kind == 'all' else f'{kind} {name}'} | {error['num_rows']} | {error['mean']:.1%} | {error['worst']:.1%} "
        f"| {error['num_far_off']} |"
        for kind, errors in held_out.items()
        for name, error in errors.items()
    ]
