"""Answers drawn from the weights in training, judged and made into batches: a `BatchSource`, on the main thread.

A rollout is the answers that one optimizer step learns from, or several (`updates`). An answer is a function of
(seed, rollout, number of its prompt in the rollout, number of the answer), whatever the batch and the layout. Every
replica draws its share, judges it and banks it; then all ranks see all answers, so that advantages, the choice of
groups and the split into micro-batches are the same everywhere.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from model.checkpoint.reader import CheckpointReader
from model.durable import fingerprint_of
from model.errors import UserError
from training.config import TrainConfig
from training.contracts.batches import Policy, Ranks
from training.contracts.inputs import InputMaker
from training.contracts.run_view import LoopState
from training.inference.model import Asked, InferenceModel
from training.metrics import PICTURES_NAME
from training.objectives.grpo.advantages import advantages_of, is_scored, teaches
from training.objectives.grpo.bank import Bank, Round, joined
from training.objectives.grpo.grpo_options import GrpoOptions
from training.objectives.grpo.parity import difference
from training.objectives.grpo.questions import Place, QuestionOrder
from training.objectives.grpo.rollout_metrics import counts_of, metrics_of
from training.objectives.grpo.rows import MicroBatch, Sample, micro_batch
from training.reliability.events import tell
from training.rewards.alarm import HackingAlarm
from training.rewards.base import Answer
from training.rewards.showcase import Showcase
from training.rewards.system import RewardSystem

BANK_NAME = "rollouts"


class Rollouts:
    """See `training.contracts.batches.BatchSource`."""

    def __init__(
        self,
        config: TrainConfig,
        options: GrpoOptions,
        ranks: Ranks,
        answering: InferenceModel,
        reference: CheckpointReader | None,
        objective: InputMaker,
    ):
        self.config, self.options, self.ranks = config, options, ranks
        self.answering, self.reference, self.objective = answering, reference, objective
        self.order = QuestionOrder(options.prompts, config.seed)
        self.rewards = RewardSystem(options.rewards, "stage.objective.rewards")
        for task in self.order.questions:
            self.rewards.check_task(task)
        start = reference.manifest.get("manifest_crc32") if reference is not None else None
        self.fingerprint = fingerprint_of([self.order.fingerprint, start])
        self.bank = Bank(config.stage_folder / BANK_NAME, ranks.data_parallel_rank, config.checkpoint.every_steps + 1)
        self.showcase = Showcase(config.stage_folder / PICTURES_NAME, options.keep_every_steps)
        self.alarm = HackingAlarm()
        self.grammar = answering.grammar()
        self.set_of: dict[int, int] = {}  # mask number -> row of `allowed_sets`
        self.allowed_sets = torch.zeros((0, answering.vocabulary.padded_size), dtype=torch.bool)
        self.metrics: dict[str, Any] = {}  # of the newest rollout, for the step's report
        self.num_dropped = 0  # groups that taught nothing, since the stage began
        self._rollout = -1
        self._first_prompt, self._next_prompt = 0, 0  # of the present rollout, and behind it
        self._num_uses = 0  # optimizer steps that the present answers were given to
        self._batches: list[MicroBatch] = []
        self._is_proved = False  # this process has seen that trainer and sampler agree

    def next(self, state: LoopState, policy: Policy, interrupted: Callable[[], bool]) -> Sequence[MicroBatch]:
        """The batches of a new rollout, or of the present one again. Nothing when any rank was interrupted."""
        if self.ranks.any_rank(interrupted()):
            return ()
        number = state.next_sample // self.config.stage.global_batch_size
        is_used_again = 0 < self._num_uses < self.options.updates and number == self._rollout + self._num_uses
        if not is_used_again:
            self._rollout, self._num_uses, self._first_prompt = number, 0, self._next_prompt
            self._batches = []
        if not self._batches:
            with policy.offloaded() if self.options.offload else contextlib.nullcontext():
                self._batches = self._make(policy, is_used_again)
        self._num_uses += 1
        return self._batches

    def state(self) -> dict[str, Any]:
        return {
            "rollout": self._rollout,
            "first_prompt": self._first_prompt,
            "next_prompt": self._next_prompt,
            "num_uses": self._num_uses,
            "num_dropped": self.num_dropped,
            "alarm": self.alarm.state(),
            "rewards": self.rewards.describe(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises `UserError` where the rewards are not those of the checkpoint."""
        self.rewards.check_unchanged(state["rewards"])
        self._rollout, self._num_uses = int(state["rollout"]), int(state["num_uses"])
        self._first_prompt, self._next_prompt = int(state["first_prompt"]), int(state["next_prompt"])
        self.num_dropped = int(state["num_dropped"])
        self.alarm.load(state.get("alarm", {}))  # checkpoints before there was one have none
        self._batches = []

    def close(self) -> None:
        if self.reference is not None:
            self.reference.close()

    def _make(self, policy: Policy, is_used_again: bool) -> list[MicroBatch]:
        """The batches of the present rollout. `is_used_again`: the weights have moved since its answers were drawn."""
        num_dropped = self.num_dropped
        batches, was_banked = self._drawn_batches(policy, must_be_banked=is_used_again)
        if is_used_again:
            self.num_dropped = num_dropped  # counted already
            self._add_old_from_bank(batches)
        elif was_banked or not self._is_proved or self.options.updates > 1:
            log_probs = policy.log_probs(batches, self.objective)
            parity = difference(self.ranks, batches, log_probs)
            if was_banked and not parity.is_within(self.config.model.dtype):
                tell(f"answers kept in {self.bank.folder} are of other weights: they are drawn again")
                self.num_dropped = num_dropped
                batches, _ = self._drawn_batches(policy, ignore_bank=True)
                log_probs = policy.log_probs(batches, self.objective)
                parity = difference(self.ranks, batches, log_probs)
            parity.refuse_beyond(self.config.model.dtype)
            self._is_proved = self._is_proved or parity.num_tokens > 0
            if self.options.updates > 1:
                self._add_old(batches, [one.float().cpu().numpy() for one in log_probs])
        if not is_used_again:
            self._watch_guards()
        if self.reference is not None:
            with policy.weights_of(self.reference):
                found = policy.log_probs(batches, self.objective)
            for batch, values in zip(batches, found, strict=True):
                batch.fields["reference"] = values.float().cpu().numpy()
        self.bank.forget_before(self._rollout)
        return batches

    def _watch_guards(self) -> None:
        """Every rank sees the same figures; the first one tells the user."""
        guards = {
            f"{task}/{signal.name}": self.metrics["signals"].get(f"{task}/{signal.name}")
            for signal in self.rewards.signals
            if signal.entry.guard
            for task in self.order.questions
        }
        reward = self.metrics["reward"]
        alarms = self.alarm.seen(reward if math.isfinite(reward) else None, guards)
        self.metrics["alarms"] = len(alarms)
        if self.ranks.rank == 0:
            for alarm in alarms:
                tell(alarm)

    def _drawn_batches(
        self, policy: Policy, *, must_be_banked: bool = False, ignore_bank: bool = False
    ) -> tuple[list[MicroBatch], bool]:
        """The present rollout's batches, and whether all of it came from the bank."""
        options, num_groups = self.options, self.config.stage.global_batch_size // self.options.group_size
        rounds: list[Round] = []
        kept: list[Round] = []
        num_asked, was_banked = 0, True
        for number in range(1 + options.max_refills):
            missing = num_groups - len(kept)
            if missing == 0:
                break
            places = self.order.take(self._first_prompt + num_asked, missing)
            found, banked = self._round(policy, number, places, num_asked, must_be_banked, ignore_bank)
            was_banked, num_asked = was_banked and banked, num_asked + missing
            rounds.append(found)
            groups = [
                found.part(first, options.group_size) for first in range(0, len(found.samples), options.group_size)
            ]
            kept += [group for group in groups if teaches(group.signals, group.weights[0], options.advantages)]
        self._next_prompt = self._first_prompt + num_asked
        self.num_dropped += num_asked - len(kept)
        num_signals = len(self.rewards.signals)
        names = [signal.name for signal in self.rewards.signals]
        num_replicas, num_dropped = self.ranks.data_parallel_size, num_asked - len(kept)
        self.metrics = metrics_of(joined(rounds, num_signals), names, num_dropped, num_replicas)
        return self._batches_of(joined(kept, num_signals)), was_banked

    def _batches_of(self, whole: Round) -> list[MicroBatch]:
        """This replica's micro-batches, as many on every replica; those that no answer is left for learn nothing."""
        options, stage, layout = self.options, self.config.stage, self.config.parallel
        advantages = advantages_of(whole.signals, whole.weights, options.group_size, options.advantages)
        scored = is_scored(whole.signals, whole.weights)
        self._name_sets(whole.samples)
        temperatures = options.sampling.text.temperature, options.sampling.image.temperature
        mine = range(self.ranks.data_parallel_rank, len(whole.samples), self.ranks.data_parallel_size)
        batches = []
        for first in range(0, stage.global_batch_size // self.ranks.data_parallel_size, stage.micro_batch_size):
            rows = mine[first : first + stage.micro_batch_size]
            batches.append(
                micro_batch(
                    [whole.samples[row] for row in rows],
                    [float(advantages[row]) if scored[row] else None for row in rows],
                    self.set_of,
                    temperatures,
                    self.answering.vocabulary,
                    layout.tensor,
                )
            )
        return batches

    def _name_sets(self, samples: Sequence[Sample]) -> None:
        found = {number for sample in samples for number in np.unique(sample.mask_numbers).tolist()}
        new = sorted(found - self.set_of.keys())
        if new:
            self.set_of |= {number: len(self.set_of) + index for index, number in enumerate(new)}
            self.allowed_sets = self.grammar.masks_of(torch.tensor(list(self.set_of), device=self.grammar.device))

    # One round of prompts

    def _round(
        self, policy: Policy, number: int, places: list[Place], num_asked: int, must_be_banked: bool, ignore_bank: bool
    ) -> tuple[Round, bool]:
        """All replicas' answers in the order of the prompts; every rank has its share banked before any goes on."""
        name, key = f"round_{number}", self._key(number, num_asked)
        content: bytes | None = b""
        if self.ranks.is_first_of_replica:
            content = None if ignore_bank else self.bank.read(self._rollout, name, key)
        must_draw = self.ranks.any_rank(content is None)
        if must_draw:
            self._refuse_to_draw(must_be_banked)
            shares = np.array_split(np.arange(len(places)), self.ranks.data_parallel_size)
            mine = shares[self.ranks.data_parallel_rank].tolist()
            started = time.monotonic()
            asked = self._draw(policy, [places[index] for index in mine], [num_asked + index for index in mine])
            if self.ranks.is_first_of_replica:
                found = self._judge([places[index] for index in mine], asked, started)
                content = found.to_bytes()
                self.bank.write(self._rollout, name, key, content)
        contents = [one for one in self.ranks.gather(content or b"") if one]
        return joined([Round.from_bytes(one) for one in contents], len(self.rewards.signals)), not must_draw

    def _refuse_to_draw(self, must_be_banked: bool) -> None:
        if must_be_banked:
            raise UserError(
                "the answers that this update needs are gone, and the weights that drew them have moved on",
                where=str(self.bank.folder),
                fix="bring the folder back, or remove the newest checkpoint to go on from the one before",
            )

    def _draw(self, policy: Policy, places: list[Place], numbers: list[int]) -> list[Asked]:
        """`group_size` answers to each prompt, one behind the other; on every rank of a replica the same."""
        if not places:
            return []
        options, stage = self.options, self.config.stage
        per_rollout = stage.global_batch_size // options.group_size * (1 + options.max_refills)
        draws = [
            (self._rollout * per_rollout + number) * options.group_size + answer
            for number in numbers
            for answer in range(options.group_size)
        ]
        prompts = [place.question.prompt for place in places for _ in range(options.group_size)]
        with policy.decoder() as decoder:
            self.answering.decoder = decoder
            asked = self.answering.ask(prompts, options.sampling, self.config.seed, draws)
            self.answering.decoder = None
        longest = max(len(one.prompt) for one in asked) + options.sampling.max_new_tokens
        if longest > stage.sequence_length:
            raise UserError(
                "a prompt and its answer do not fit a row",
                where="stage.sequence_length",
                expected=f"at least {longest} tokens",
                got=str(stage.sequence_length),
                fix=f"stage.sequence_length={longest}, or leave the prompt out",
            )
        return asked

    def _judge(self, places: list[Place], asked: list[Asked], started: float) -> Round:
        """One replica's answers with their scores."""
        group_size = self.options.group_size
        drawn = time.monotonic()
        outputs = self.answering.outputs([one.generation for one in asked])
        boi, answers = self.answering.vocabulary.boi, []
        for index, output in enumerate(outputs):
            place = places[index // group_size]
            num_cut = int((output.tokens == boi).sum()) - len(output.images)
            answers.append(
                Answer(
                    place.task,
                    place.question.words,
                    place.question.pictures,
                    [*output.images, *[None] * num_cut],
                    output.text,
                    output.finished,
                    place.question.fields,
                )
            )
        judged = self.rewards.judge(answers)
        if self.ranks.rank == 0 and self.options.keep_every_steps:
            self.showcase.keep(self._rollout, answers, judged)
        names = [signal.name for signal in self.rewards.signals]
        return Round(
            [self._sample(one) for one in asked],
            judged.totals,
            np.stack([judged.signals[name] for name in names], axis=1),
            np.stack([judged.weights[name] for name in names], axis=1),
            [answer.task for answer in answers],
            counts_of(asked, judged, drawn - started, time.monotonic() - drawn),
        )

    def _sample(self, asked: Asked) -> Sample:
        is_guided, generation = self.options.sampling.guidance_scale != 1.0, asked.generation
        return Sample(
            np.asarray(asked.prompt, np.int32),
            np.asarray(asked.unconditional if is_guided else [], np.int32),
            generation.ids.astype(np.int32),
            generation.log_probs,
            generation.sampled,
            generation.mask_numbers.astype(np.int32),
            generation.finished,
        )

    def _key(self, round_number: int, num_asked: int) -> str:
        """All that decides what a bank's file holds, beside the weights."""
        return fingerprint_of(
            [
                self.config.fingerprint(),
                self.fingerprint,
                self.rewards.describe()["version"],
                [self._rollout, round_number, self._first_prompt, num_asked],
                [self.ranks.data_parallel_rank, self.ranks.data_parallel_size],
            ]
        )

    # Log-probabilities before the first of several updates

    def _add_old(self, batches: list[MicroBatch], values: list[np.ndarray]) -> None:
        for batch, one in zip(batches, values, strict=True):
            batch.fields["old"] = one
        if self.ranks.is_first_of_replica:
            self.bank.write(self._rollout, "old", self._key(0, 0), np.concatenate(values).tobytes())

    def _add_old_from_bank(self, batches: list[MicroBatch]) -> None:
        content = self.bank.read(self._rollout, "old", self._key(0, 0)) if self.ranks.is_first_of_replica else b""
        self._refuse_to_draw(self.ranks.any_rank(content is None))
        everyone = [one for one in self.ranks.gather(content or b"") if one]
        values = np.frombuffer(everyone[self.ranks.data_parallel_rank], np.float32)
        ends = np.cumsum([len(batch.tokens) for batch in batches])[:-1]
        for batch, one in zip(batches, np.split(values, ends), strict=True):
            batch.fields["old"] = one
