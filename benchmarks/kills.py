"""Random kills of real commands: the same bytes in the end, no process left behind, no hang, no socket outside loopback.

    python -m benchmarks.kills --kills 20
    python -m benchmarks.kills --kills 5 --only tokenize pack

Each of train, tokenize, pack, convert and curriculum runs twice unbroken, then again and again in fresh folders, each time
with a kill of the parent, one worker or all at a random moment, until it ends by itself. Then all its files are compared
with those of the unbroken run: no file may be missing or left over, and each must have the same bytes, but for those that
differ between the two unbroken runs already (they hold times) and are named in the answer. Every second moment is drawn
from the time in which the command writes. Prints one JSON object.
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


LOG = "log.txt"  # of a command, in the folder that it works in
# Lines of a killed try stay in them, and the executor of `tokenize` logs the tasks of each start.
TIMED = ("*.log", "metrics.jsonl", "events.jsonl", "events.out.*", "logs/completions/*", "logs/stats/*")

Arguments = Callable[[Path], list[str]]  # of a command, by the folder that it works in


@dataclass(frozen=True)
class Unbroken:
    """What a command does when it is left alone."""

    files: dict[str, str]  # digests by name, those that are the same each time
    timed: list[str]  # the others
    seconds: float
    seconds_to_write: float  # until its first file


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


def kinds(inputs: Path) -> dict[str, Arguments]:
    tokenize = [f"input={inputs}/raw/*.tar", f"text_tokenizer={inputs}/text_tokenizer"]
    tokenize += ["vocabulary.visual_size=64", "workers=2"]
    pack = ["sequence_length=256", "window_rows=64"]
    train = ["stage=toy_sft", *MODEL, "stage.steps=12", "stage.sequence_length=256", "checkpoint.every_steps=3"]
    train += [
        "stage.optimizer.warmup_steps=2",
        "logging.wandb_mode=disabled",
        "stage.initialize_from=null",
        "preflight=false",
    ]
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
    to_hf = [*NEXTSTATE, "convert", "to_hf", f"source={inputs}/fresh", "layout=emu35"]
    curriculum = [*NEXTSTATE, "curriculum", "curriculum=kills", f"config_folder={inputs}/conf"]
    return {
        "tokenize": lambda folder: [*NEXTSTATE, "tokenize", *tokenize, f"target={folder}/tokens"],
        "pack": lambda folder: [*NEXTSTATE, "pack", *pack, f"tokens.text={inputs}/tokens", f"target={folder}/packed"],
        "convert": lambda folder: [*to_hf, f"target={folder}/hf"],
        "curriculum": lambda folder: [*curriculum, f"run_folder={folder}/run"],
        "train": lambda folder: [*NEXTSTATE, "train", *train, f"run_folder={folder}/run"],
    }


def digests(folder: Path) -> dict[str, str]:
    """Of every file by its name; links by where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == LOG or path.is_dir() or any(path.match(pattern) for pattern in TIMED):
            continue
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        # A manifest may say where its files are: the folder's own name is no difference.
        content = content.replace(str(folder).encode(), b"FOLDER")
        found[name] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return found


def has_files(folder: Path) -> bool:
    return any(path.is_file() and path.name != LOG for path in folder.rglob("*"))


def run_alone(arguments: Arguments, folder: Path, findings: Findings) -> tuple[float, float]:
    """Seconds, and seconds until the first file was there."""
    folder.mkdir(parents=True)
    started = time.monotonic()
    command = Command(arguments(folder), folder / LOG, findings)
    while command.process.poll() is None and not has_files(folder):
        time.sleep(0.02)
    seconds_to_write = time.monotonic() - started
    code = command.end()
    if code != 0:
        raise SystemExit(f"the unbroken run ended with {code}:\n{(folder / LOG).read_text()[-3000:]}")
    return time.monotonic() - started, seconds_to_write


