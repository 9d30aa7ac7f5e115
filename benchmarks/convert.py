"""Conversion of a checkpoint of random bf16 weights both ways, against `cp` of the same bytes in the same run.

    python -m benchmarks.convert --billions 4 --folder /path/with/room

Needs about four times the checkpoint's size on the disk; removes what it wrote. Prints one JSON object: seconds and
peak memory of each conversion, and the rates as shares of `cp`'s. Each conversion is a process of its own, and
so is each `cp`; every measurement starts after a sync, and each `cp` is timed next to the conversion it is compared with.
`cp` does not wait for the disk, a conversion does (a checkpoint that a power cut takes away is none): `cp_synced` is
`cp` and a sync.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from model.config import ModelConfig, count_parameters
from model.conversion.actions import PREFIX, Options, to_checkpoint
from model.conversion.mappings import OUR_RULES, mapped_tensors
from model.conversion.plan import Segment, Target
from model.conversion.record import model_metadata
from model.conversion.sources import MadeSource
from model.conversion.tensors import TensorInfo
from model.vocabulary import VocabularyConfig

# Width and depth of Qwen3-4B with the vocabulary of Emu3.5; layers are left out for smaller sizes.
MODEL = ModelConfig(
    name="benchmark",
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    dtype="bfloat16",
    vocabulary=VocabularyConfig("emu35", pad_multiple=1024),
)
PROGRAM = """
import json, resource, sys
from launch.command_line import cli
code = cli.main(sys.argv[1:])
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), file=sys.stderr)
sys.exit(code)
"""


def model_of(billions: float) -> ModelConfig:
    """As many layers as bring the model nearest to this many parameters; narrower below 1.5 billion."""
    sizes = asdict(MODEL) | {"vocabulary": MODEL.vocabulary}
    if billions < 1.5:
        sizes["vocabulary"] = VocabularyConfig(text_size=30_000, visual_size=2_000, pad_multiple=1024)
    totals = {
        layers: count_parameters(ModelConfig(**sizes | {"num_layers": layers}))["total"] for layers in range(1, 64)
    }
    nearest = min(totals, key=lambda layers: abs(totals[layers] - billions * 1e9))
    return ModelConfig(**sizes | {"num_layers": nearest})


def make_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Random bits, written as fast as the disk takes them."""
    # Of both signs, smaller than two and finite.
    bits = np.random.default_rng(0).integers(0, 1 << 16, 32 << 20, np.uint16) & 0xBFFF
    noise = bits.view(np.uint8)
    tensors = {one.ours: TensorInfo(one.our_shape, "bfloat16") for one in mapped_tensors(OUR_RULES, config)}

    def make(name: str, start: int, stop: int, out: np.ndarray) -> None:
        flat = out.reshape(-1)
        first = (start * tensors[name].row_bytes + 4096 * len(name)) % (len(noise) // 2)
        for position in range(0, len(flat), len(noise) // 2):
            part = flat[position : position + len(noise) // 2]
            part[:] = noise[first : first + len(part)]

    source = MadeSource("random bits", tensors, make)
    targets = [
        Target(
            PREFIX + one.ours, tensors[one.ours], [Segment(source, one.ours, 0, one.our_shape[0])], one.rule, one.layer
        )
        for one in mapped_tensors(OUR_RULES, config)
    ]
    what = {"action": "benchmark"}
    to_checkpoint(folder, targets, [source], config, model_metadata(config, 0), what, Options())


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds of a process, and the peak memory that it reports on its last line of stderr (0: none)."""
    os.sync()
    started = time.monotonic()
    finished = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if finished.returncode != 0:
        raise SystemExit(finished.stderr)
    last = finished.stderr.strip().splitlines()[-1:]
    return seconds, json.loads(last[0])["peak"] if last and last[0].startswith('{"peak"') else 0


def measure(folder: Path, billions: float, threads: int) -> dict:
    config = model_of(billions)
    checkpoint = folder / "checkpoint"
    make_checkpoint(checkpoint, config)
    num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    largest = max(one.our_shape[0] * int(np.prod(one.our_shape[1:])) * 2 for one in mapped_tensors(OUR_RULES, config))
    answer = {
        "parameters": count_parameters(config)["total"],
        "bytes": num_bytes,
        "largest_tensor_bytes": largest,
        "memory_limit_bytes": 3 * largest + (300 << 20),
    }
    convert = [sys.executable, "-c", PROGRAM, "convert"]
    export, back, copy = folder / "export", folder / "back", folder / "copy"
    ways = {
        "to_hf": (["to_hf", f"source={checkpoint}", f"target={export}", "layout=emu35"], checkpoint),
        "from_hf": (["from_hf", f"source={export}", f"target={back}", "layout=emu35"], export),
    }
    for name, (arguments, source) in ways.items():
        plain, _ = timed(["cp", "-r", str(source), str(copy)])
        shutil.rmtree(copy)
        seconds, peak = timed([*convert, *arguments, f"threads={threads}", "verify=none", "json=true"])
        synced, _ = timed(["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(copy)])
        shutil.rmtree(copy)
        answer[name] = {
            "seconds": round(seconds, 2),
            "cp_seconds": round(plain, 2),
            "cp_synced_seconds": round(synced, 2),
            "share_of_cp": round(plain / seconds, 3),
            "share_of_cp_synced": round(synced / seconds, 3),
            "peak_memory_bytes": peak,
        }
    names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    answer["bitwise_equal"] = all(
        subprocess.run(["cmp", "-s", checkpoint / name, back / name]).returncode == 0 for name in names
    )
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--billions", type=float, default=0.3, help="parameters of the model")
    parser.add_argument("--folder", type=Path, required=True, help="an existing folder with room")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    work = arguments.folder / f"convert-benchmark-{os.getpid()}"
    work.mkdir()
    try:
        print(json.dumps(measure(work, arguments.billions, arguments.threads), indent=1))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
