"""Random kills of real commands: the same bytes in the end, no process left behind, no hang, no socket outside loopback.

    python -m benchmarks.kills --kills 20
    python -m benchmarks.kills --kills 5 --only tokenize pack

Each of train, tokenize, pack, convert and curriculum runs once unbroken, then again and again in fresh folders, each time
with a kill of the parent, one worker or all at a random moment, until it ends by itself; then its files are compared with
those of the unbroken run. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from benchmarks.killing import Command, Findings
from data_pipeline.documents.tokenizers import train_sentencepiece

NEXTSTATE = [sys.executable, "-m", "launch.command_line.cli"]
GOOD_EXITS = (0, 3)  # 3: stopped after a checkpoint
NUM_SHARDS, DOCUMENTS_PER_SHARD, TEXT_SIZE = 12, 300, 400
MODEL = ["model=toy", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.head_dim=16"]
MODEL += ["model.num_attention_heads=2", "model.num_query_groups=2", f"model.vocabulary.text_size={TEXT_SIZE}"]
MODEL += ["model.vocabulary.visual_size=64"]


@dataclass(frozen=True)
class Kind:
    """A command by the folder that it works in, and which of its files must be the same whatever happened."""

    arguments: Callable[[Path], list[str]]
    files: tuple[str, ...]


def make_inputs(folder: Path) -> None:
    """Raw shards of short texts, and a tokenizer of them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 120))) for _ in range(NUM_SHARDS * DOCUMENTS_PER_SHARD)]
    train_sentencepiece(texts[:500], folder / "text_tokenizer", TEXT_SIZE)
    (folder / "raw").mkdir()
    for number in range(NUM_SHARDS):
        with tarfile.open(folder / "raw" / f"{number:06d}.tar", "w") as shard:
            for index, text in enumerate(texts[number::NUM_SHARDS]):
                entry = tarfile.TarInfo(f"{index:06d}.txt")
                entry.size = len(text.encode())
                shard.addfile(entry, io.BytesIO(text.encode()))


def kinds(inputs: Path) -> dict[str, Kind]:
    tokenize = [f"input={inputs}/raw/*.tar", f"text_tokenizer={inputs}/text_tokenizer"]
    tokenize += ["vocabulary.visual_size=64", "workers=2"]
    pack = ["sequence_length=256", "window_rows=64"]
    train = ["stage=toy_sft", *MODEL, "stage.steps=12", "stage.sequence_length=256", "checkpoint.every_steps=3"]
    train += ["stage.optimizer.warmup_steps=2", "logging.wandb_mode=disabled", "stage.initialize_from=null"]
    train += [f"stage.data.datasets.all.path={inputs}/packed"]
    entries = {
        "tokens": {
            "command": "tokenize",
            "overrides": [*tokenize, "target=${run_folder}/tokens"],
            "outputs": ["tokens"],
        },
        "packed": {
            "command": "pack",
            "overrides": [*pack, "tokens.text=${run_folder}/tokens", "target=${run_folder}/packed"],
            "needs": ["tokens"],
            "outputs": ["packed"],
        },
        "fresh": {
            "command": "convert",
            "overrides": ["action=init", *MODEL, "target=${run_folder}/fresh"],
            "outputs": ["fresh"],
        },
    }
    conf = inputs / "conf" / "curriculum"
    conf.mkdir(parents=True, exist_ok=True)
    values = {"name": "kills", "run_folder": "runs/kills", "entries": entries}
    (conf / "kills.yaml").write_text("# @package _global_\n" + yaml.safe_dump(values), encoding="utf-8")
    return {
        "tokenize": Kind(
            lambda folder: [*NEXTSTATE, "tokenize", *tokenize, f"target={folder}/tokens"], ("tokens/[0-9]*",)
        ),
        "pack": Kind(
            lambda folder: [*NEXTSTATE, "pack", *pack, f"tokens.text={inputs}/tokens", f"target={folder}/packed"],
            ("packed/[0-9]*", "packed/dataset.json"),
        ),
        "convert": Kind(
            lambda folder: [
                *NEXTSTATE,
                "convert",
                "to_hf",
                f"source={inputs}/fresh",
                f"target={folder}/hf",
                "layout=emu35",
            ],
            ("hf/*.safetensors", "hf/config.json"),
        ),
        "curriculum": Kind(
            lambda folder: [
                *[*NEXTSTATE, "curriculum", "curriculum=kills", f"config_folder={inputs}/conf"],
                f"run_folder={folder}/run",
            ],
            ("run/tokens/[0-9]*.bin", "run/packed/[0-9]*.bin", "run/fresh/*.safetensors"),
        ),
        "train": Kind(
            lambda folder: [*NEXTSTATE, "train", *train, f"run_folder={folder}/run"],
            ("run/sft/checkpoints/step_00000012/*.safetensors",),
        ),
    }


