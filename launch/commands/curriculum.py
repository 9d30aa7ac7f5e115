"""`nextstate curriculum`: runs a list of stages and the steps between them, or shows where they stand."""

from __future__ import annotations

from typing import Any

from launch.curriculum import Curriculum, CurriculumConfig, run_curriculum, summary

HELP = """Run a curriculum: data, stages, evaluation, in order; what is up to date is skipped.

A curriculum is a file of conf/curriculum. Its entries run as processes of their own; the state stands in
<run_folder>/curriculum.json. Run the same command again after any interruption.

examples:
  nextstate curriculum curriculum=demo                     everything that is not done yet
  nextstate curriculum status curriculum=demo              one line an entry
  nextstate curriculum curriculum=demo until=pretrain_1    stop after an entry
  nextstate curriculum curriculum=demo 'force=[sft]'       run an entry again, and what depends on it
  nextstate curriculum curriculum=emu35 dry_run=true       what would run"""

Config = CurriculumConfig
POSITIONAL = "action"


def run(config: CurriculumConfig) -> dict[str, Any]:
    if config.action == "status":
        return summary(Curriculum(config))
    return run_curriculum(config)


def render(answer: dict[str, Any]) -> str:
    lines = [f"{'entry':<24} {'state':<12} {'seconds':>9} {'GiB':>7} {'step':>8} {'loss':>9}"]
    for entry in answer["entries"]:
        loss = f"{entry['loss']:.4f}" if isinstance(entry.get("loss"), float) else ""
        lines.append(
            f"{entry['name']:<24} {entry['state']:<12} {entry['wall_seconds']:>9.1f} "
            f"{entry['peak_memory_bytes'] / 2**30:>7.2f} {entry.get('step', ''):>8} {loss:>9}"
        )
    return "\n".join(lines)
