"""Answers whose images are decoded as wholes: text token by token, then all codes of an image by an `ImagePhase`.

When every sequence of the batch has come to an image or to its end, the images are decoded, grid by grid, and read once
more as clean tokens (the commit pass): the cache is then what a prefill of the answer would have made, and text goes on.
Where every image of a group ends its answer nothing is read once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from model.errors import UserError
from model.generation.ar import ARGenerator, Generation, Grid
from model.generation.grammar import GrammarState, ImageGrammar, Phase
from model.generation.image_decoder import ImageDecoder
from model.generation.sampling import guide, next_tokens, uniform_numbers
from model.generation.settings import SamplingConfig
from model.vocabulary import Vocabulary


@dataclass
class ImageBlock:
    """The tokens of image blocks of one grid from IMG to EOI, for R sequences. Codes lie at `places`."""

    tokens: torch.Tensor  # int64 [R, L]; codes are padding until they are known
    places: torch.Tensor  # int64 [N]
    grid: Grid

    def with_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [R, L], code tokens `ids` [R, N] filled in."""
        tokens = self.tokens.clone()
        tokens[:, self.places] = ids
        return tokens


@dataclass
class GuidedImages:
    """What a phase may ask while it decodes images of one grid: logits of codes, guided where sampling says so."""

    decoder: ImageDecoder
    grammar: ImageGrammar
    sampling: SamplingConfig
    block: ImageBlock
    numbers: np.ndarray  # uint64 [R], seeds of the images' numbers
    num_rows: int  # R; behind them as many unconditional rows when guided
    references: torch.Tensor  # int64 [R, N], codes of the last image of this grid before; -1: there is none

    @property
    def is_guided(self) -> bool:
        return bool(self.sampling.guidance_scale != 1.0)

    def logits(self, tokens: torch.Tensor, at: torch.Tensor, *, whole: bool, guided: bool = True) -> torch.Tensor:
        """float32 [R, n, codes] after the tokens at `at` (int64 [R, n]) of a block int64 [R, t]."""
        logits = self.decoder.look(self._doubled(tokens), whole=whole, columns=self._visual)
        at = at[..., None].expand(-1, -1, logits.shape[-1])
        found = logits[: self.num_rows].gather(1, at)
        if self.is_guided and guided:
            found = guide(found, logits[self.num_rows :].gather(1, at), self.sampling.guidance_scale)
        return found

    def show(self, tokens: torch.Tensor) -> None:
        """To who watches; see `ImageDecoder.show`."""
        self.decoder.show(self._doubled(tokens))

    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float32 [R, t, codes] after int64 [R, t], which stay behind the rows; see `ImageDecoder.extend`.

        `positions` int64 [R, t], or [2 R, t] when guided.
        """
        logits = self.decoder.extend(self._doubled(tokens), positions, self._visual)
        if not self.is_guided:
            return logits
        return guide(logits[: self.num_rows], logits[self.num_rows :], self.sampling.guidance_scale)

    @property
    def _visual(self) -> slice:
        return slice(self.grammar.vocabulary.visual_start, self.grammar.vocabulary.size)

    def _doubled(self, values: torch.Tensor) -> torch.Tensor:
        """Once more for the unconditional rows, where there are some."""
        return torch.cat([values, values]) if self.is_guided else values

    def uniforms(self, stream: int, count: int) -> torch.Tensor:
        """float64 [R, count] in [0, 1): each image's own numbers of one stream."""
        return torch.as_tensor(uniform_numbers(stream, self.numbers, count), device=self.grammar.device)

    def keep(self, num_tokens: torch.Tensor) -> None:
        self.decoder.keep(self._doubled(num_tokens))