def run_unbroken(arguments: Arguments, folder: Path, findings: Findings) -> Unbroken:
    first, second = folder / "unbroken", folder / "unbroken_again"
    # The faster one counts: what is slow by chance ends before most of the moments that it would give.
    seconds, seconds_to_write = min(run_alone(arguments, place, findings) for place in (first, second))
    files, again = digests(first), digests(second)
    assert files, "the command has written nothing"
    assert files.keys() == again.keys(), f"two unbroken runs leave other files: {files.keys() ^ again.keys()}"
    timed = sorted(name for name in files if files[name] != again[name])
    return Unbroken({name: files[name] for name in files.keys() - set(timed)}, timed, seconds, seconds_to_write)


def differences(unbroken: Unbroken, folder: Path) -> list[str]:
    """Names of files that are missing, left over, or of other bytes."""
    found = digests(folder)
    names = unbroken.files.keys() | set(unbroken.timed)
    other = [name for name, digest in unbroken.files.items() if found.get(name, digest) != digest]
    return sorted([*(names ^ found.keys()), *other])


def attack(arguments: Arguments, folder: Path, num_kills: int, draw: random.Random) -> dict[str, object]:
    findings = Findings()
    unbroken = run_unbroken(arguments, folder, findings)
    print(f"unbroken: {unbroken.seconds:.1f} s, {len(unbroken.files)} files", file=sys.stderr, flush=True)
    num_ends, attempt, num_kills_at_work = 0, 0, 0
    different: list[str] = []
    while findings.num_kills < num_kills or attempt:
        place = folder / f"killed_{num_ends}"
        place.mkdir(exist_ok=True)
        command = Command(arguments(place), place / LOG, findings)
        # Every fourth start of a folder is left alone, so that each comes to its end.
        may_kill = findings.num_kills < num_kills and attempt % 4 != 3
        since = unbroken.seconds_to_write if findings.num_kills % 2 else 0
        moment = draw.uniform(since, 1.05 * unbroken.seconds)
        was_killed = may_kill and command.kill_after(moment, draw)
        num_kills_at_work += was_killed and moment >= unbroken.seconds_to_write
        code, attempt = command.end(), attempt + 1
        log = (place / LOG).read_text(errors="replace")
        print(
            f"{place.name}, start {attempt}: exit code {code}, {findings.num_kills} kills", file=sys.stderr, flush=True
        )
        wrong = differences(unbroken, place)
        # A kill behind the last rename leaves a whole folder, which a conversion does not write again.
        was_done = code == 2 and attempt > 1 and not wrong
        if code == 0 or was_done:
            different += wrong
            num_ends, attempt = num_ends + 1, 0
            shutil.rmtree(place)
        elif not was_killed and code not in GOOD_EXITS:
            findings.wrong_exits.append(f"exit code {code}: {log[-600:]}")
            num_ends, attempt = num_ends + 1, 0
        if "Traceback" in log:
            findings.wrong_exits.append(f"a traceback: {log[-1500:]}")
    return asdict(findings) | {
        "outside_sockets": sorted(findings.outside_sockets),
        "unbroken_seconds": round(unbroken.seconds, 1),
        "seconds_to_write": round(unbroken.seconds_to_write, 1),
        "num_kills_at_work": num_kills_at_work,
        "num_ends": num_ends,
        "num_files_compared": len(unbroken.files),
        "not_compared": unbroken.timed,
        "different": different,
    }


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
            run_alone(table[needed], inputs / needed, Findings())
            shutil.move(inputs / needed / {"tokenize": "tokens", "pack": "packed"}[needed], inputs)
        fresh = Command(
            [*NEXTSTATE, "convert", "init", *MODEL, f"target={inputs}/fresh"], inputs / "init.txt", Findings()
        )
        assert fresh.end() == 0
        for kind in options.only or table:
            answer = attack(table[kind], folder / kind, options.kills, random.Random(f"{options.seed} {kind}"))
            answers[kind] = answer
            bad = ("num_orphans", "num_hangs", "different", "wrong_exits", "outside_sockets")
            is_good &= not any(answer[key] for key in bad)
            print(f"{kind}: {json.dumps(answer)}", file=sys.stderr, flush=True)
    print(json.dumps(answers, indent=1))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
