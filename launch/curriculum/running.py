"""Runs a curriculum on this machine: one entry after another, or those that do not need one another side by side."""

from __future__ import annotations

import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from launch.curriculum.entries import (
    SIGNALLED,
    Composed,
    Curriculum,
    CurriculumConfig,
    command_line,
    insisting,
    locked,
    measure,
    new_result,
    say,
    summary,
    supersede,
)
from launch.local.subprocesses import Supervised, signals_to
from model.errors import UserError

STOPPED = 3  # the exit code of what was asked to stop, and goes on when it is started again
PUBLISHES_AT_ONCE = ("convert",)  # their target is there whole or not at all, and one that is there they refuse


def run_curriculum(config: CurriculumConfig, composed: Composed | None = None) -> dict[str, Any]:
    """Runs what is not done. The answer's `exit_code` is that of the entry that stopped it, 0 when all are done."""
    with locked(Path(config.run_folder)):
        curriculum = Curriculum(config, composed)
        refuse_submitted(curriculum)
        run = LocalRun(curriculum)
        run.to_its_end()
        stopped = {"stopped_at": run.stopped_at, "exit_code": run.exit_code} if run.stopped_at else {}
        return {**summary(curriculum), "ran": run.ran, **stopped}


def refuse_submitted(curriculum: Curriculum) -> None:
    """Entries that Slurm may be running are not run here too."""
    names = [name for name in curriculum.order if curriculum.records[name].state == "submitted"]
    if names:
        raise UserError(
            "entries of this curriculum are jobs of a cluster",
            where=str(curriculum.folder),
            got=", ".join(names),
            fix="the same command with cluster=slurm; or nextstate curriculum cancel cluster=slurm",
        )


