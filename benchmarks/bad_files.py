"""Every file and folder that a command is given, spoilt in many ways: one message and exit code 2, or an answer.

    python -m benchmarks.bad_files
    python -m benchmarks.bad_files --only score generate --cases 200

Real inputs are made once, at toy size. For each command each of its files is made unreadable, a folder, a link that leads
nowhere or to itself, empty, or other bytes, and each of its folders closed or a file; folders to write are closed or
files. The command then runs in a forked process that obeys permissions. A traceback, a signal, another exit code or no
end within a minute is a failure. Prints one JSON object. Run it as any user.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.kills import MODEL, make_inputs
from launch.command_line import cli

CAPABILITY_VERSION_3, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 1, 1 << 2
PATIENCE_SECONDS = 60.0
GOOD_EXITS = (0, 2, 3)
SMALL_IBQ = [
    "ch=8",
    "ch_mult=[1,1,1,1]",
    "num_res_blocks=1",
    "z_channels=8",
    "embed_dim=8",
    "n_embed=64",
    "norm_groups=4",
]


@dataclass(frozen=True)
class Case:
    """A command by its arguments, the files and folders that it reads, and those that it writes to."""

    arguments: list[str]
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)


def unreadable(path: Path) -> None:
    path.chmod(0)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lost_link(path: Path) -> None:
    remove(path)
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    remove(path)
    path.symlink_to(path.name)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(max(64, path.stat().st_size)))


def deep(path: Path) -> None:
    path.write_bytes(b"[" * 200_000)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_json(path: Path) -> None:
    path.write_bytes(b'{"a": [1e999, null, {"b": "\\u001b[2J\\u0000"}], "version": {}, "model": 7, "keys": []}')


def a_list(path: Path) -> None:
    path.write_bytes(b"[]")


def a_file(path: Path) -> None:
    remove(path)
    path.write_bytes(b"x")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def read_only(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for each in (path, *path.rglob("*")):
        each.chmod(0o555 if each.is_dir() else 0o444)


ON_FILES = (unreadable, a_folder, lost_link, circle, empty, noise, deep, cut, other_json, a_list, remove)
ON_FOLDERS = (unreadable, lost_link, circle, a_file, remove)
ON_TARGETS = (read_only, a_file, lost_link, circle)
Spoil = Callable[[Path], None]


def picture_shard(path: Path) -> None:
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as shard:
        for number in range(12):
            stream = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(stream, "PNG")
            for name, data in ((f"{number}.png", stream.getvalue()), (f"{number}.txt", b"noise")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))


TOKENIZERS = ["text_tokenizer=text_tokenizer", "vision_tokenizer=run/vision_tokenizer"]
CHECKPOINT = ["checkpoint=run/sft", "text_tokenizer=text_tokenizer", "vision_tokenizer=run/vision_tokenizer"]
MODELS = ["run/sft", "text_tokenizer", "run/vision_tokenizer"]
QUIET = ["logging.wandb_mode=disabled", "preflight=false"]
SHORT = ["stage.optimizer.warmup_steps=0"]
VISION = ["train", "stage=toy_vision_tokenizer", "run_folder=run", "stage.steps=2", *QUIET, *SHORT]
VISION += [f"stage.objective.model.{value}" for value in SMALL_IBQ]
VISION += ["stage.objective.continuous_steps=1", "stage.objective.restart_codes_every_steps=0"]
VISION += ["stage.objective.min_codebook_use=0"]
VISION += ["stage.objective.data.num_held_back=2", "+stage.objective.data.corpora.pictures.path='pictures/*.tar'"]
DEMO_CORPORA = ("shapes_image_text", "shapes_edit", "shapes_video", "real_photos", "real_video")
VISION += [f"~stage.objective.data.corpora.{name}" for name in DEMO_CORPORA]
STREAMED = [*VISION, "stage.objective.data.streaming=true", "run_folder=streamed"]
TRAIN = [
    "train",
    "stage=toy_sft",
    *MODEL,
    "run_folder=run",
    "stage.steps=2",
    "stage.sequence_length=256",
    *QUIET,
    *SHORT,
]
TRAIN += ["parallel.data=1", "stage.initialize_from=null", "stage.data.datasets.all.path=packed"]
SMALL = ["sampling.max_new_tokens=8", "image_size=16"]
REWARD = "signals.rule.path=rule_aesthetic"


def making() -> dict[str, Case]:
    """Tokenizers, data and training."""
    return {
        "text_tokenizer": Case(
            ["train", "stage=toy_text_tokenizer", "run_folder=run", "stage.objective.size=400", *QUIET]
            + ["stage.objective.template_copies=1", "stage.objective.corpora=['raw/*.tar']"],
            ["raw"],
            ["run/text_tokenizer"],
        ),
        "vision_tokenizer": Case(VISION, ["pictures"], ["run/vision_tokenizer"]),
        "streamed": Case(STREAMED, ["pictures"], ["streamed/vision_tokenizer"]),
        "tokenize": Case(
            [
                "tokenize",
                "input=raw/*.tar",
                "target=tokens",
                "text_tokenizer=text_tokenizer",
                "vocabulary.visual_size=64",
            ],
            ["raw", "text_tokenizer"],
            ["tokens"],
        ),
        "tokenize_pictures": Case(
            ["tokenize", "input=pictures/*.tar", "target=picture_tokens", *TOKENIZERS],
            ["pictures", "text_tokenizer", "run/vision_tokenizer"],
            ["picture_tokens"],
        ),
        "status": Case(["tokenize", "status", "input=raw/*.tar", "target=tokens"], ["raw", "tokens"]),
        "pack": Case(
            ["pack", "tokens.text=tokens", "target=packed", "sequence_length=256", "window_rows=64"],
            ["tokens"],
            ["packed"],
        ),
        "train": Case(TRAIN, ["packed"], ["run/sft"]),
        "resume": Case([*TRAIN, "stage.steps=3"], ["run/sft", "packed"], ["run/sft"]),
        "initialize_from": Case(
            [*TRAIN, "stage.name=next", "stage.initialize_from=run/sft"], ["run/sft"], ["run/next"]
        ),
    }


def passing_on() -> dict[str, Case]:
    """Conversions, answers and scores."""
    return {
        "init": Case(["convert", "init", *MODEL, "target=fresh"], [], ["fresh"]),
        "to_hf": Case(
            ["convert", "to_hf", "source=run/sft", "target=hf", "layout=emu35", "text_tokenizer=text_tokenizer"],
            ["run/sft", "text_tokenizer"],
            ["hf"],
        ),
        "from_hf": Case(["convert", "from_hf", "source=hf", "target=back"], ["hf"], ["back"]),
        "reshard": Case(["convert", "reshard", "source=run/sft", "target=two", "tensor=2"], ["run/sft"], ["two"]),
        "generate": Case(
            ["generate", *CHECKPOINT, *SMALL, "prompts_file=prompts.jsonl", "format=x2i", "out=generated"],
            [*MODELS, "prompts.jsonl", "scene.png"],
            ["generated"],
        ),
        "distill": Case(
            ["distill", *CHECKPOINT, "target=distilled", "prompts.t2i.options.path=asks.jsonl"]
            + ["prompts.t2i.path=file", "sampling.max_new_tokens=8"],
            [*MODELS, "asks.jsonl", "scene.png"],
            ["distilled"],
        ),
        "evaluate": Case(
            ["evaluate", *CHECKPOINT, "out=evaluation/final.json", "sampling.max_new_tokens=8"]
            + ["tasks.t.path=examples.shapes_world.tasks.T2IAccuracy", "tasks.t.num_prompts=2", "num_samples=1"],
            MODELS,
            ["evaluation"],
        ),
        "score": Case(
            ["score", "checkpoint=run/sft", "tokens=tokens.npy", "out=scores/scores.npy"],
            ["run/sft", "tokens.npy"],
            ["scores"],
        ),
        "score_folder": Case(["score", "checkpoint=run/sft", "tokens=tokens", "out=scores/scores.npy"], ["tokens"]),
        "score_text": Case(
            ["score", "checkpoint=run/sft", "text_file=texts.txt", "text_tokenizer=text_tokenizer"],
            ["texts.txt", "text_tokenizer"],
        ),
    }


def looking() -> dict[str, Case]:
    """Reports, descriptions, chats, rewards, services and plans."""
    return {
        "report": Case(["report", "run_folder=run"], ["run"], ["run"]),
        "inspect_shard": Case(["inspect", "raw/000000.tar"], ["raw/000000.tar"]),
        "inspect_tokens": Case(["inspect", "tokens", "text_tokenizer=text_tokenizer"], ["tokens", "text_tokenizer"]),
        "inspect_packed": Case(["inspect", "packed"], ["packed"]),
        "inspect_overlap": Case(
            ["inspect", "packed", "text_tokenizer=text_tokenizer", "overlap=texts.txt"], ["texts.txt"]
        ),
        "inspect_page": Case(
            ["inspect", "packed", "text_tokenizer=text_tokenizer", "page=pages/rows.html"], ["packed"], ["pages"]
        ),
        "pack_removed": Case(
            ["pack", "tokens.text=tokens", "target=packed_removed", "sequence_length=256", "window_rows=64"]
            + ["removed=removed.jsonl"],
            ["removed.jsonl"],
            ["packed_removed"],
        ),
        "inspect_checkpoint": Case(["inspect", "checkpoint=run/sft"], ["run/sft"]),
        "inspect_published": Case(["inspect", "checkpoint=hf"], ["hf"]),
        "chats": Case(
            ["chats", "input=chats.jsonl", "target=chats", "media=media"], ["chats.jsonl", "media"], ["chats"]
        ),
        "calibrate": Case(
            ["rewards", "calibrate", "answers=answers.jsonl", "out=scales/scales.json", REWARD],
            ["answers.jsonl"],
            ["scales"],
        ),
        "rewards_score": Case(
            ["rewards", "score", "answers=answers.jsonl", "out=scales/scores.jsonl", REWARD],
            ["answers.jsonl"],
            ["scales"],
        ),
        "rewards_serve": Case(
            ["rewards", "serve", REWARD, "token_file=token", "address=served/address.json"], ["token"]
        ),
        "serve": Case(["serve", *CHECKPOINT, "port=0", "token_file=token"], [*MODELS, "token"]),
        "plan": Case(["plan", *TRAIN[1:], "cluster=h100"], ["packed"]),
        "curriculum": Case(
            ["curriculum", "curriculum=kills", "config_folder=conf", "run_folder=chain", "dry_run=true"],
            ["conf", "raw"],
            ["chain"],
        ),
        "doctor": Case(["doctor", "run_folder=doctored", "collective_seconds=0"], [], ["doctored"]),
    }


def cases() -> dict[str, Case]:
    """By name, in an order in which each one's inputs are made by those before it."""
    return making() | passing_on() | looking()


