"""A curriculum: entries in the order of their needs, each skipped while nothing it depends on has changed.

The state lives in `<run folder>/curriculum.json`, published by rename after every change; there is no daemon, and
the same command may be run again at any time. An entry's fingerprint covers its resolved configuration (that of the
`nextstate` command it calls included) and the results of the entries it needs. Outputs of an earlier configuration
are moved to `<run folder>/superseded`, so that no command mistakes them for its own beginnings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from launch.cluster.job_folders import JobFolder
from launch.cluster.profile import ClusterConfig
from launch.command_line.calls import CALL
from launch.composition.folders import override_of
from launch.composition.written_text import in_quotes
from launch.report.progress import entry_progress, last_words
from model.durable import fingerprint_of, lock, read_json_object, replace_file
from model.errors import Problems, UserError
from model.registry import nearest_name

SIGNALLED = 128  # exit codes above it are those of processes that a signal ended
STATE_NAME = "curriculum.json"  # in the run folder
STATE_VERSION = 1
Composed = dict[str, list[Any]]  # OmegaConf's trees of the calls, by entry
ACTIONS = ("run", "status", "cancel", "resume", "logs")


@dataclass
class EntryConfig:
    """One step of a curriculum: a nextstate command, or a Python module run as `python -m`."""

    command: str = ""  # a nextstate command; exclusive with module
    module: str = ""  # a module with its own command line
    overrides: list[str] = field(default_factory=list)  # or the arguments of the module
    each: dict[str, list[str]] = field(default_factory=dict)  # call the command once for each name
    # in one process, with these overrides added
    needs: list[str] = field(default_factory=list)  # entries that come first; their results count as inputs
    outputs: list[str] = field(default_factory=list)  # files or folders below run_folder that exist afterwards
    shares: int = 1  # on Slurm: a job array, each task doing its share of the input shards
    parallel_calls: bool = False  # on Slurm: a job array, a task for each of `each`
    accelerators: int = 0  # on Slurm: of a job that is not training


@dataclass
class CurriculumConfig:
    """An ordered set of entries and the folder they work in."""

    action: str = "run"  # run | status | cancel | resume | logs
    name: str = "curriculum"  # of the curriculum; jobs are named after it
    run_folder: str = "runs/${name}"  # entries write below it
    entries: dict[str, EntryConfig] = field(default_factory=dict)  # by name, each a command or a module
    set: dict[str, Any] = field(default_factory=dict)  # by entry: keys of its command, which win over its overrides
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # kind=slurm: entries become jobs
    local_processes: int = 1  # on this machine: entries run side by side up to so many (a stage has one a rank)
    until: str | None = None  # stop after this entry
    force: list[str] = field(default_factory=list)  # entries to run again although nothing has changed
    dry_run: bool = False  # show what would run, where and how long, run nothing
    scripts: bool = False  # in a dry run: the batch scripts too
    preflight: bool = True  # refuse before the first entry what the plan says cannot work; false: start it all the same
    entry: str | None = None  # whose log is shown; null: of all
    num_lines: int = 20  # of each log
    config_folder: str | None = None  # your own configs, for the entries too; left out: conf/ of the working folder
    json: bool = False  # print one JSON object on stdout at the end

    def __post_init__(self) -> None:
        """An entry's command looks for configurations where this one does, and takes what is set for it."""
        if self.config_folder is not None:
            own = override_of(self.config_folder)
            for entry in self.entries.values():
                if entry.command and own not in entry.overrides:
                    entry.overrides = [own, *entry.overrides]
        for name, values in self.set.items():
            if name in self.entries and isinstance(values, dict):
                entry = self.entries[name]
                entry.overrides = [*entry.overrides, *(o for o in overrides_of(values) if o not in entry.overrides)]

    def validate(self) -> None:
        problems = Problems()
        problems.check(
            self.action in ACTIONS, "action", f"unknown action {self.action!r}", f"action={'|'.join(ACTIONS)}"
        )
        self.cluster.validate(problems)
        problems.check(self.num_lines > 0, "num_lines", "must be positive", "num_lines=20")
        problems.check(self.local_processes > 0, "local_processes", "must be positive", "local_processes=1")
        for name, entry in self.entries.items():
            key = f"entries.{name}"
            problems.check(bool(entry.command) != bool(entry.module), key, "needs exactly one of command and module")
            problems.check(not entry.each or bool(entry.command), f"{key}.each", "needs a command")
            self._validate_array(problems, key, entry)
            problems.check(
                name.isprintable() and "/" not in name and not name.startswith("."), key, f"{name!r} cannot name a log"
            )
            problems.check(
                bool(entry.outputs), key, "names no outputs: it could never be skipped", f"{key}.outputs=[...]"
            )
            for output in entry.outputs:
                inside = not Path(output).is_absolute() and ".." not in Path(output).parts
                problems.check(inside, key, f"the output {output!r} is not below run_folder")
            for needed in entry.needs:
                problems.check(needed in self.entries, key, f"needs {needed!r}, which is no entry")
        for name, values in self.set.items():
            takes_keys = name in self.entries and bool(self.entries[name].command)
            problems.check(takes_keys, f"set.{name}", "is no entry with a command", ", ".join(self.entries))
            problems.check(isinstance(values, dict), f"set.{name}", "names no key", f"set.{name}.stage.steps=100")
        for name in [*self.force, *filter(None, (self.until, self.entry))]:
            meant = nearest_name(name, list(self.entries)) or ", ".join(self.entries)
            problems.check(name in self.entries, "until, force, entry", f"{name!r} is no entry", meant)
        problems.raise_if_any()

    def _validate_array(self, problems: Problems, key: str, entry: EntryConfig) -> None:
        problems.check(entry.accelerators >= 0, f"{key}.accelerators", "must not be negative")
        problems.check(entry.shares > 0, f"{key}.shares", "must be positive", f"{key}.shares=1")
        problems.check(
            entry.shares == 1 or (entry.command == "tokenize" and not entry.parallel_calls),
            f"{key}.shares",
            "is for tokenize, and exclusive with parallel_calls",
            f"{key}.shares=1",
        )
        problems.check(not entry.parallel_calls or bool(entry.each), f"{key}.parallel_calls", "needs each")


