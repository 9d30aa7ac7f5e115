"""Does reinforcement learning learn, on every seed, and only from a reward that means something?

    python -m benchmarks.rl_seeds --run-folder runs/demo --seeds 5 --out rl_seeds.json

Runs the demo's stage `toy_rl` from the run's sft checkpoint with several seeds, then twice more: with the reward's sign
turned round, and with each answer judged by the scene of another prompt. Says of each the reward and the accuracy on
held-out prompts, answers drawn as in rollouts, before and after, and whether it rose by half of the distance to the
maximum. About three minutes a run on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.shapes_world.scenes import ShapesReader
from training.rewards.base import Answer
from training.rewards.rules import SceneMatch

SIGNAL = "stage.objective.rewards.signals.scene"
CONTROLS = {
    "flipped": [f"{SIGNAL}.path=benchmarks.rl_seeds.Flipped", f"{SIGNAL}.options={{}}", f"{SIGNAL}.range=[-1.0,0.0]"],
    "shuffled": ["stage.objective.prompts.t2i.options={shuffled: true}"],
}
UNGUARDED = "reliability.spike_factor=0"  # what the controls learn is no good, and is to be seen
READER = f"{ShapesReader.__module__}.{ShapesReader.__name__}"


class Flipped:
    """The worse the picture, the better."""

    name, version = "flipped", "1"

    def __init__(self, reader: str = READER):
        self._scene = SceneMatch(reader)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [None if value is None else -value for value in self._scene.score(answers)]


def command(*arguments: str) -> dict[str, Any]:
    """One nextstate command; its answer."""
    call = [sys.executable, "-m", "launch.command_line.cli", *arguments, "json=true"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(run_folder: Path, evaluation: str) -> dict[str, float]:
    answer = command("evaluate", f"evaluation={evaluation}", f"run_folder={run_folder}")
    return {name: float(answer["tasks"][name]["accuracy"]) for name in ("t2i_reward", "t2i_sampled")}


def run(source: Path, folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One stage in a run folder of its own, which shares the checkpoint and the tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sft", "text_tokenizer", "vision_tokenizer"):
        if not (folder / name).exists():
            (folder / name).symlink_to((source / name).absolute())
    started = time.monotonic()
    stage = ["stage=toy_rl", "model=toy", f"run_folder={folder}", f"seed={seed}", "logging.wandb_mode=disabled"]
    command("train", *stage, *overrides)
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    entropies = [line["entropy"]["image"] for line in lines if "image" in line.get("entropy", {})]
    last = entropies[-10:]
    return measure(folder, "toy_rl") | {
        "seconds": round(seconds, 1),
        "entropy_first": entropies[0],
        "entropy_last": sum(last) / len(last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--work", type=Path, default=Path("runs/rl_seeds"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=[*CONTROLS])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", help="of every training")
    options = parser.parse_args()
    before = measure(options.run_folder, "toy_rl_start")
    plans = {f"seed_{seed}": (seed, []) for seed in range(options.seeds)} | {
        name: (0, [*CONTROLS[name], UNGUARDED]) for name in options.controls
    }
    found: dict[str, Any] = {"before": before}
    print(json.dumps({"before": before}), flush=True)
    for name, (seed, overrides) in plans.items():
        after = run(options.run_folder, options.work / name, seed, [*overrides, *options.overrides])
        rise, distance = after["t2i_reward"] - before["t2i_reward"], 1 - before["t2i_reward"]
        found[name] = after | {"share_of_distance": rise / distance if distance > 0 else 0.0}
        print(json.dumps({name: found[name]}), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
