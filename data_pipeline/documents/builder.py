"""Samples to documents: image blocks, interleaved video, any-to-image, chat.

Training documents and the prompts of inference are made by the same methods, so they never drift.
Formats: `src/utils/input_utils.py` and `configs/` of github.com/baaivision/Emu3.5. Where text
stands relative to video frames is not published; here it stands before the frame it precedes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.documents.prompts import ANSWER, GENERAL, NEXT_QUESTION, around_pictures, opening, task_number
from data_pipeline.documents.reading import ImageBlock, MalformedImageError, describe, parse_image_block
from data_pipeline.documents.tokenizers import TextTokenizer, encode_grid
from data_pipeline.storage.segments import TASK_SHIFT, Flag, Kind, segments_of
from model.vocabulary import Vocabulary

__all__ = [
    "Document",
    "DocumentBuilder",
    "ImageBlock",
    "MalformedImageError",
    "Part",
    "Picture",
    "Text",
    "Thought",
    "Turn",
    "describe",
    "document_id",
    "fraction",
    "parse_image_block",
]

IMAGE_FORMATS = ("emu35", "emu3")
# Plain numbers, as every document needs them: a look into an enumeration costs as much as half a document.
_TEXT, _STRUCTURE, _SPLITTABLE, _DOCUMENT_START = (
    int(value) for value in (Kind.TEXT, Kind.STRUCTURE, Flag.SPLITTABLE, Flag.DOCUMENT_START)
)


@dataclass(frozen=True)
class Text:
    text: str
    kind: Kind = Kind.TEXT  # TEXT or TRANSCRIPT
    time_ms: int = 0


@dataclass(frozen=True)
class Picture:
    codes: np.ndarray  # integers [h, w]; codes of the vision tokenizer, not token ids
    time_ms: int = 0


@dataclass(frozen=True)
class Thought:
    """A chain of thought: about the whole answer (BOG ... EOG), or about the picture that follows (BOC ... EOC)."""

    text: str
    of_image: bool = False


Part = Text | Picture | Thought


@dataclass(frozen=True)
class Turn:
    """A question, words and pictures in order, and its answer."""

    question: Sequence[Part]
    response: Sequence[Part]
    supervised: bool = True  # False: the answer is context, without loss


@dataclass(frozen=True)
class Document:
    tokens: np.ndarray  # int32 [n]
    segments: np.ndarray  # SEGMENT_DTYPE [k]; they cover the tokens without gap


def document_id(source: str, key: str, shard: str = "") -> int:
    """The stable id of a document, 64 bits: from its dataset's name, its sample's key and its shard's name.

    Many datasets number the samples of every shard from 0 again.
    """
    digest = hashlib.blake2b(
        "\0".join((source, key, shard) if shard else (source, key)).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little")


def fraction(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing else: for choices that a rerun must repeat."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


class _Draft:
    """Tokens and segments of a document as they are appended."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.records: list[tuple[int, int, int, int, int, int, int]] = []
        self.length = 0

    def add(
        self,
        tokens: Sequence[int] | np.ndarray,
        kind: int,
        flags: int = 0,
        grid: tuple[int, int] = (0, 0),
        time_ms: int = 0,
    ) -> None:
        count = len(tokens)
        if count == 0:
            return
        self.pieces.append(np.asarray(tokens, np.int32))
        self.records.append((self.length, count, int(kind), int(flags), *grid, time_ms))
        self.length += count

    def finish(self, identity: int, task: str = "") -> Document:
        task_bits, first = task_number(task) << TASK_SHIFT, _DOCUMENT_START
        records = [  # in the order of `SEGMENT_DTYPE`
            (0, start, length, kind, flags | task_bits | (0 if start else first), height, width, 0, identity, time_ms)
            for start, length, kind, flags, height, width, time_ms in self.records
        ]
        return Document(np.concatenate(self.pieces), segments_of(records))

    def tokens(self) -> list[int]:
        return np.concatenate(self.pieces).tolist()