class LocalRun:
    """What waits, what runs, and what has run. Entries start in their order: none overtakes one that waits for room."""

    def __init__(self, curriculum: Curriculum):
        self.curriculum, self.config = curriculum, curriculum.config
        order = curriculum.order
        self.waiting = order[: order.index(self.config.until) + 1] if self.config.until else list(order)
        self.running: dict[str, Supervised] = {}
        self.ran: list[str] = []
        self.stopped_at, self.exit_code, self.signal = "", 0, 0
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._counted_at = 0.0

    def to_its_end(self) -> None:
        """Nothing starts behind an entry that failed or a signal; what runs then comes to its own end."""
        with signals_to(self.running.values(), self.note_signal):
            while True:
                self.start_ready()
                if not self.running:
                    break
                self.end(self._ended.get())
        if self.signal and self.waiting and not self.stopped_at:
            self.stopped_at, self.exit_code = self.ran[-1] if self.ran else self.waiting[0], STOPPED

    def note_signal(self, number: int) -> None:
        self.signal = number

    def label(self, name: str) -> str:
        order = self.curriculum.order
        return f"[{order.index(name) + 1}/{len(order)}] {name}"

    def start_ready(self) -> None:
        for name in list(self.waiting):
            needs = self.config.entries[name].needs
            if self.stopped_at or self.signal:
                return
            if any(needed in self.waiting or needed in self.running for needed in needs):
                continue
            if name not in self.config.force and self.curriculum.is_done(name):
                say(f"{self.label(name)}: up to date")
            elif not self.has_room(name):
                return
            else:
                self.start(name)
            self.waiting.remove(name)

    def has_room(self, name: str) -> bool:
        taken = sum(map(self.num_processes, self.running))
        return not taken or taken + self.num_processes(name) <= self.config.local_processes

    def num_processes(self, name: str) -> int:
        """Of a stage of training its ranks, of anything else one."""
        if self.config.entries[name].command != "train":
            return 1
        sizes = [call.parallel for call in self.curriculum.calls(name)]
        return max(one.tensor * one.pipeline * one.context * one.data for one in sizes)

    def start(self, name: str) -> None:
        """Runs it, unless it had published all of its outputs when it was cut off."""
        curriculum, label = self.curriculum, self.label(name)
        entry, record = self.config.entries[name], curriculum.records[name]
        refuse_running(curriculum, name)
        self.ran.append(name)
        fingerprint = curriculum.fingerprint(name)
        if has_published(curriculum, name):
            record.exit_code = self.conclude(name, 0)
            curriculum.save()
            say(f"{label}: done, it had published its outputs when it was cut off")
            return
        if fingerprint != record.fingerprint or name in self.config.force:
            supersede(curriculum.folder, name, entry.outputs)
            record.wall_seconds, record.overlap_seconds, record.peak_memory_bytes, record.beside_bytes = 0.0, 0.0, 0, 0
        # Of an attempt that was killed with this process no seconds were added, so none are counted for others.
        record.overlap_seconds = min(record.overlap_seconds, record.wall_seconds)
        record.fingerprint, record.arguments = fingerprint, command_line(entry, *insisting(self.config, entry))
        record.state, record.exit_code, record.started_at, record.outputs = "running", None, time.time(), {}
        say(f"{label}: starts")
        self.count()
        log = curriculum.folder / "logs" / f"{name}.log"
        one = Supervised(record.arguments, log, prefix=f"{name} | ", environment=self.environment())
        heard_meanwhile = self.signal  # when it was not yet among those that are told
        self.running[name] = one
        if heard_meanwhile:
            one.send_signal(heard_meanwhile)
        threading.Thread(target=self.wait_for, args=(name, one), daemon=True).start()
        record.process = [one.child.pid, psutil.Process(one.child.pid).create_time()]
        try:
            curriculum.save()
        except OSError as error:  # the entry runs, and may well end when there is space again
            say(f"{label}: the curriculum's state cannot be written: {error}")

    def environment(self) -> dict[str, str] | None:
        """Those that run side by side share the cores."""
        if self.config.local_processes == 1:
            return None
        cores = len(os.sched_getaffinity(0))
        return {"OMP_NUM_THREADS": str(max(1, cores // self.config.local_processes)), **os.environ}

    def wait_for(self, name: str, one: Supervised) -> None:
        one.child.wait()
        self._ended.put(name)

    def count(self) -> None:
        """What has passed since the last call, divided among those that ran, and the memory that they took together."""
        now, others = time.perf_counter(), len(self.running) - 1
        for name, one in self.running.items():
            record = self.curriculum.records[name]
            record.overlap_seconds += (now - self._counted_at) * others / len(self.running)
            beside = sum(other.peak_memory_bytes for other in self.running.values() if other is not one)
            record.beside_bytes = max(record.beside_bytes, beside)
        self._counted_at = now

    def end(self, name: str) -> None:
        """Records an entry whose process is gone."""
        self.count()
        record, outcome = self.curriculum.records[name], self.running.pop(name).finish()
        record.process, record.exit_code = [], outcome.exit_code
        record.wall_seconds += outcome.wall_seconds
        record.peak_memory_bytes = max(record.peak_memory_bytes, outcome.peak_memory_bytes)
        exit_code = self.conclude(name, outcome.exit_code)
        self.curriculum.save()
        memory = f"{record.peak_memory_bytes / 2**30:.2f} GiB"
        log = self.curriculum.folder / "logs" / f"{name}.log"
        ending = "done" if exit_code == 0 else f"{record.state} with exit code {outcome.exit_code}, log {log}"
        say(f"{self.label(name)}: {ending} ({outcome.wall_seconds:.0f} s, {memory})")

    def conclude(self, name: str, exit_code: int) -> int:
        """Records what an entry has written, and how it ended. Returns its exit code, 1 where an output is missing."""
        curriculum, record = self.curriculum, self.curriculum.records[name]
        outputs = self.config.entries[name].outputs
        record.outputs = {output: list(measure(curriculum.folder / output)) for output in outputs}
        if exit_code == 0 and not curriculum.outputs_present(name):
            missing = [output for output, (files, _) in record.outputs.items() if files == 0]
            say(f"{self.label(name)}: ended well but did not write {', '.join(missing)}")
            exit_code = 1
        record.state = {0: "done", STOPPED: "stopped"}.get(exit_code, "failed")
        if exit_code == 0:
            record.result = new_result(record.fingerprint)
        elif not self.stopped_at:
            self.stopped_at, self.exit_code = name, exit_code
        return exit_code


def refuse_running(curriculum: Curriculum, name: str) -> None:
    if curriculum.state(name) == "running":
        process = int(curriculum.records[name].process[0])
        raise UserError(f"{name} is still running", got=f"process {process}", fix="wait for it or end it")


def has_published(curriculum: Curriculum, name: str) -> bool:
    """An entry that was cut off when its outputs were whole: a command that publishes at once would refuse them now."""
    entry, record = curriculum.config.entries[name], curriculum.records[name]
    was_cut_off = record.state == "running" or (record.exit_code or 0) > SIGNALLED
    return (
        was_cut_off
        and entry.command in PUBLISHES_AT_ONCE
        and not entry.each
        and name not in curriculum.config.force
        and record.fingerprint == curriculum.fingerprint(name)
        and curriculum.outputs_present(name)
    )
