"""How long a training process takes until its engine stands, by engine, and how often it calls a compiler.

    python -m benchmarks.engine_start [--engines megatron deepspeed] [--rounds 3]

One process, the toy model, from the start of Python to an engine that could take a step. Compilers, assemblers and ninja
are replaced by a script that notes the call and fails, so nothing is compiled and every attempt is counted. CPU seconds
say more than seconds on a machine that is shared.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "ninja", "ld", "as")
PROGRAM = """
from dataclasses import replace
from training.config import TrainConfig
from training.engines.registry import make_engine
config = replace(TrainConfig(), engine={engine!r})
engine = make_engine(config, None)
engine.close()
"""


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(engine: str, folder: Path) -> tuple[float, float, int]:
    """(seconds, CPU seconds, calls of a compiler)."""
    calls = folder / "calls"
    calls.write_text("")
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"CALLS": str(calls), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    begun, used = time.monotonic(), cpu_seconds_of_children()
    program = [sys.executable, "-c", PROGRAM.format(engine=engine)]
    subprocess.run(program, cwd=REPOSITORY, env=environment, check=True, stderr=subprocess.DEVNULL)
    seconds, cpu_seconds = time.monotonic() - begun, cpu_seconds_of_children() - used
    return seconds, cpu_seconds, len(calls.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["megatron", "deepspeed"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for compiler in COMPILERS:
            path = folder / compiler
            path.write_text('#!/bin/sh\necho "$0 $*" >>"$CALLS"\nexit 1\n')
            path.chmod(0o755)
        for _ in range(options.rounds):
            for engine in options.engines:  # in turns, so that another load touches both
                seconds, cpu_seconds, calls = start(engine, folder)
                print(
                    f"{engine:<10} {seconds:6.2f} s  {cpu_seconds:6.2f} CPU s  {calls} calls of a compiler", flush=True
                )


if __name__ == "__main__":
    main()
