"""Many answers, one model: a bounded queue, and a thread that takes turns.

Answers that wait for the same kind of turn (same grammar, grid, sampling and seed) take it in one batch; behind every
picture an answer goes to the end of the queue, so that a long rollout never keeps others waiting for longer than one
picture, and whoever arrives joins the next batch of its kind.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.generation.counters import Counters
from model.errors import UserError
from model.generation.settings import SamplingConfig
from training.inference.answering import Answering, begin, begin_rollouts, take_turn
from training.inference.model import InferenceModel
from training.inference.observing import Event, Refined, Rows, TextPiece
from training.inference.prompts import Prompt

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many answers are waiting as may wait."""


class NobodyWaitsError(Exception):
    """All who asked for the answers of a batch are gone."""


@dataclass(frozen=True)
class Preview:
    """A picture that is not finished, uint8 [h, W, 3]: its first rows, or all of it while it is refined."""

    pixels: np.ndarray
    number: int  # of the preview, within its picture
    event: Rows | Refined

    def fields(self) -> dict[str, Any]:
        """How far it is."""
        if isinstance(self.event, Rows):
            return {"rows": len(self.event.codes), "grid": list(self.event.grid)}
        return {"step": self.event.step, "steps": self.event.num_steps}


@dataclass(frozen=True)
class Finished:
    """A whole picture: uint8 [H, W, 3] and its codes."""

    pixels: np.ndarray
    codes: np.ndarray


Told = TextPiece | Preview | Finished | Answering | Exception


@dataclass(eq=False)
class Job:
    """One answer asked for. `tell` is called from the model's thread; an `Answering` or an exception comes last."""

    prompt: Prompt
    sampling: SamplingConfig
    seed: int
    draw: int
    tell: Callable[[Told], None]
    num_states: int = 0  # of a world rollout; 0: none
    script: Sequence[str] = ()
    num_previews: int = 0  # of each picture
    is_gone: bool = False  # nobody waits for it any more: set from any thread
    answering: Answering | None = None


class Scheduler:
    """Owns the model: no other thread touches it after `start`."""

    def __init__(self, model: InferenceModel, max_waiting: int, counters: Counters) -> None:
        self.model, self.max_waiting, self.counters = model, max_waiting, counters
        self._condition = threading.Condition()
        self._arrived: list[Job] = []
        self._active: list[Job] = []  # of the model's thread; in the order of their turns
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        counters.waiting.set_function(lambda: self.num_waiting)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for the turn that is under way; answers that are not over are dropped."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        for job in [*self._active, *self._arrived]:
            job.is_gone = True
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Answers that are not over, those under way included."""
        return sum(not job.is_gone for job in [*self._arrived, *self._active])

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them, or `QueueFullError`."""
        with self._condition:
            if self.num_waiting + len(jobs) > self.max_waiting:
                raise QueueFullError
            self._arrived += jobs
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._arrived or self._active or self._is_closing):
                    self._condition.wait()
                if self._is_closing:
                    return
                arrived = self._arrived
                self._active += arrived
                self._arrived = []
            for job in arrived:
                if not job.is_gone:
                    self._begin(job)
            self._active = [job for job in self._active if not job.is_gone]
            if self._active:
                self._turn()

    def _begin(self, job: Job) -> None:
        try:
            if job.num_states:
                found = begin_rollouts(
                    self.model, [job.prompt], job.sampling, [job.draw], job.num_states, list(job.script)
                )
            else:
                found = begin(self.model, [job.prompt], job.sampling, [job.draw])
            job.answering = found[0]
        except Exception as error:
            self._fail([job], error)

    def _turn(self) -> None:
        """One batch: the job whose turn it is, and all that can go with it."""
        first = self._active[0]
        jobs = [job for job in self._active if _alike(job, first)][: self.model.options.max_batch_size]
        by_answering = {id(job.answering): job for job in jobs}
        answerings = [job.answering for job in jobs if job.answering is not None]

        def watch(answering: Answering, event: Event) -> None:
            if all(job.is_gone for job in jobs):
                raise NobodyWaitsError
            self._tell_event(by_answering[id(answering)], event)

        self.counters.batch_size.observe(len(jobs))
        num_tokens = [len(one.ids) for one in answerings]
        num_pictures = [len(one.pictures) for one in answerings]
        try:
            take_turn(self.model, answerings, first.sampling, first.seed, watch)
        except NobodyWaitsError:
            return
        except Exception as error:
            self._fail(jobs, error)
            return
        self._active = [job for job in self._active if job not in jobs]
        for job, one, tokens, pictures in zip(jobs, answerings, num_tokens, num_pictures, strict=True):
            self.counters.tokens.inc(len(one.ids) - tokens)
            self.counters.pictures.inc(len(one.pictures) - pictures)
            if not job.is_gone:
                self._after_turn(job, one, pictures)

    def _after_turn(self, job: Job, one: Answering, num_told: int) -> None:
        try:
            for codes in one.pictures[num_told:]:
                job.tell(Finished(self.model.picture(codes), codes))
        except Exception as error:
            self._fail([job], error)
            return
        if one.next is None:
            job.tell(one)
        else:
            self._active.append(job)

    def _tell_event(self, job: Job, event: Event) -> None:
        if job.is_gone:
            return
        if isinstance(event, TextPiece):
            job.tell(event)
        elif (number := preview_number(event, job.num_previews)) is not None:
            job.tell(Preview(self.model.picture(event.codes), number, event))

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Tells those who asked; what is no mistake of theirs goes to the log too, and the thread goes on."""
        if not isinstance(error, UserError):
            log.exception("an answer failed", exc_info=error)
        self._active = [job for job in self._active if job not in jobs]
        for job in jobs:
            if not job.is_gone:
                job.tell(error)
            job.is_gone = True


def _alike(job: Job, other: Job) -> bool:
    """May two jobs take their next turn in one batch?"""
    assert job.answering is not None
    assert other.answering is not None
    mine, theirs = job.answering.next, other.answering.next
    return mine == theirs and job.seed == other.seed and job.sampling == other.sampling


def preview_number(event: Rows | Refined, num_previews: int) -> int | None:
    """Which of `num_previews`, spread evenly over a picture's rows or steps, is due with this one; None: none of them."""
    if isinstance(event, Rows):
        done, total = len(event.codes), event.grid[0]
    else:
        done, total = event.step + 1, event.num_steps + 1
    number = done * (num_previews + 1) // total
    is_new = number > (done - 1) * (num_previews + 1) // total
    return number - 1 if is_new and done < total else None
