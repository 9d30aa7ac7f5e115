"""The answer of `nextstate plan engine=deepspeed`, as a table, and which engine it recommends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.cluster.profile import ClusterConfig
from launch.plan.answer import make_problem
from launch.plan.search import Plan, Problem, search
from launch.plan.zero import ZeroPlan, best_of_each, zero_layouts
from model.errors import UserError
from training.config import TrainConfig


def answer(
    config: TrainConfig, cluster: ClusterConfig, *, recompute: list[str], document_tokens: int | None
) -> dict[str, Any]:
    """Every stage of ZeRO with and without offload, the best layout of engine=megatron beside them, and advice."""
    problem = make_problem(config, cluster, document_tokens, "causal")
    layouts = zero_layouts(problem, config.stage.micro_batch_size, recompute)
    plans = best_of_each(problem, layouts, config.deepspeed)
    if not plans:
        raise UserError(
            "no layout of this model and batch is possible without a pipeline",
            where="cluster.num_accelerators",
            got=str(cluster.num_accelerators),
            fix="change stage.global_batch_size or stage.sequence_length: they leave nothing to divide",
        )
    megatron, missing = best_megatron(problem, recompute)
    return {
        "engine": "deepspeed",
        "model": config.model.name,
        "stage": config.stage.name,
        "parameters": problem.shape.total_parameters(),
        "accelerators": cluster.num_accelerators,
        "device": problem.device.title,
        "usable_memory_bytes": round(problem.usable_bytes),
        "zero": [plan.to_dict() for plan in plans],
        "megatron": megatron.to_dict() if megatron else {"fits": False, "reason": missing},
        "recommendation": recommend(plans, megatron),
    }


def best_megatron(problem: Problem, recompute: Sequence[str]) -> tuple[Plan | None, str]:
    try:
        return search(problem, recompute)[0], ""
    except UserError as error:
        return None, error.what


def recommend(plans: Sequence[ZeroPlan], megatron: Plan | None) -> dict[str, Any]:
    """The fastest of what fits without the host; else the offload that moves least; else more accelerators."""
    timed = [plan for plan in plans if plan.fits and plan.step_seconds is not None]
    fastest = min(timed, key=lambda plan: plan.step_seconds or 0.0, default=None)
    if megatron is not None and (fastest is None or megatron.step.total <= (fastest.step_seconds or 0.0)):
        reason = "it fits without the host's help and has the shorter step"
        return {"engine": "megatron", "overrides": f"engine=megatron {megatron.layout.overrides()}", "reason": reason}
    if fastest is not None:
        reason = "it fits without offload" + (" and has the shorter step" if megatron else "; megatron does not")
        return {"engine": "deepspeed", "overrides": fastest.to_dict()["overrides"], "reason": reason}
    offloaded = [plan for plan in plans if plan.fits]
    if offloaded:
        # The optimizer alone before the weights as well; then what moves least.
        chosen = min(offloaded, key=lambda plan: (plan.choice.offload_weights, plan.communication_bytes))
        host = f"{chosen.host_bytes / 1e9:,.0f} GB of host memory a node"
        reason = f"nothing fits on the accelerators alone; with {host} this does"
        return {"engine": "deepspeed", "overrides": chosen.to_dict()["overrides"], "reason": reason}
    return {"engine": None, "overrides": "", "reason": "nothing fits: more accelerators, or a smaller model"}


def render(found: dict[str, Any]) -> str:
    lines = [
        f"{found['model']} ({found['parameters'] / 1e9:.2f}B parameters with padding), {found['stage']}, engine=deepspeed on "
        f"{found['accelerators']} x {found['device']}, {found['usable_memory_bytes'] / 1e9:.1f} GB usable",
        "",
        "ZeRO offload             tensor  data recompute  memory GB fits  host GB a node  moved GB a step   step s",
    ]
    for one in found["zero"]:
        offload = " + ".join(name for name in ("optimizer", "weights") if one[f"offload_{name}"])
        seconds = "-" if one["step_seconds"] is None else f"{one['step_seconds']:.3f}"
        lines.append(
            f"{one['zero_stage']:>4} {offload or 'none':<19} {one['tensor']:>6} {one['data']:>5} {one['recompute']:<10} "
            f"{one['memory_bytes'] / 1e9:>9.1f} {'yes' if one['fits'] else 'no':<4} "
            f"{one['host_bytes_per_node'] / 1e9:>15,.1f} {one['communication_bytes'] / 1e9:>16,.1f} {seconds:>8}"
        )
    megatron = found["megatron"]
    told = (
        f"{megatron['overrides']}: {megatron['memory_bytes'] / 1e9:.1f} GB, {megatron['step_seconds']:.3f} s a step"
        if megatron["fits"]
        else megatron["reason"]
    )
    advice = found["recommendation"]
    lines += [
        "",
        f"engine=megatron: {told}",
        f"recommended: {advice['engine'] or 'none'}, {advice['reason']}",
        f"  {advice['overrides']}",
        "",
        "No step time with offload: it hangs on the host's memory and bus, of which nothing is known here.",
    ]
    return "\n".join(lines)
