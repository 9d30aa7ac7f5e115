"""Hostile names and values in every place of a batch script: what is not refused must run nothing.

    python -m benchmarks.hostile_scripts

Each value is put in each place of a submission; a script that is written is run by bash, with stand-ins for Slurm's
commands and for the interpreter, and no file may appear where the hostile values would make one. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.commands import submit
from model.errors import UserError

TOUCH = "touch CANARY"
VALUES = (
    f"$({TOUCH})",
    f"`{TOUCH}`",
    f"; {TOUCH};",
    f"& {TOUCH} &",
    f"&& {TOUCH}",
    f"|| {TOUCH}",
    f"| {TOUCH}",
    f"\n{TOUCH}\n",
    f"\r{TOUCH}\r",
    f"\r\n{TOUCH}",
    f"\x00{TOUCH}",
    f"\x0b{TOUCH}",
    f"\x85{TOUCH}",
    f"\u2028{TOUCH}",
    f"\x1b]0;{TOUCH}\x07",
    f"'; {TOUCH}; '",
    f'"; {TOUCH}; "',
    f"\\'; {TOUCH} #",
    f"#\n#SBATCH --wrap='{TOUCH}'",
    f"a) {TOUCH} ;; b",
    f"$(({TOUCH}))",
    f"<({TOUCH})",
    f"${{x:-$({TOUCH})}}",
)
SETTINGS = ("partition", "account", "constraint", "memory", "network_interface", "container_image", "python")


def places() -> dict[str, Callable[[submit.Config, str], None]]:
    """How a value gets to each place."""

    def setting(name: str) -> Callable[[submit.Config, str], None]:
        return lambda config, value: setattr(config.cluster, name, value)

    def run_folder(config: submit.Config, value: str) -> None:
        config.run_folder = f"{config.run_folder}/{value}"

    found: dict[str, Callable[[submit.Config, str], None]] = {f"cluster.{name}": setting(name) for name in SETTINGS}
    found["name"] = lambda config, value: setattr(config, "name", value)
    found["run_folder"] = run_folder
    found["cluster.modules"] = lambda config, value: config.cluster.modules.append(value)
    found["cluster.environment"] = lambda config, value: config.cluster.environment.update(X=value)
    return found


def outcome(config: submit.Config, folder: Path, stand_ins: Path) -> str:
    """refused | harmless | run: what became of one submission, whose script runs in `folder`."""
    try:
        config.validate()
        with contextlib.redirect_stderr(io.StringIO()):  # warnings of a submission that is only shown
            script = str(submit.run(config)["script"])
    except UserError:
        return "refused"
    return "run" if makes_a_canary(script, folder, stand_ins) else "harmless"


def makes_a_canary(script: str, folder: Path, stand_ins: Path) -> bool:
    environment = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "0"}
    environment |= {"SLURM_JOB_NODELIST": "n", "SLURM_PROCID": "0", "HOME": str(folder)}
    subprocess.run(["bash"], input=script.encode(), cwd=folder, env=environment, capture_output=True, timeout=60)
    return bool(list(folder.rglob("CANARY*")))


def make_stand_ins(folder: Path) -> Path:
    folder.mkdir()
    for name in ("srun", "scontrol", "squeue", "module", "sleep", "apptainer"):
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    return folder


def submission(folder: Path, stand_ins: Path) -> submit.Config:
    config = submit.Config(name="fine", run_folder=str(folder / "run"), dry_run=True)
    cluster: Any = config.cluster
    cluster.kind, cluster.gres, cluster.tasks_per_node = "slurm", "", 1
    cluster.container, cluster.container_image = "pyxis", "image"
    cluster.python = str(stand_ins / "srun")
    return config


def main() -> int:
    outcomes: Counter[str] = Counter()
    ran: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nextstate-hostile-") as name:
        stand_ins = make_stand_ins(Path(name) / "stand_ins")
        assert makes_a_canary(f"x=$({TOUCH})", stand_ins, stand_ins), "the check sees nothing"
        (stand_ins / "CANARY").unlink()
        for number, (place, put) in enumerate(places().items()):
            for index, value in enumerate(VALUES):
                folder = Path(name) / f"{number}_{index}"
                folder.mkdir()
                config = submission(folder, stand_ins)
                put(config, value)
                os.chdir(folder)  # the working folder of a submission is where its script starts
                result = outcome(config, folder, stand_ins)
                outcomes[result] += 1
                ran += [f"{place}: {value!r}"] if result == "run" else []
        os.chdir("/")
    print(json.dumps({"values": outcomes.total(), **outcomes, "ran": ran}, indent=1))
    return 1 if ran else 0


if __name__ == "__main__":
    sys.exit(main())
