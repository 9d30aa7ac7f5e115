"""What may follow: the grammar of text and image blocks, as a finite-state machine over a batch of sequences.

An image block is `BOI "H*W" IMG row EOL row ... EOL row EOI` (Emu3 variant: `... row EOL EOF EOI`). Most of its
structure is forced, so a sampler asks for a distribution only where there is a choice. The set of allowed ids is the
support of the sampled distribution: an objective that needs the log-probability of generated tokens uses `mask` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import NamedTuple

import torch

from model.errors import Problems
from model.vocabulary import Vocabulary

MAX_DIGITS = 3  # of one side of a grid
STAR, END_OF_HEADER = 10, 11  # columns of the header table after the ten digits
HEADER_SIZE = 12  # columns of that table


class Phase(IntEnum):
    """What the next token of a sequence is."""

    TEXT = 0  # a text id, or one of the structure ids that may stand in text
    BEGIN_IMAGE = 1  # BOI
    HEIGHT = 2  # a digit of the grid's height, or `*`
    WIDTH = 3  # a digit of the grid's width, or IMG
    CODES = 4  # a visual id
    ROW_END = 5  # EOL
    FRAME_END = 6  # EOF (Emu3 variant only)
    IMAGE_END = 7  # EOI
    CLOSE = 8  # EOS, after ESS
    DONE = 9  # padding


@dataclass(frozen=True)
class GrammarOptions:
    """Which sequences are legal.

    `structure_in_text` names the structure ids that may stand between text; BOI is ruled by `max_images`.
    """

    max_images: int | None = None  # images that may be generated in one sequence; 0: text only; None: any number
    stop_after_images: int | None = None  # generation ends at the EOI of this image; None: at EOS only
    begin_with_image: bool = False  # the first generated token is BOI (when the prompt does not end in an image)
    repeat_grid: bool = False  # later images of a sequence have the grid of the first
    max_side: int = 999  # of a grid, in tokens
    max_image_tokens: int = 16_384  # height * width of a grid
    emu3_format: bool = False  # the last row ends with EOL too, then EOF
    structure_in_text: tuple[str, ...] = ("eos", "ess", "boc", "eoc", "bog", "eog")

    def validate(self, problems: Problems, key: str = "grammar") -> None:
        problems.check(1 <= self.max_side < 10**MAX_DIGITS, f"{key}.max_side", f"must be in [1, {10**MAX_DIGITS - 1}]")
        problems.check(self.max_image_tokens > 0, f"{key}.max_image_tokens", "must be positive")


class StateRow(NamedTuple):
    """The fields of `GrammarState` of one sequence."""

    phase: int
    value: int
    num_digits: int
    height: int
    width: int
    position: int
    target_height: int
    target_width: int
    num_images: int


@dataclass
class GrammarState:
    """Where each of B sequences stands; every field is int64 [B]. Fields other than `phase` belong to the open image."""

    phase: torch.Tensor
    value: torch.Tensor  # the number read so far from the digits of one side
    num_digits: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    position: torch.Tensor  # codes read so far
    target_height: torch.Tensor  # the grid that the next image must have; 0: free
    target_width: torch.Tensor
    num_images: torch.Tensor  # images completed since the start

    @property
    def done(self) -> torch.Tensor:
        """bool [B]: nothing may follow."""
        return self.phase == Phase.DONE

    def select(self, rows: torch.Tensor) -> GrammarState:
        """The state of some rows (int64 or bool index)."""
        return GrammarState(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to_rows(self) -> list[StateRow]:
        """The state of each sequence."""
        columns = torch.stack([getattr(self, name) for name in StateRow._fields]).tolist()
        return [StateRow(*row) for row in zip(*columns, strict=True)]

    @classmethod
    def from_rows(cls, rows: Sequence[StateRow], device: torch.device) -> GrammarState:
        """The inverse of `to_rows`."""
        columns = torch.tensor(list(zip(*rows, strict=True)), dtype=torch.int64, device=device)
        return cls(**dict(zip(StateRow._fields, columns, strict=True)))


@dataclass
class ForcedRun:
    """Tokens that must follow, up to the first choice or to the end of the sequence."""

    ids: list[int] = field(default_factory=list)
    in_image: list[bool] = field(default_factory=list)  # the token belongs to an image block
    states: list[StateRow] = field(default_factory=list)  # behind each token


class ImageGrammar:
    """The machine. `digit_ids` are the text ids of "0" to "9" and `star_id` that of "*"."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        digit_ids: Sequence[int],
        star_id: int,
        options: GrammarOptions | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        assert len(set(digit_ids)) == 10, "ten different digit ids"
        self.vocabulary = vocabulary
        self.options = options or GrammarOptions()
        self.device = torch.device(device)
        self._header_ids = self._tensor([*digit_ids, star_id, vocabulary.img])
        self._header_column = torch.full((vocabulary.visual_start,), -1, device=self.device)
        self._header_column[self._header_ids] = torch.arange(12, device=self.device)
        self._text_mask = self._build_text_mask()
        self._forced_by_phase = self._build_forced_ids()
        self._forced_runs: dict[StateRow, ForcedRun] = {}

    def start(
        self, prompts: Sequence[Sequence[int]], grids: Sequence[tuple[int, int] | None] | None = None
    ) -> GrammarState:
        """The state after the prompts. A prompt may end inside an image block, which generation then completes.

        `grids` holds, for each prompt, the (height, width) in tokens that its images must have; None: free.
        """
        rows = len(prompts)
        zeros = {f.name: torch.zeros(rows, dtype=torch.int64, device=self.device) for f in fields(GrammarState)}
        state = GrammarState(**zeros)
        if self.options.begin_with_image:
            state.phase.fill_(Phase.BEGIN_IMAGE)
        self._read_open_images(state, prompts)
        for row, grid in enumerate(grids or ()):
            if grid is not None:
                assert all(1 <= side < 10**MAX_DIGITS for side in grid), f"sides have 1 to {MAX_DIGITS} digits: {grid}"
                state.target_height[row], state.target_width[row] = grid
        return state

    def forced(self, state: GrammarState) -> torch.Tensor:
        """int64 [B]: the only id that may follow, or -1 where there is a choice."""
        forced = self._forced_by_phase[state.phase]
        in_header = self._in_header(state)
        if not in_header.any():  # nearly always, and the rest takes as long as a layer
            return forced
        allowed = self._header_allowed(state)
        single = in_header & (allowed.sum(1) == 1)
        return torch.where(single, self._header_ids[allowed.int().argmax(1)], forced)

    def forced_run(self, row: StateRow) -> ForcedRun:
        """What must follow one sequence. Found once: the header of a grid takes as long as half a forward pass."""
        if row not in self._forced_runs:
            self._forced_runs[row] = self._walk_forced(row)
        return self._forced_runs[row]

    def _walk_forced(self, row: StateRow) -> ForcedRun:
        run, state = ForcedRun(), GrammarState.from_rows([row], self.device)
        while row.phase != Phase.DONE:
            ids = self.forced(state)
            if int(ids) < 0:
                break
            run.ids.append(int(ids))
            run.in_image.append(Phase.BEGIN_IMAGE <= row.phase <= Phase.IMAGE_END)
            state = self.advance(state, ids)
            (row,) = state.to_rows()
            run.states.append(row)
        return run

    def below_visual_mask(self, state: GrammarState) -> torch.Tensor:
        """bool [B, visual_start]: the allowed text and structure ids (rows in the CODES phase are all False)."""
        return self._below_visual(self.mask_numbers(state))

    def mask(self, state: GrammarState) -> torch.Tensor:
        """bool [B, padded vocabulary]: the ids that may follow. Never empty; padded ids never."""
        return self.masks_of(self.mask_numbers(state))

    def mask_numbers(self, state: GrammarState) -> torch.Tensor:
        """int64 [B]: a name for each row's mask, the same for equal masks and small to keep; see `masks_of`."""
        may_open = (state.phase == Phase.TEXT) & self._may_start_image(state)
        numbers: torch.Tensor = state.phase * 2**HEADER_SIZE + may_open
        in_header = self._in_header(state)
        if in_header.any():
            powers = 2 ** torch.arange(HEADER_SIZE, device=self.device)
            numbers += torch.where(in_header, (self._header_allowed(state) * powers).sum(1), 0)
        return numbers

    def masks_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """bool [N, padded vocabulary] of `mask_numbers` (int64 [N]): what may stand at each of those places."""
        mask = torch.zeros((len(numbers), self.vocabulary.padded_size), dtype=torch.bool, device=self.device)
        mask[:, : self.vocabulary.visual_start] = self._below_visual(numbers)
        codes = numbers // 2**HEADER_SIZE == Phase.CODES
        mask[:, self.vocabulary.visual_start : self.vocabulary.size] = codes[:, None]
        return mask

    def _below_visual(self, numbers: torch.Tensor) -> torch.Tensor:
        phase, detail = numbers // 2**HEADER_SIZE, numbers % 2**HEADER_SIZE
        mask = torch.zeros((len(numbers), self.vocabulary.visual_start), dtype=torch.bool, device=self.device)
        text = phase == Phase.TEXT
        mask[text] = self._text_mask
        mask[:, self.vocabulary.boi] = text & (detail == 1)
        in_header = (phase == Phase.HEIGHT) | (phase == Phase.WIDTH)
        header_rows = torch.zeros((int(in_header.sum()), mask.shape[1]), dtype=torch.bool, device=self.device)
        powers = 2 ** torch.arange(HEADER_SIZE, device=self.device)
        header_rows[:, self._header_ids] = (detail[in_header, None] // powers) % 2 == 1
        mask[in_header] = header_rows
        forced = self._forced_by_phase[phase]
        rows = torch.nonzero(forced >= 0).squeeze(1)
        mask[rows, forced[rows]] = True
        return mask

    def advance(self, state: GrammarState, ids: torch.Tensor) -> GrammarState:
        """The state after one more id for each row (int64 [B]), which must be allowed."""
        value, num_digits, height, width = self._read_header(state, ids)
        position = torch.where(state.phase == Phase.CODES, state.position + 1, state.position)
        image_ends = state.phase == Phase.IMAGE_END
        num_images = state.num_images + image_ends
        repeats = image_ends & self.options.repeat_grid
        after = GrammarState(
            state.phase,
            value,
            num_digits,
            height,
            width,
            position,
            torch.where(repeats, height, state.target_height),
            torch.where(repeats, width, state.target_width),
            num_images,
        )
        after.phase = self._next_phase(state, after, ids)
        return after

    def _read_header(self, state: GrammarState, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Value, number of digits, height and width after `ids`."""
        opens = (state.phase == Phase.TEXT) | (state.phase == Phase.BEGIN_IMAGE)
        in_header = self._in_header(state)
        column = self._header_column[ids.clamp(0, self.vocabulary.visual_start - 1)]
        digit = in_header & (column >= 0) & (column < STAR)
        ends_side = in_header & (column >= STAR)
        clear = opens | ends_side
        value = torch.where(digit, state.value * 10 + column, state.value).masked_fill(clear, 0)
        num_digits = (state.num_digits + digit).masked_fill(clear, 0)
        height = torch.where(ends_side & (state.phase == Phase.HEIGHT), state.value, state.height)
        width = torch.where(ends_side & (state.phase == Phase.WIDTH), state.value, state.width)
        return value, num_digits, height, width

    def _next_phase(self, before: GrammarState, after: GrammarState, ids: torch.Tensor) -> torch.Tensor:
        vocabulary, options, phase = self.vocabulary, self.options, before.phase
        next_phase = phase.clone()

        def go(where: torch.Tensor, target: Phase | torch.Tensor) -> None:
            if isinstance(target, Phase):
                next_phase.masked_fill_(where, int(target))
            else:
                next_phase.copy_(torch.where(where, target, next_phase))

        text = phase == Phase.TEXT
        go(text & (ids == vocabulary.eos), Phase.DONE)
        go(text & (ids == vocabulary.ess), Phase.CLOSE)
        go((text & (ids == vocabulary.boi)) | (phase == Phase.BEGIN_IMAGE), Phase.HEIGHT)
        go((phase == Phase.HEIGHT) & (after.num_digits == 0), Phase.WIDTH)
        ends_header = (phase == Phase.WIDTH) & (after.num_digits == 0)
        reads_code = phase == Phase.CODES
        go(ends_header | (phase == Phase.ROW_END), Phase.CODES)
        whole = after.position == after.height * after.width
        row_ends = reads_code & (after.position % after.width.clamp(min=1) == 0)
        if options.emu3_format:
            go(row_ends, Phase.ROW_END)
            go((phase == Phase.ROW_END) & whole, Phase.FRAME_END)
            go(phase == Phase.FRAME_END, Phase.IMAGE_END)
        else:
            go(row_ends, Phase.ROW_END)
            go(row_ends & whole, Phase.IMAGE_END)
        after.position = after.position.masked_fill(ends_header, 0)
        image_ends = phase == Phase.IMAGE_END
        go(image_ends, Phase.TEXT)
        if options.stop_after_images is not None:
            go(image_ends & (after.num_images >= options.stop_after_images), Phase.DONE)
        go(phase == Phase.CLOSE, Phase.DONE)
        return next_phase

    def _header_allowed(self, state: GrammarState) -> torch.Tensor:
        """bool [B, 12]: which digits, `*` and IMG may follow in a header. Meaningless for rows outside one."""
        in_height = state.phase == Phase.HEIGHT
        target = torch.where(in_height, state.target_height, state.target_width)
        limit = self.options.max_image_tokens // torch.where(in_height, 1, state.height.clamp(min=1))
        limit = limit.clamp(max=self.options.max_side)
        value = state.value[:, None] * 10 + torch.arange(10, device=self.device)
        is_prefix = torch.stack([value == (target // 10**k)[:, None] for k in range(MAX_DIGITS)]).any(0)
        digits = torch.where((target > 0)[:, None], is_prefix, value <= limit[:, None]) & (value >= 1)
        ends = torch.where(target > 0, state.value == target, state.num_digits >= 1)
        return torch.cat([digits, (ends & in_height)[:, None], (ends & ~in_height)[:, None]], dim=1)

    def _may_start_image(self, state: GrammarState) -> torch.Tensor:
        limit = self.options.max_images
        return torch.ones_like(state.done) if limit is None else state.num_images < limit

    def _read_open_images(self, state: GrammarState, prompts: Sequence[Sequence[int]]) -> None:
        """Replays, for each prompt that ends inside an image block, that block."""
        boi, eoi = self.vocabulary.boi, self.vocabulary.eoi
        for row, prompt in enumerate(prompts):
            ids = self._tensor(prompt)
            opened = torch.nonzero(ids == boi)
            if len(opened) and not (ids[opened[-1] :] == eoi).any():
                single = state.select(self._tensor([row]))
                single.phase.fill_(Phase.TEXT)
                for index in range(int(opened[-1]), len(ids)):
                    single = self.advance(single, ids[index : index + 1])
                for item in fields(GrammarState):
                    getattr(state, item.name)[row] = getattr(single, item.name)[0]

    def _in_header(self, state: GrammarState) -> torch.Tensor:
        return (state.phase == Phase.HEIGHT) | (state.phase == Phase.WIDTH)

    def _build_text_mask(self) -> torch.Tensor:
        mask = torch.zeros(self.vocabulary.visual_start, dtype=torch.bool, device=self.device)
        mask[: self.vocabulary.text_size] = True
        for name in self.options.structure_in_text:
            mask[self.vocabulary.structure[name]] = True
        return mask

    def _build_forced_ids(self) -> torch.Tensor:
        vocabulary = self.vocabulary
        forced = {
            Phase.BEGIN_IMAGE: vocabulary.boi,
            Phase.ROW_END: vocabulary.eol,
            Phase.FRAME_END: vocabulary.eof,
            Phase.IMAGE_END: vocabulary.eoi,
            Phase.CLOSE: vocabulary.eos,
            Phase.DONE: vocabulary.pad,
        }
        return self._tensor([forced.get(phase, -1) for phase in Phase])

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(list(values), dtype=torch.int64, device=self.device)