def digests(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    # A manifest may say where its files are: the folder's own name is no difference.
    contents = {path: path.read_bytes().replace(str(folder).encode(), b"FOLDER") for path in paths}
    return {
        str(path.relative_to(folder)): hashlib.blake2b(content, digest_size=16).hexdigest()
        for path, content in contents.items()
    }


def run_unbroken(kind: Kind, folder: Path) -> tuple[dict[str, str], float, Findings]:
    folder.mkdir(parents=True)
    findings, started = Findings(), time.monotonic()
    command = Command(kind.arguments(folder), folder / "log.txt", findings)
    code = command.end()
    if code != 0:
        raise SystemExit(f"the unbroken run ended with {code}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return digests(folder, kind.files), time.monotonic() - started, findings


def attack(kind: Kind, folder: Path, num_kills: int, draw: random.Random) -> dict[str, object]:
    wanted, seconds, findings = run_unbroken(kind, folder / "unbroken")
    assert wanted, f"no file fits {kind.files}"
    num_ends, num_different, attempt = 0, 0, 0
    while findings.num_kills < num_kills or attempt:
        place = folder / f"killed_{num_ends}"
        place.mkdir(exist_ok=True)
        command = Command(kind.arguments(place), place / "log.txt", findings)
        # Every fourth start of a folder is left alone, so that each comes to its end.
        may_kill = findings.num_kills < num_kills and attempt % 4 != 3
        was_killed = may_kill and command.kill_after(draw.uniform(0, 1.1 * seconds), draw)
        code, attempt = command.end(), attempt + 1
        print(
            f"{place.name}, start {attempt}: exit code {code}, {findings.num_kills} kills", file=sys.stderr, flush=True
        )
        found = digests(place, kind.files)
        # A kill behind the last rename leaves a whole folder, which a conversion does not write again.
        was_done = code == 2 and attempt > 1 and found == wanted
        if code == 0 or was_done:
            num_different += found != wanted
            num_ends, attempt = num_ends + 1, 0
            shutil.rmtree(place)
        elif not was_killed and code not in GOOD_EXITS:
            findings.wrong_exits.append(f"exit code {code}: {(place / 'log.txt').read_text()[-600:]}")
            num_ends, attempt = num_ends + 1, 0
    answer = asdict(findings) | {"outside_sockets": sorted(findings.outside_sockets)}
    return answer | {"unbroken_seconds": round(seconds, 1), "num_ends": num_ends, "num_different": num_different}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each kind of command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="kinds of commands")
    options = parser.parse_args()
    answers, is_good = {}, True
    with tempfile.TemporaryDirectory(prefix="nextstate-kills-") as name:
        folder = Path(name)
        inputs = folder / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        table = kinds(inputs)
        for needed in ("tokenize", "pack"):  # what the others read
            run_unbroken(table[needed], inputs / needed)
            shutil.move(inputs / needed / {"tokenize": "tokens", "pack": "packed"}[needed], inputs)
        fresh = Command(
            [*NEXTSTATE, "convert", "init", *MODEL, f"target={inputs}/fresh"], inputs / "init.txt", Findings()
        )
        assert fresh.end() == 0
        for kind in options.only or table:
            answer = attack(table[kind], folder / kind, options.kills, random.Random(f"{options.seed} {kind}"))
            answers[kind] = answer
            bad = ("num_orphans", "num_hangs", "num_different", "wrong_exits", "outside_sockets")
            is_good &= not any(answer[key] for key in bad)
            print(f"{kind}: {json.dumps(answer)}", file=sys.stderr, flush=True)
    print(json.dumps(answers, indent=1))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