ENDLESS = ("serve", "rewards_serve")  # they do not end when all is well


def make_world(folder: Path, table: dict[str, Case]) -> None:
    """All inputs, by the commands themselves."""
    from benchmarks.kills import kinds
    from training.rewards.base import Answer
    from training.rewards.wire import encoded

    make_inputs(folder)
    for shard in sorted((folder / "raw").glob("*.tar"))[2:]:
        shard.unlink()
    kinds(folder)  # conf/curriculum/kills.yaml
    (folder / "pictures").mkdir()
    picture_shard(folder / "pictures" / "000000.tar")
    Image.fromarray(np.full((48, 48, 3), 99, np.uint8)).save(folder / "scene.png")
    (folder / "media").mkdir()
    shutil.copy(folder / "scene.png", folder / "media" / "a.png")
    (folder / "prompts.jsonl").write_text('{"text": "make it blue", "images": ["scene.png"]}\n')
    ask = {"text": "make it blue", "format": "x2i", "images": ["scene.png"], "image_size": [16, 16]}
    (folder / "asks.jsonl").write_text(json.dumps(ask) + "\n")
    (folder / "removed.jsonl").write_text('{"document": 123}\n')
    turns = '{"messages": [{"role": "user", "content": "what is <image>"}, {"role": "assistant", "content": "grey"}], '
    (folder / "chats.jsonl").write_text(turns + '"images": ["a.png"]}\n')
    (folder / "texts.txt").write_text("one two\nthree\n")
    (folder / "token").write_text("0123456789abcdef0123\n")
    draw = np.random.default_rng(0)
    answers = [
        Answer("t2i", "a", [], [draw.integers(0, 40 * n + 9, (64, 64, 3), np.uint8)], "x", True, {}) for n in range(6)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(encoded(one)) + "\n" for one in answers))
    np.save(folder / "tokens.npy", np.arange(24, dtype=np.int64).reshape(2, 12))
    for name in ("scores", "scales", "pages"):
        (folder / name).mkdir()
    for name, case in table.items():
        if name in ENDLESS:
            continue
        print(f"making: {name}", file=sys.stderr, flush=True)
        code, log = in_a_child(folder, case.arguments, as_root=True)
        if code != 0:
            raise SystemExit(f"{name} does not run on sound files: {code}\n{log}")