class ImagePhase(Protocol):
    def decode(self, images: GuidedImages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes int64 [R, N], log-probabilities float32 [R, N], and how many tokens of each block are read: int64 [R]."""
        ...


@dataclass
class _Answer:
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], log_probs: list[float], sampled: list[bool]) -> None:
        self.ids += ids
        self.log_probs += log_probs
        self.sampled += sampled


class PhaseGenerator(ARGenerator):
    """An `ARGenerator` that hands every image to a phase. The log-probabilities of codes are the phase's."""

    decoder: ImageDecoder

    def __init__(
        self, decoder: ImageDecoder, grammar: ImageGrammar, phase: ImagePhase, max_batch_size: int = 256, spare: int = 0
    ) -> None:
        """`spare`: tokens behind the longest answer that a phase may look at."""
        super().__init__(decoder, grammar, max_batch_size)
        self.phase, self.spare = phase, spare
        self._blocks: dict[Grid, ImageBlock] = {}

    @torch.inference_mode()
    def _batch(
        self,
        prompts: list[Sequence[int]],
        unconditional: list[Sequence[int]],
        grids: list[Grid | None],
        sampling: SamplingConfig,
        uniforms: np.ndarray,
    ) -> list[Generation]:
        limit, device = sampling.max_new_tokens, self.grammar.device
        numbers = torch.as_tensor(uniforms, device=device)
        seeds = (uniforms[:, 0] * 2.0**52).astype(np.uint64)  # of each sequence, whatever its batch
        state = self._start(prompts, grids)
        answers = [_Answer() for _ in prompts]
        known = [list(prompt) for prompt in [*prompts, *unconditional]]
        state = self._read_forced(known, state, answers, limit)
        logits = self.decoder.start(known, limit + self.spare)
        rows = torch.arange(len(prompts), device=device)
        cut = torch.zeros_like(state.done)
        while True:
            counts = torch.tensor([len(answer.ids) for answer in answers], device=device)
            ended = state.done | cut | (counts >= limit)
            at_image = ~ended & (state.phase == Phase.CODES)
            active = ~ended & ~at_image
            if not active.any() and not at_image.any():
                break
            if not active.any():
                state, logits, cut = self._images(state, logits, at_image, cut, prompts, answers, seeds, sampling)
                continue
            position = counts.clamp(max=limit - 1)
            guide_logits = logits[len(prompts) :] if unconditional else None
            choice = next_tokens(
                logits[: len(prompts)], state, self.grammar, sampling, numbers[rows, position], guide_logits
            )
            for row in torch.nonzero(active).flatten().tolist():
                answers[row].add([int(choice.ids[row])], [float(choice.log_probs[row])], [bool(choice.sampled[row])])
            before, after = state, self.grammar.advance(state, choice.ids)
            state = _merged(active, after, before)
            # IMG is read as the first token of the image's block.
            reads = active & (state.phase != Phase.CODES)
            both = torch.cat([reads, reads & self._in_image(before, choice.ids)]) if unconditional else reads
            if bool(both.any()):
                stepped = self.decoder.step(choice.ids.repeat(2) if unconditional else choice.ids, both)
                logits = torch.where(both[:, None], stepped, logits)
        return [
            Generation(np.array(a.ids, np.int64), np.array(a.log_probs, np.float32), np.array(a.sampled, bool), done)
            for a, done in zip(answers, state.done.tolist(), strict=True)
        ]

    def _start(self, prompts: list[Sequence[int]], grids: list[Grid | None]) -> GrammarState:
        state = self.grammar.start(prompts, grids)
        if bool((state.phase == Phase.CODES).any()):
            raise UserError(
                "a prompt ends inside an image, which only token-by-token decoding can go on with",
                fix="decoding.strategy=ar",
            )
        return state

    def _read_forced(
        self, known: list[list[int]], state: GrammarState, answers: list[_Answer], limit: int
    ) -> GrammarState:
        """The state behind what must follow the prompts (`known`, unconditional ones behind), which is read with them.

        An answer that begins with an image of a given grid needs no forward pass for its header.
        """
        rows = state.to_rows()
        for number, answer in enumerate(answers):
            run = self.grammar.forced_run(rows[number])
            count = min(len(run.ids), limit)
            answer.add(run.ids[:count], [0.0] * count, [False] * count)
            for token, in_image, after in zip(run.ids[:count], run.in_image, run.states, strict=False):
                rows[number] = after
                if after.phase != Phase.CODES:  # IMG is read as the first token of the image's block
                    known[number].append(token)
                    if len(known) > len(answers) and in_image:
                        known[len(answers) + number].append(token)
        return GrammarState.from_rows(rows, self.grammar.device)

    def _images(
        self,
        state: GrammarState,
        logits: torch.Tensor,
        at_image: torch.Tensor,
        cut: torch.Tensor,
        prompts: list[Sequence[int]],
        answers: list[_Answer],
        seeds: np.ndarray,
        sampling: SamplingConfig,
    ) -> tuple[GrammarState, torch.Tensor, torch.Tensor]:
        """Decodes the images that sequences have come to; those that no longer fit are cut."""
        groups: dict[Grid, list[int]] = defaultdict(list)
        for row in torch.nonzero(at_image).flatten().tolist():
            groups[int(state.height[row]), int(state.width[row])].append(row)
        for grid, members in groups.items():
            size = self._block(grid, 1).tokens.shape[1] - 1
            fitting = [row for row in members if len(answers[row].ids) + size <= sampling.max_new_tokens]
            cut[[row for row in members if row not in fitting]] = True
            if fitting:
                state, logits = self._decode_group(state, logits, grid, fitting, prompts, answers, seeds, sampling)
        return state, logits, cut

    def _decode_group(
        self,
        state: GrammarState,
        logits: torch.Tensor,
        grid: Grid,
        members: list[int],
        prompts: list[Sequence[int]],
        answers: list[_Answer],
        seeds: np.ndarray,
        sampling: SamplingConfig,
    ) -> tuple[GrammarState, torch.Tensor]:
        device, num_rows = self.grammar.device, len(state.phase)
        index = torch.tensor(members, device=device)
        guided = len(logits) > num_rows
        in_cache = torch.cat([index, index + num_rows]) if guided else index
        block = self._block(grid, len(members))
        # An image's numbers: those of its sequence, and of how much stands before it.
        own = seeds[members] ^ (np.array([len(answers[row].ids) for row in members], np.uint64) << np.uint64(52))
        before = [last_image([*prompts[row], *answers[row].ids], block, self.grammar.vocabulary) for row in members]
        references = torch.as_tensor(np.stack(before), device=device)
        with self.decoder.only(in_cache):
            images = GuidedImages(self.decoder, self.grammar, sampling, block, own, len(members), references)
            codes, log_probs, num_read = self.phase.decode(images)
            tokens = block.with_ids(self.grammar.vocabulary.codes_to_ids(codes))
            behind = self._behind_image(state, members, len(block.places))
            if not bool(behind.done[index].all()):  # nobody reads what ends an answer
                logits = logits.index_copy(0, in_cache, self._commit(tokens, num_read, guided))
        for number, row in enumerate(members):
            values = torch.zeros(tokens.shape[1])
            values[block.places.cpu()] = log_probs[number].float().cpu()
            drawn = torch.zeros(tokens.shape[1], dtype=torch.bool)
            drawn[block.places.cpu()] = True
            answers[row].add(tokens[number, 1:].tolist(), values[1:].tolist(), drawn[1:].tolist())
        return behind, logits

    def _commit(self, tokens: torch.Tensor, num_read: torch.Tensor, guided: bool) -> torch.Tensor:
        """Reads what is not read yet of clean blocks: logits after EOI, [R, padded vocabulary] (twice R when guided)."""
        first = int(num_read.min())
        assert bool((num_read == first).all()), "blocks of one grid are read to the same token"
        rest = tokens[:, first:]
        return self.decoder.step(rest.repeat(2, 1) if guided else rest)

    def _behind_image(self, state: GrammarState, members: list[int], num_codes: int) -> GrammarState:
        """The state after the images of `members`, rows of the batch."""
        rows = state.to_rows()
        for member in members:
            at_end = rows[member]._replace(phase=Phase.IMAGE_END, position=num_codes)
            rows[member] = self.grammar.forced_run(at_end).states[0]
        return GrammarState.from_rows(rows, self.grammar.device)

    def _block(self, grid: Grid, num_rows: int) -> ImageBlock:
        if grid not in self._blocks:
            self._blocks[grid] = self._new_block(grid)
        block = self._blocks[grid]
        return ImageBlock(block.tokens.repeat(num_rows, 1), block.places, grid)

    def _new_block(self, grid: Grid) -> ImageBlock:
        """IMG, rows of codes with their ends, EOI: as the grammar forces them."""
        vocabulary, (height, width) = self.grammar.vocabulary, grid
        rows = torch.full((height, width + 1), vocabulary.eol, device=self.grammar.device)
        rows[:, :width] = vocabulary.visual_start
        body, ending = rows.flatten(), [vocabulary.eof, vocabulary.eoi]
        if not self.grammar.options.emu3_format:
            body, ending = body[:-1], ending[1:]
        tokens = torch.cat((body.new_tensor([vocabulary.img]), body, body.new_tensor(ending)))
        return ImageBlock(tokens[None], torch.nonzero(tokens == vocabulary.visual_start).flatten(), grid)


def last_image(ids: Sequence[int], block: ImageBlock, vocabulary: Vocabulary) -> np.ndarray:
    """int64 [N], codes of the last whole image of the block's grid in `ids`; -1 where there is none."""
    tokens: np.ndarray = np.asarray(ids, dtype=np.int64)
    places = block.places.cpu().numpy()
    for start in np.flatnonzero(tokens == vocabulary.img)[::-1].tolist():
        behind = tokens[start:][: np.argmax(tokens[start:] == vocabulary.eoi)]  # empty where it does not end
        visual = np.flatnonzero(vocabulary.is_visual(behind))
        if np.array_equal(visual, places):
            codes: np.ndarray = vocabulary.ids_to_codes(behind[visual])
            return codes
    return np.full(len(places), -1, dtype=np.int64)


def _merged(chosen: torch.Tensor, after: GrammarState, before: GrammarState) -> GrammarState:
    """`after` where chosen, else `before`."""
    return GrammarState(
        **{name: torch.where(chosen, values, getattr(before, name)) for name, values in vars(after).items()}
    )
