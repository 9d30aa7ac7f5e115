"""Answers under way, turn by turn: a turn ends behind a picture, at the end of the answer, or at its length limit.

Whatever waits for the same kind of turn takes it together, and between two turns others may join. The first turn of an
answer draws what `InferenceModel.generate` draws. A world rollout is an answer of several pictures with a script: the
words that are said before each next state.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.documents.reading import split_parts
from model.errors import UserError
from model.generation.ar import Generation, Grid
from model.generation.grammar import GrammarOptions
from model.generation.settings import SamplingConfig
from training.inference.model import InferenceModel, Question
from training.inference.observing import Event, ObservedDecoder, Progress, Refined, codes_of_copy
from training.inference.prompts import Prompt

DRAWS = 1 << 32  # numbers of answers; turn t of answer d draws as number d + t * DRAWS
ENDINGS = ("eos", "ess")


@dataclass(frozen=True)
class Turn:
    """What answers must share to take their next turn in one batch."""

    grammar: GrammarOptions
    grid: Grid | None
    max_new_tokens: int


@dataclass(frozen=True)
class AnswerPart:
    """Text or a picture's codes (int64 [h, w]). `is_given`: words of the script, not of the model."""

    text: str = ""
    codes: np.ndarray | None = None
    is_given: bool = False


@dataclass(eq=False)
class Answering:
    """One answer under way. `next` is the turn that it waits for; None: it is over."""

    prompt: list[int]  # the question and all that is answered already
    unconditional: list[int]
    grid: Grid | None
    grammar: GrammarOptions  # of the whole answer
    draw: int
    images_left: int
    tokens_left: int
    script: list[str] = field(default_factory=list)
    is_rollout: bool = False  # ends behind its last picture and never before
    next: Turn | None = None
    finished: bool = False  # False when it is over: the length limit came first
    num_turns: int = 0
    num_prompt_tokens: int = 0
    ids: list[int] = field(default_factory=list)  # generated so far
    parts: list[AnswerPart] = field(default_factory=list)
    num_forwards: int = 0  # of the batches that it took part in
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """What the model said."""
        return "".join(part.text for part in self.parts if not part.is_given)

    @property
    def pictures(self) -> list[np.ndarray]:
        return [part.codes for part in self.parts if part.codes is not None]


# Told of an answer that goes on and what is new in it. Whatever it raises ends the turn of all its answers.
Watch = Callable[[Answering, Event], None]


def begin(
    model: InferenceModel, prompts: Sequence[Prompt], sampling: SamplingConfig, draws: Sequence[int]
) -> list[Answering]:
    """Answers that have not started. Raises `UserError` for a prompt that leaves no room for its answer."""
    answerings = []
    for question, draw in zip(model.questions(prompts), draws, strict=True):
        limit = question.grammar.max_images
        assert limit is not None, "every format bounds its pictures"
        answering = _answering(question, draw, limit, sampling)
        _prepare(model, answering)
        answerings.append(answering)
    return answerings


def begin_rollouts(
    model: InferenceModel,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    draws: Sequence[int],
    num_states: int,
    script: Sequence[str] = (),
) -> list[Answering]:
    """World rollouts: `num_states` pictures behind each prompt, and before picture i the words `script[i]`.

    Behind the last words the model itself may say something before a picture. `sampling.max_new_tokens` counts for
    each state. Raises `UserError` when the states do not fit behind a prompt.
    """
    answerings = []
    for question, draw in zip(model.questions(prompts), draws, strict=True):
        answering = _answering(question, draw, num_states, sampling)
        answering.tokens_left *= num_states
        answering.script, answering.is_rollout = list(script), True
        if question.grid is not None:
            needed = num_states * block_tokens(model, question.grid) + sum(len(_tokens(model, text)) for text in script)
            _check_room(model, len(question.prompt), needed, f"{num_states} states")
        _prepare(model, answering)
        answerings.append(answering)
    return answerings


def _answering(question: Question, draw: int, num_images: int, sampling: SamplingConfig) -> Answering:
    return Answering(
        list(question.prompt),
        list(question.unconditional),
        question.grid,
        question.grammar,
        draw,
        images_left=num_images,
        tokens_left=sampling.max_new_tokens,
        num_prompt_tokens=len(question.prompt),
    )


def answer_all(
    model: InferenceModel,
    answerings: Sequence[Answering],
    sampling: SamplingConfig,
    seed: int,
    watch: Watch | None = None,
) -> None:
    """Turns until every answer is over."""
    while waiting := [one for one in answerings if one.next is not None]:
        together = [one for one in waiting if one.next == waiting[0].next]
        take_turn(model, together[: model.options.max_batch_size], sampling, seed, watch)


def take_turn(
    model: InferenceModel,
    answerings: Sequence[Answering],
    sampling: SamplingConfig,
    seed: int,
    watch: Watch | None = None,
) -> None:
    """One turn of answers that wait for the same one, in one batch."""
    turn = answerings[0].next
    assert turn is not None
    assert all(one.next == turn for one in answerings), "a batch shares its turn"
    assert len(answerings) <= model.options.max_batch_size
    rows = sorted(answerings, key=lambda one: len(one.prompt))  # the generator's own order, which `see` relies on
    readers = [Progress(model.vocabulary, model.text_tokenizer) for _ in rows]

    def tell(row: int, events: Sequence[Event]) -> None:
        assert watch is not None
        for event in events:
            watch(rows[row], event)

    def see(ids: Sequence[int]) -> None:
        for row, reader in enumerate(readers):
            tell(row, reader.read(ids[row]))

    assert model.decoder is not None, "only the tokenizers were loaded"
    # Other strategies than `ar` decode whole images: rows are told when all of them are there.
    observed = ObservedDecoder(model.decoder, see if watch else None) if model.decoding.strategy == "ar" else None
    decoder: Any = observed or model.decoder
    before = decoder.num_forwards
    decoder.watch = _refining(model, rows, watch) if watch and model.decoding.strategy == "dida" else None
    started = time.perf_counter()
    try:
        generations = model.sample(
            [Question(one.prompt, one.unconditional, turn.grid, turn.grammar) for one in rows],
            replace(sampling, max_new_tokens=turn.max_new_tokens),
            seed,
            [one.draw + one.num_turns * DRAWS for one in rows],
            observed,
        )
    finally:
        decoder.watch = None
    seconds = time.perf_counter() - started
    for row, (one, generation) in enumerate(zip(rows, generations, strict=True)):
        if watch:  # the last token is drawn and not read again
            for token in generation.ids[readers[row].num_read :].tolist():
                tell(row, readers[row].read(token))
            tell(row, readers[row].end())
        one.num_forwards += decoder.num_forwards - before
        one.seconds += seconds
        _receive(model, one, generation)


def _refining(
    model: InferenceModel, rows: Sequence[Answering], watch: Watch
) -> Callable[[list[int], torch.Tensor], None]:
    """Tells what pictures look like before each step of DiDA; the rows behind the answers' own are guidance's."""
    steps: Counter[int] = Counter()

    def see(numbers: list[int], copies: torch.Tensor) -> None:
        for place, row in enumerate(numbers):
            if row >= len(rows):
                continue
            codes = codes_of_copy(copies[place].cpu().numpy(), model.vocabulary)
            if codes is not None:
                watch(rows[row], Refined(codes, steps[row], model.decoding.dida.steps))
            steps[row] += 1

    return see


def _receive(model: InferenceModel, one: Answering, generation: Generation) -> None:
    """Adds what a turn brought and prepares the next one."""
    ids = generation.ids.tolist()
    parts = split_parts(generation.ids, model.vocabulary, model.text_tokenizer)
    pictures = [part for part in parts if part.ndim == 2]
    for part in parts:
        is_picture = part.ndim == 2
        text = "" if is_picture else model.text_tokenizer.decode(part.tolist())
        one.parts.append(AnswerPart(text, part if is_picture else None))
    one.ids += ids
    one.prompt += ids
    for codes in pictures:
        one.unconditional += model.builder.image_block(codes).tolist()
        if one.grammar.repeat_grid and one.grid is None:
            one.grid = (codes.shape[0], codes.shape[1])
    one.images_left -= len(pictures)
    one.tokens_left -= len(ids)
    one.num_turns += 1
    is_open = generation.finished and bool(pictures)  # it ended behind a picture, not with the answer
    goes_on = is_open and (one.images_left > 0 or (one.grammar.stop_after_images is None and not one.is_rollout))
    one.next, one.finished = None, generation.finished
    if goes_on:
        _prepare(model, one)


def _prepare(model: InferenceModel, one: Answering) -> None:
    """Says the words of the script and settles the next turn."""
    grammar, turn = one.grammar, one.num_turns
    starts = turn == 0 and grammar.begin_with_image
    if turn < len(one.script):
        one.prompt += (words := _tokens(model, one.script[turn]))
        one.parts.append(AnswerPart(one.script[turn], is_given=True))
        starts = bool(words) or starts
    structure = grammar.structure_in_text
    if one.is_rollout:
        structure = tuple(name for name in structure if name not in ENDINGS)
    more = one.images_left > 0
    grammar = replace(
        grammar,
        max_images=int(more),
        stop_after_images=1 if more else None,
        begin_with_image=starts and more,
        structure_in_text=structure,
    )
    limit = min(one.tokens_left, model.max_sequence_length - len(one.prompt))
    if grammar.begin_with_image and one.grid is not None:
        needed = block_tokens(model, one.grid)
        _check_room(model, len(one.prompt), needed, "a picture of this size")
        limit = min(limit, needed)
    elif turn == 0:
        _check_room(model, len(one.prompt), 1, "an answer")
    one.next = Turn(grammar, one.grid, limit) if limit > 0 else None
    one.finished = False


def block_tokens(model: InferenceModel, grid: Grid) -> int:
    """Tokens of an image block of this grid, BOI to EOI."""
    return len(model.builder.image_block(np.zeros(grid, np.int64)))


def _tokens(model: InferenceModel, text: str) -> list[int]:
    return list(model.text_tokenizer.encode(text))


def _check_room(model: InferenceModel, num_prompt_tokens: int, needed: int, what: str) -> None:
    room = model.max_sequence_length - num_prompt_tokens
    if needed > room:
        raise UserError(
            f"the prompt leaves no room for {what}",
            expected=f"{needed} tokens behind it, of model.max_sequence_length = {model.max_sequence_length}",
            got=f"a prompt of {num_prompt_tokens} tokens, which leaves {max(0, room)}",
            fix="fewer words, fewer or smaller pictures",
        )