def overrides_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The same values on a command line: `{"stage": {"steps": 7}}` is `stage.steps=7`."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += overrides_of(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={value_text(value)}")
    return found


def value_text(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return in_quotes(value)
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    return json.dumps(value)


@dataclass
class Record:
    """What is known of one entry; a member of curriculum.json."""

    state: str = "pending"  # pending | running | submitted (ask Slurm) | done | failed | stopped |
    # cancelled | vanished
    fingerprint: str = ""  # of what ran last
    result: str = ""  # changes with every completed run; what dependants build on
    outputs: dict[str, list[int]] = field(default_factory=dict)  # path -> [number of files, bytes]
    arguments: list[str] = field(default_factory=list)
    started_at: float = 0.0  # seconds since the epoch
    wall_seconds: float = 0.0  # summed over interrupted attempts
    overlap_seconds: float = 0.0  # of them counted for entries beside it: what is left adds up to the time that passed
    peak_memory_bytes: int = 0  # resident memory of the whole process tree, sampled
    beside_bytes: int = 0  # in entries beside it, at most
    exit_code: int | None = None
    process: list[float] = field(default_factory=list)  # [pid, its creation time] while running


class Curriculum:
    """The entries in order of their needs, and their records on disk."""

    def __init__(self, config: CurriculumConfig, composed: Composed | None = None):
        self.config = config
        self.folder = Path(config.run_folder)
        self.state_path = self.folder / STATE_NAME
        self.order = ordered(config.entries)
        self.composed: Composed = composed or {}
        self.records = self._read()

    def _read(self) -> dict[str, Record]:
        records = {name: Record() for name in self.order}
        if not self.state_path.exists():
            return records
        damaged = "the curriculum's state cannot be read"
        fix = "move the file away: entries run again, and each finds what it had finished"
        try:
            stored = read_json_object(self.state_path, damaged=damaged, fix=fix)
            known = {name: Record(**value) for name, value in stored["entries"].items()}
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(damaged, where=str(self.state_path), got=str(error), fix=fix) from error
        return {**known, **{name: known.get(name, record) for name, record in records.items()}}

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        active = [self.records[name] for name in self.order]
        state = {
            "format_version": STATE_VERSION,
            "name": self.config.name,
            "wall_seconds": sum(record.wall_seconds - record.overlap_seconds for record in active),
            "peak_memory_bytes": max((record.peak_memory_bytes + record.beside_bytes for record in active), default=0),
            "entries": {name: asdict(record) for name, record in self.records.items()},
        }
        replace_file(self.state_path, json.dumps(state, indent=1))

    def fingerprint(self, name: str) -> str:
        """Of everything that decides what the entry produces."""
        from omegaconf import OmegaConf

        entry = self.config.entries[name]
        return fingerprint_of(
            {
                "entry": [entry.command, entry.module, entry.overrides, entry.outputs],
                "configs": [OmegaConf.to_container(call) for call in self.calls(name)],
                "needs": {needed: self.records[needed].result for needed in entry.needs},
            }
        )

    def calls(self, name: str) -> list[Any]:
        """The composed configurations of an entry's calls."""
        if name not in self.composed:
            self.composed[name] = resolved_calls(self.config.entries[name])
        return self.composed[name]

    def is_done(self, name: str) -> bool:
        record = self.records[name]
        return record.state == "done" and record.fingerprint == self.fingerprint(name) and self.outputs_present(name)

    def outputs_present(self, name: str) -> bool:
        """Every output is there and has lost neither files nor bytes since the entry finished."""
        recorded = self.records[name].outputs
        for output in self.config.entries[name].outputs:
            num_files, num_bytes = measure(self.folder / output)
            before = recorded.get(output, [1, 0])
            if num_files < max(1, before[0]) or num_bytes < before[1]:
                return False
        return True

    def state(self, name: str) -> str:
        """The state shown to people: a recorded one, or `interrupted` or `changed` where the record is out of date."""
        record = self.records[name]
        if record.state == "running" and not alive(record.process):
            return "interrupted"
        if record.state == "done" and not self.is_done(name):
            return "changed"
        return record.state


def ordered(entries: dict[str, EntryConfig]) -> list[str]:
    """Entries after everything they need; otherwise as written."""
    order: list[str] = []
    waiting = list(entries)
    while waiting:
        ready = next((name for name in waiting if all(needed in order for needed in entries[name].needs)), None)
        if ready is None:
            raise UserError("the entries of the curriculum need each other in a circle", got=", ".join(waiting))
        waiting.remove(ready)
        order.append(ready)
    return order


def resolved_calls(entry: EntryConfig) -> list[Any]:
    """The composed configuration of each call, so that an edited preset counts as a change."""
    if not entry.command:
        return []
    from launch.composition.compose import compose_tree

    calls = [entry.overrides + own for own in entry.each.values()] or [entry.overrides]
    return [compose_tree(entry.command, call) for call in calls]


def measure(path: Path) -> tuple[int, int]:
    """(number of files, bytes) of a file or a folder; (0, 0) when there is none."""
    if path.is_file():
        return 1, path.stat().st_size
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return len(sizes), sum(sizes)


def alive(process: list[float]) -> bool:
    """True while the recorded process runs; a process id used again by another process does not count."""
    if not process:
        return False
    try:
        found = psutil.Process(int(process[0]))
        is_same = abs(found.create_time() - process[1]) < 1.0
        return is_same and found.status() != psutil.STATUS_ZOMBIE  # ended, but its parent never asked
    except psutil.Error:
        return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One curriculum at a time in a folder. The kernel frees the lock when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = "another curriculum is running in this folder"
    with lock(folder / ".curriculum.lock", taken, fix="wait for it, end it, or choose another run_folder"):
        yield


def due(curriculum: Curriculum) -> list[str]:
    """The entries that a run would start, if nothing that they need came out differently."""
    config, order = curriculum.config, curriculum.order
    last = order.index(config.until) + 1 if config.until else len(order)
    return [name for name in order[:last] if name in config.force or not curriculum.is_done(name)]


def say(message: str) -> None:
    """One line for the person at the terminal, which may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def new_result(fingerprint: str) -> str:
    """Names what a run of an entry has made; never the same twice."""
    return hashlib.blake2b(f"{fingerprint}/{time.time_ns()}".encode(), digest_size=16).hexdigest()


def command_line(entry: EntryConfig, *overrides: str) -> list[str]:
    return [sys.executable, "-m", *module_call(replace(entry, overrides=[*entry.overrides, *overrides]))]


def insisting(config: CurriculumConfig, entry: EntryConfig) -> list[str]:
    """`preflight=false` of the curriculum, for its stages; not part of what an entry is."""
    return ["preflight=false"] if entry.command == "train" and not config.preflight else []


def module_call(entry: EntryConfig) -> list[str]:
    """The module that runs the entry, and its arguments."""
    if entry.module:
        return [entry.module, *entry.overrides]
    if not entry.each:
        return ["launch.command_line.cli", entry.command, *entry.overrides]
    calls = [text for own in entry.each.values() for text in (CALL, *own)]
    return ["launch.command_line.calls", entry.command, *entry.overrides, *calls]


def supersede(folder: Path, name: str, outputs: list[str]) -> None:
    """Moves outputs of another configuration aside; one older generation of each entry is kept."""
    present = [output for output in outputs if (folder / output).exists()]
    if not present:
        return
    aside = folder / "superseded" / name
    shutil.rmtree(aside, ignore_errors=True)
    for output in present:
        target = aside / output
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / output).rename(target)
    say(f"{name}: earlier outputs moved to {aside}")


def summary(curriculum: Curriculum) -> dict[str, Any]:
    """One item an entry, in order; what `nextstate curriculum status json=true` answers."""
    entries = [
        {"name": name, "state": curriculum.state(name)} | figures(curriculum, name) | {"job_ids": [], "restarts": 0}
        for name in curriculum.order
    ]
    return {"name": curriculum.config.name, "run_folder": str(curriculum.folder), "entries": entries}


def figures(curriculum: Curriculum, name: str) -> dict[str, Any]:
    """What the record and the files of an entry say of it; `last_words` of its log where it has not ended well."""
    record, entry, folder = curriculum.records[name], curriculum.config.entries[name], curriculum.folder
    seconds = record.wall_seconds
    if record.state == "running" and alive(record.process):
        seconds += max(0.0, time.time() - record.started_at)
    found = {
        "wall_seconds": round(seconds, 1),
        "peak_memory_bytes": record.peak_memory_bytes,
        "exit_code": record.exit_code,
        "last_words": "" if record.state in ("pending", "done") else last_words(logs_of(folder, name)),
    }
    outputs = [folder / output for output in entry.outputs]
    return found | entry_progress(entry.command, given_values(entry), outputs)


def logs_of(folder: Path, name: str) -> list[Path]:
    """What an entry printed, here and as a job; those that are there."""
    return [path for path in (folder / "logs" / f"{name}.log", *JobFolder(folder, name).logs()) if path.exists()]


def given_values(entry: EntryConfig) -> list[dict[str, Any]]:
    """What the command line of each call says, by key; presets are not looked into."""
    if not entry.command:
        return []
    from launch.composition.compose import parse_override

    calls = [entry.overrides + own for own in entry.each.values()] or [entry.overrides]
    return [{one.key_or_group: one.value() for one in map(parse_override, call)} for call in calls]