class DocumentBuilder:
    """Lays out documents and prompts for one vocabulary and one text tokenizer.

    `image_format="emu35"` writes EOL between rows only; `"emu3"` also after the last row, and EOF.
    """

    def __init__(self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, image_format: str = "emu35"):
        assert image_format in IMAGE_FORMATS, image_format
        assert text_tokenizer.size <= vocabulary.text_size, "text ids would run into the others"
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.image_format = image_format
        self._bos, self._eos = (np.array([index], np.int32) for index in (vocabulary.bos, vocabulary.eos))

    def image_block(self, codes: np.ndarray) -> np.ndarray:
        """Codes [h, w] -> int32 tokens: BOI "h*w" IMG row EOL row ... EOI."""
        vocabulary = self.vocabulary
        height, width = codes.shape
        vocabulary.check_codes(codes)
        rows = np.full((height, width + 1), vocabulary.eol, np.int32)
        rows[:, :width] = vocabulary.codes_to_ids(codes.astype(np.int64))
        head = [vocabulary.boi, *encode_grid(self.text_tokenizer, height, width), vocabulary.img]
        if self.image_format == "emu3":
            body, tail = rows.reshape(-1), [vocabulary.eof, vocabulary.eoi]
        else:
            body, tail = rows.reshape(-1)[:-1], [vocabulary.eoi]
        return np.concatenate([head, body, tail]).astype(np.int32)

    # Documents of pretraining

    def text(self, identity: int, text: str, *, splittable: bool = True) -> Document:
        """Without a draft: there are more of these than of all others."""
        ids = self.text_tokenizer.encode_array(text)
        last, flags = len(ids) + 1, _SPLITTABLE if splittable else 0
        tokens = np.empty(last + 1, np.int32)  # a third of the time that joining three arrays takes
        tokens[:1], tokens[1:last], tokens[last:] = self._bos, ids, self._eos
        records = [
            (0, 0, 1, _STRUCTURE, _DOCUMENT_START, 0, 0, 0, identity, 0),
            (0, 1, last - 1, _TEXT, flags, 0, 0, 0, identity, 0),
            (0, last, 1, _STRUCTURE, 0, 0, 0, 0, identity, 0),
        ]
        if last == 1:
            del records[1]
        return Document(tokens, segments_of(records))

    def image_text(self, identity: int, caption: str, codes: np.ndarray, *, image_first: bool = False) -> Document:
        parts: list[Part] = [Text(caption), Picture(codes)]
        return self.interleaved(identity, parts[::-1] if image_first else parts)

    def x2i(self, identity: int, instruction: str, sources: Sequence[np.ndarray], target: np.ndarray) -> Document:
        sources_first = [Picture(codes) for codes in sources]
        return self.interleaved(identity, [*sources_first, Text(instruction), Picture(target)])

    def interleaved(self, identity: int, parts: Sequence[Part]) -> Document:
        """BOS, the parts in order, EOS: video with its transcript, and every other mixture."""
        draft = self._begin()
        self._add_parts(draft, parts)
        return self._end(draft, identity)

    def interleaved_prompt(self, parts: Sequence[Part]) -> list[int]:
        """A document's beginning, to be continued: BOS and the parts so far."""
        draft = self._begin()
        self._add_parts(draft, parts)
        return draft.tokens()

    # Chat: supervised fine-tuning and its prompts

    def chat(
        self,
        identity: int,
        task: str,
        question: str,
        images: Sequence[Picture],
        response: Sequence[Part],
        *,
        unconditional: bool = False,
    ) -> Document:
        """Prompt, BSS, response, ESS, EOS; loss on the response, ESS and EOS only."""
        turn = Turn([Text(question), *images], response)
        return self.conversation(identity, task, [turn], unconditional=unconditional)

    def conversation(
        self, identity: int, task: str, turns: Sequence[Turn], *, system: str = "", unconditional: bool = False
    ) -> Document:
        """The chat template, its question and answer again for each later turn; loss on supervised answers.

        The pictures of the first question stand where the template of its task has them, in one place; those of general
        chats and of later turns as they come. `unconditional` leaves the task and all questions out, as guidance at
        inference does; pictures and answers stay.
        """
        draft = self._begin(Flag.NO_LOSS)
        flags = 0
        for number, turn in enumerate(turns):
            is_first = number == 0
            self._ask(
                draft, self._question(turn.question, task, system, is_first=is_first, unconditional=unconditional)
            )
            flags = 0 if turn.supervised else Flag.NO_LOSS
            self._add_parts(draft, turn.response, flags)
            draft.add([self.vocabulary.ess], Kind.STRUCTURE, flags)
        draft.add([self.vocabulary.eos], Kind.STRUCTURE, flags)
        return draft.finish(identity, task)

    def _question(
        self, question: Sequence[Part], task: str, system: str, *, is_first: bool, unconditional: bool
    ) -> list[Part]:
        pictures = [part for part in question if isinstance(part, Picture)]
        words = " ".join(part.text for part in question if not isinstance(part, Picture))
        if is_first and unconditional:
            return with_words_joined([Text(opening()), *pictures, Text(ANSWER)])
        if unconditional:
            return with_words_joined([Text(NEXT_QUESTION), *pictures, Text(ANSWER)])
        if is_first and task != GENERAL:
            before, after = around_pictures(task, words, system)
            return with_words_joined([Text(before), *pictures, Text(after)])
        return with_words_joined([Text(opening("", system) if is_first else NEXT_QUESTION), *question, Text(ANSWER)])

    def answered(self, identity: int, prompt: Sequence[int], answer: Sequence[int], task: str = "") -> Document:
        """The document of a prompt's ids and of the ids that a model answered, as `chat` and `interleaved` lay them out.

        Of a chat, the prompt has no loss. The answer may have ended before its ESS and EOS, or between them. Raises
        `MalformedImageError` for a BOI that begins no whole image.
        """
        is_chat = self.vocabulary.bss in prompt
        ending = [self.vocabulary.ess, self.vocabulary.eos] if is_chat else [self.vocabulary.eos]
        body = list(answer)
        while body and body[-1] in ending:
            del body[-1]
        draft = _Draft()
        self._add_ids(draft, prompt, Flag.NO_LOSS if is_chat else 0)
        self._add_ids(draft, [*body, *ending])
        return draft.finish(identity, task)

    def _add_ids(self, draft: _Draft, ids: Sequence[int], flags: int = 0) -> None:
        at = 0
        while at < len(ids):
            end, kind, grid = at + 1, Kind.STRUCTURE, (0, 0)
            if ids[at] == self.vocabulary.boi:
                block = parse_image_block(ids[at:], self.vocabulary, self.text_tokenizer)
                end, kind, grid = at + block.num_tokens, Kind.IMAGE, block.grid
            elif ids[at] < self.vocabulary.text_size:
                kind = Kind.TEXT
                while end < len(ids) and ids[end] < self.vocabulary.text_size:
                    end += 1
            draft.add(ids[at:end], kind, flags, grid)
            at = end

    def chat_prompt(
        self, task: str, question: str, images: Sequence[Picture] = (), response_so_far: Sequence[Part] = ()
    ) -> list[int]:
        """BOS ... BSS and what is answered already: what a model fine-tuned on `chat` documents is given."""
        draft = self._chat_prompt(task, question, images, unconditional=False)
        self._add_parts(draft, response_so_far)
        return draft.tokens()

    def unconditional_prompt(self, images: Sequence[Picture] = (), response_so_far: Sequence[Part] = ()) -> list[int]:
        """The chat prompt without task and question, for guidance. Reference images and all that is answered stay."""
        draft = self._chat_prompt("", "", images, unconditional=True)
        self._add_parts(draft, response_so_far)
        return draft.tokens()

    def _chat_prompt(self, task: str, question: str, images: Sequence[Picture], unconditional: bool) -> _Draft:
        draft = self._begin(Flag.NO_LOSS)
        parts: list[Part] = [Text(question), *images]
        self._ask(draft, self._question(parts, task, "", is_first=True, unconditional=unconditional))
        return draft

    def _ask(self, draft: _Draft, question: Sequence[Part]) -> None:
        self._add_parts(draft, question, Flag.NO_LOSS)
        draft.add([self.vocabulary.bss], Kind.STRUCTURE, Flag.NO_LOSS)

    def _begin(self, flags: int = 0) -> _Draft:
        draft = _Draft()
        draft.add(self._bos, _STRUCTURE, flags)
        return draft

    def _end(self, draft: _Draft, identity: int) -> Document:
        draft.add(self._eos, _STRUCTURE)
        return draft.finish(identity)

    def _add_parts(self, draft: _Draft, parts: Sequence[Part], flags: int = 0) -> None:
        for part in parts:
            if isinstance(part, Text):
                tokens = self.text_tokenizer.encode_array(part.text)
                draft.add(tokens, part.kind, flags, time_ms=part.time_ms)
            elif isinstance(part, Thought):
                begin, end = ("boc", "eoc") if part.of_image else ("bog", "eog")
                draft.add([self.vocabulary.structure[begin]], Kind.STRUCTURE, flags)
                draft.add(self.text_tokenizer.encode_array(part.text), Kind.TEXT, flags)
                draft.add([self.vocabulary.structure[end]], Kind.STRUCTURE, flags)
            else:
                height, width = part.codes.shape
                block = self.image_block(part.codes)
                draft.add(block, Kind.IMAGE, flags, (height, width), part.time_ms)


def with_words_joined(parts: Sequence[Part]) -> list[Part]:
    """Texts that follow one another as one, so that it is tokenized as a whole."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined
