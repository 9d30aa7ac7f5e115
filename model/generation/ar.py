"""Autoregressive generation: prompts in, text and image tokens out, many prompts at once, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from model.generation.grammar import HEADER_SIZE, GrammarOptions, GrammarState, ImageGrammar, Phase
from model.generation.sampling import Choice, choose, guide, next_tokens, uniform_numbers
from model.generation.settings import SamplingConfig

Grid = tuple[int, int]  # height and width of an image, in tokens


class Decoder(Protocol):
    """What generation asks of a model: logits after a prompt, then after each further token."""

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        """Reads R prompts of any lengths and makes room for more; logits [R, padded vocabulary] after the last id."""
        ...

    def step(
        self, ids: torch.Tensor, advances: torch.Tensor | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        """Reads the next ids of each row (int64 [R] or [R, t]); logits [R, padded vocabulary] after the last one.

        With `columns` only those of them, [R, n]. A row where `advances` (bool [R]) is False forgets its ids again: the
        next step takes their place.
        """
        ...


@dataclass
class Generation:
    """What was generated after one prompt: arrays of n tokens."""

    ids: np.ndarray  # int64 [n]
    log_probs: np.ndarray  # float32 [n]; of the sampling distribution (see `Choice`), 0 for forced tokens
    sampled: np.ndarray  # bool [n]; False where the grammar left no choice
    finished: bool  # False: max_new_tokens came first
    # int64 [n]: what might have stood at each place, see `ImageGrammar.masks_of`; a trainer scores over the same ids
    mask_numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class ARGenerator:
    """Generates token by token under the grammar.

    A sequence depends on (seed, its prompt's index) and not on the other prompts; see `model.generation.sampling`.
    """

    def __init__(self, decoder: Decoder, grammar: ImageGrammar, max_batch_size: int = 256) -> None:
        self.decoder, self.grammar, self.max_batch_size = decoder, grammar, max_batch_size

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int, image_grid: Grid | None = None
    ) -> list[list[int]]:
        """The generated ids of each prompt, without the prompt; every image has `image_grid` when it is given."""
        return [g.ids.tolist() for g in self.sample(prompts, sampling, seed, [image_grid] * len(prompts))]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        image_grids: Sequence[Grid | None] | None = None,
        unconditional_prompts: Sequence[Sequence[int]] | None = None,
        prompt_indices: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Generates after each prompt, in batches of prompts of similar length.

        `image_grids`: for each prompt the grid of its images, None: the model chooses.
        `unconditional_prompts`: for each prompt the one without the condition; needed when guidance is on.
        `prompt_indices`: what identifies each prompt to the random numbers; default 0, 1, 2...
        """
        guided = sampling.guidance_scale != 1.0
        assert not guided or unconditional_prompts is not None, "guidance needs unconditional prompts"
        assert all(len(prompt) for prompt in prompts), "a prompt holds at least one token"
        grids = list(image_grids or [None] * len(prompts))
        indices = np.arange(len(prompts)) if prompt_indices is None else np.asarray(prompt_indices)
        results: dict[int, Generation] = {}
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for first in range(0, len(prompts), self.max_batch_size):
            rows = by_length[first : first + self.max_batch_size]
            unconditional = [unconditional_prompts[row] for row in rows] if guided and unconditional_prompts else []
            uniforms = uniform_numbers(seed, indices[rows], sampling.max_new_tokens)
            batch = self._batch(
                [prompts[row] for row in rows], unconditional, [grids[row] for row in rows], sampling, uniforms
            )
            results.update(zip(rows, batch, strict=True))
        return [results[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def _batch(
        self,
        prompts: list[Sequence[int]],
        unconditional: list[Sequence[int]],
        grids: list[Grid | None],
        sampling: SamplingConfig,
        uniforms: np.ndarray,
    ) -> list[Generation]:
        """One batch: B prompts, and as many unconditional ones behind them when guided."""
        device, rows = self.grammar.device, len(prompts)
        numbers = torch.as_tensor(uniforms, device=device)
        state = self.grammar.start(prompts, grids)
        logits = self.decoder.start([*prompts, *unconditional], sampling.max_new_tokens)
        record, unread = _Record(), _Unread(self.decoder)
        while True:
            image = ImageRun.of(state, self.grammar.options)
            if image is not None and len(image.body) < sampling.max_new_tokens - len(record):
                logits = unread.read(logits)
                state = self._finish_images(image, state, logits, sampling, numbers, record, unread)
            if bool((self.grammar.forced(state) < 0).any()):
                logits = unread.read(logits)
            guide_logits = logits[rows:] if unconditional else None
            position = len(record)
            choice = next_tokens(logits[:rows], state, self.grammar, sampling, numbers[:, position], guide_logits)
            record.add(choice, self.grammar.mask_numbers(state), state.done)
            before, state = state, self.grammar.advance(state, choice.ids)
            if bool(state.done.all()) or len(record) == sampling.max_new_tokens:
                break
            if unconditional:  # whose rows do not read everything
                logits = unread.read(logits)
                advances = torch.cat([~before.done, self._in_image(before, choice.ids)])
                logits = self.decoder.step(choice.ids.repeat(2), advances)
            else:
                unread.add(choice.ids)
        return record.split(state.done)

    def _finish_images(
        self,
        image: ImageRun,
        state: GrammarState,
        logits: torch.Tensor,
        sampling: SamplingConfig,
        numbers: torch.Tensor,
        record: _Record,
        unread: _Unread,
    ) -> GrammarState:
        """All codes and row ends of images that all rows are in, at the same place: nothing has to be asked a token.

        The state before EOI, which is forced, so that nobody needs logits; the last tokens are left unread.
        """
        rows, vocabulary = len(state.phase), self.grammar.vocabulary
        visual = slice(vocabulary.visual_start, vocabulary.size)
        both, scores = len(logits) // rows, logits[:, visual]
        zeros, ones = torch.zeros(rows, device=state.phase.device), torch.ones_like(state.done)
        row_end = Choice(torch.full_like(state.phase, vocabulary.eol), zeros, ~ones)
        names = {is_code: torch.full_like(state.phase, image.mask_number(is_code)) for is_code in (True, False)}
        for is_code in image.body:
            choice = row_end
            if is_code:
                scores = unread.read(scores, visual)
                of_codes = guide(scores[:rows], scores[rows:], sampling.guidance_scale) if both > 1 else scores
                drawn, log_probs = choose(of_codes, None, sampling.image, numbers[:, len(record)])
                choice = Choice(drawn + vocabulary.visual_start, log_probs, ones)
            record.add(choice, names[is_code], ~ones)
            unread.add(choice.ids if both == 1 else choice.ids.repeat(both))
        after = GrammarState(**vars(state))
        after.position = torch.full_like(state.position, image.num_codes)
        after.phase = torch.full_like(state.phase, image.last_phase)
        return after

    def _in_image(self, state: GrammarState, ids: torch.Tensor) -> torch.Tensor:
        """bool [B]: the token belongs to an image block. The unconditional stream reads no other generated token."""
        phase = state.phase
        inside = (phase >= Phase.BEGIN_IMAGE) & (phase <= Phase.IMAGE_END)
        return inside | ((phase == Phase.TEXT) & (ids == self.grammar.vocabulary.boi))


@dataclass(frozen=True)
class ImageRun:
    """What is left of images that all sequences are in, at the same place of the same grid, up to the tokens that end them."""

    body: tuple[bool, ...]  # one a token: a code, else EOL
    num_codes: int  # of a whole image
    last_phase: Phase  # of the token behind the body

    @classmethod
    def of(cls, state: GrammarState, options: GrammarOptions) -> ImageRun | None:
        places = torch.stack((state.phase, state.height, state.width, state.position))
        if not bool(((places == places[:, :1]) & (state.phase == Phase.CODES)).all()):
            return None
        _, height, width, position = places[:, 0].tolist()
        num_codes = height * width
        body = []
        for code in range(position, num_codes):
            body.append(True)
            if (code + 1) % width == 0 and (code + 1 < num_codes or options.emu3_format):
                body.append(False)
        return cls(tuple(body), num_codes, Phase.FRAME_END if options.emu3_format else Phase.IMAGE_END)

    def mask_number(self, is_code: bool) -> int:
        """As `ImageGrammar.mask_numbers`."""
        phase: Phase = Phase.CODES if is_code else Phase.ROW_END
        return phase.value * int(2**HEADER_SIZE)


class _Unread:
    """Tokens that a decoder has not read yet: nobody asks for logits behind what the grammar forces."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ids: list[torch.Tensor] = []

    def add(self, ids: torch.Tensor) -> None:
        self.ids.append(ids)

    def read(self, logits: torch.Tensor, columns: slice | None = None) -> torch.Tensor:
        """The logits behind everything; those given where everything is read."""
        if not self.ids:
            return logits
        ids, self.ids = torch.stack(self.ids, dim=1), []
        return self.decoder.step(ids, columns=columns)


class _Record:
    """Collects the steps of one batch."""

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, choice: Choice, mask_numbers: torch.Tensor, was_done: torch.Tensor) -> None:
        self.steps.append((choice.ids, choice.log_probs, choice.sampled, mask_numbers, ~was_done))

    def split(self, done: torch.Tensor) -> list[Generation]:
        columns = [torch.stack(column, dim=1).cpu().numpy() for column in zip(*self.steps, strict=True)]
        return [
            Generation(ids[real], log_probs[real], sampled[real], finished, mask_numbers[real])
            for ids, log_probs, sampled, mask_numbers, real, finished in zip(*columns, done.tolist(), strict=True)
        ]
