"""Does pretraining earn its place? The same fine-tuning from the pretrained stage and from fresh weights, seed by seed.

    python -m benchmarks.earned --run-folder runs/demo --seeds 1 2 3
    python -m benchmarks.earned --run-folder runs/world --stage world_sft --evaluation world --pretrained pretrain

Needs the run folder of a finished curriculum. Trains `sft_from_NAME_SEED` for both starts and each seed, evaluates them, and
appends a row each to `earned.tsv` in the run folder; rows that are there are not made again. The last run from scratch is
left as `evaluation/from_scratch.json`, so that `nextstate report` shows it among the baselines. Extra arguments after `--`
go to every training, for experiments with settings: their rows carry them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

NEXTSTATE = [sys.executable, "-m", "launch.command_line.cli"]
STARTS = ("pretrained", "scratch")
TASKS = ("t2i_accuracy", "next_state_accuracy", "edit_accuracy", "reconstruction_accuracy")
HEADER = ("start", "seed", "stage", "settings", *TASKS)


def run(arguments: list[str]) -> None:
    print(f"nextstate {' '.join(arguments)}", file=sys.stderr, flush=True)
    code = subprocess.run([*NEXTSTATE, *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def measure(options: argparse.Namespace, start: str, seed: int) -> dict[str, float]:
    """Train and evaluate one start with one seed; its accuracies by task."""
    mark = "_".join(["", *options.settings]).replace("=", "_").replace("/", "_")
    folder, name = options.run_folder, f"sft_from_{start}_{seed}{mark}"
    packed = f"stage.data.datasets.all.path={folder / 'packed' / 'sft' / 'all'}"
    initial = "null" if start == "scratch" else str(folder / options.pretrained)
    # Settings of their own make stages of their own.
    own = [f"stage.name={name}", f"seed={seed}", f"stage.initialize_from={initial}", packed, *options.settings]
    run(["train", f"stage={options.stage}", f"run_folder={folder}", *own])
    out = f"evaluation/earned/{name}.json"
    run(["evaluate", f"evaluation={options.evaluation}", f"run_folder={folder}", f"checkpoint={name}", f"out={out}"])
    if start == "scratch" and not options.settings:
        shutil.copy(folder / out, folder / "evaluation" / "from_scratch.json")
    metrics: dict[str, float] = json.loads((folder / out).read_text(encoding="utf-8"))["metrics"]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", type=lambda text: Path(text).absolute(), default=Path("runs/demo").absolute())
    parser.add_argument("--stage", default="toy_sft")
    parser.add_argument("--evaluation", default="toy")
    parser.add_argument(
        "--pretrained", default="pretrain_2", help="stage that the curriculum's fine-tuning starts from"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("settings", nargs="*", help="key=value for every training, after --")
    options = parser.parse_args()
    table = options.run_folder / "earned.tsv"
    if not table.exists():
        table.write_text("\t".join(HEADER) + "\n", encoding="utf-8")
    done = {tuple(line.split("\t")[:4]) for line in table.read_text(encoding="utf-8").splitlines()}
    for seed in options.seeds:
        for start in STARTS:
            key = (start, str(seed), options.stage, " ".join(options.settings))
            if key not in done:
                metrics = measure(options, start, seed)
                figures = [f"{metrics[task]:.3f}" if task in metrics else "" for task in TASKS]
                with table.open("a", encoding="utf-8") as stream:
                    stream.write("\t".join([*key, *figures]) + "\n")
    print(table.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