def in_a_child(folder: Path, arguments: list[str], *, as_root: bool = False) -> tuple[int | str, str]:
    """Exit code (or what else became of it) and what it printed."""
    log = folder.parent / f"{folder.name}.log"
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException):
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
            os.chdir(folder)
            if not as_root:
                obey_permissions()
            try:
                code = cli.main(arguments)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (code if code >= 0 else f"signal {-code}"), log.read_text(errors="replace")
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "no end", log.read_text(errors="replace")


def obey_permissions() -> None:
    """Root goes past permissions by two capabilities; without them they hold for its own files as for anybody's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for number in (0, 1):  # effective, permitted
        sets[number] &= ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def spoilings(world: Path, case: Case) -> list[tuple[str, Spoil]]:
    found: list[tuple[str, Spoil]] = []
    for name in case.reads:
        for path in (world / name, *sorted((world / name).rglob("*"))):
            table = ON_FOLDERS if path.is_dir() else ON_FILES
            found += [(str(path.relative_to(world)), spoil) for spoil in table]
    for name in case.writes:
        found += [(name, spoil) for spoil in ON_TARGETS] + [(str(Path(name).parent), read_only)]
    return found


def attack(world: Path, place: Path, name: str, case: Case, path: str, spoil: Spoil) -> tuple[int | str, str]:
    shutil.copytree(world, place, symlinks=True)
    for target in case.writes:
        if target not in case.reads and not any(one.startswith(target) for one in case.reads) and target != "run":
            if (place / target).exists():
                remove(place / target)
            (place / target).parent.mkdir(parents=True, exist_ok=True)
    victim = place / path
    if not victim.exists() and spoil is not read_only:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_bytes(b"x")
    spoil(victim)
    try:
        return in_a_child(place, case.arguments)
    finally:
        shutil.rmtree(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=0, help="of each command, drawn; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of commands")
    parser.add_argument("--world", type=Path, help="keep the inputs here, and take them from here next time")
    options = parser.parse_args()
    import_all()
    table, outcomes, failures = cases(), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="nextstate-bad-") as name:
        Path(name).chmod(0o755)
        world = options.world or Path(name) / "world"
        if not world.exists():
            world.mkdir(parents=True)
            make_world(world, table)
        for kind, case in table.items():
            if options.only and kind not in options.only:
                continue
            found = spoilings(world, case)
            if options.cases and len(found) > options.cases:
                found = random.Random(f"{options.seed} {kind}").sample(found, options.cases)
            for path, spoil in found:
                code, log = attack(world, Path(name) / "place", kind, case, path, spoil)
                outcomes[f"{kind}: {code}"] += 1
                print(kind, path, spoil.__name__, code, file=sys.stderr, flush=True)
                is_endless = kind in ENDLESS and code == "no end"
                if "Traceback" in log or (code not in GOOD_EXITS and not is_endless):
                    failures.append(f"{kind}, {path}, {spoil.__name__}: {code}: ...{log[-1500:]}")
                    print(failures[-1], file=sys.stderr, flush=True)
    print(json.dumps({"cases": outcomes.total(), "outcomes": outcomes, "failures": len(failures)}, indent=1))
    return 1 if failures else 0


def import_all() -> None:
    """Once, before the forks."""
    import data_pipeline.tokenize  # noqa: F401
    import launch.conversion.conversion  # noqa: F401
    import training.engines.megatron.engine
    import training.inference.scorer
    import training.stage  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
