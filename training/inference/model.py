"""A trained checkpoint that answers prompts: tokens of the prompt in, text and pictures out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents.builder import DocumentBuilder, Part, Picture, Text
from data_pipeline.documents.reading import split_parts
from data_pipeline.documents.templates import split_context
from data_pipeline.documents.tokenizers import TextTokenizer, encode_grid
from data_pipeline.sources.image import ImageConfig, smart_resize
from model.errors import UserError
from model.generation.ar import Decoder, Generation, Grid
from model.generation.decoding_config import DecodingConfig
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.paths import DiscretePath, make_path
from model.generation.settings import PhaseSampling, SamplingConfig
from model.generation.strategies import DecodingMetrics, Strategy, make_strategy
from model.vocabulary import Vocabulary
from training.inference.choice import check_whole_tokens
from training.inference.loading import VisionTokenizer, load_checkpoint
from training.inference.prompts import FORMATS, INTERLEAVED_TASK, INTERLEAVED_TASKS, InferenceOptions, Output, Prompt

ENCODER_BATCH_SIZE = 64  # pictures


class InferenceModel:
    """A decoder with its tokenizers. `load` makes one from a checkpoint folder."""

    def __init__(
        self,
        decoder: Decoder | None,
        vocabulary: Vocabulary,
        text_tokenizer: TextTokenizer,
        vision_tokenizer: VisionTokenizer,
        *,
        max_sequence_length: int,
        image_format: str = "emu35",
        options: InferenceOptions | None = None,
        device: str = "cpu",
        checkpoint: str = "",
        dida: dict[str, Any] | None = None,
        diagonal: dict[str, Any] | None = None,
        rollout: dict[str, Any] | None = None,
    ) -> None:
        """`dida`: what the checkpoint's manifest says of parallel image decoding; None: it was not trained for it.

        `diagonal`: the same of decoding by diagonals.
        `rollout`: what it says of how reinforcement learning drew its answers; None: it was not trained so.
        """
        self.decoder, self.vocabulary = decoder, vocabulary
        self.text_tokenizer, self.vision_tokenizer = text_tokenizer, vision_tokenizer
        self.max_sequence_length, self.device = max_sequence_length, device
        self.checkpoint = checkpoint  # the folder that it comes from
        self.options = options or InferenceOptions()
        self.dida, self.diagonal, self.rollout = dida, diagonal, rollout
        self.decoding, self.decoding_metrics = DecodingConfig(), DecodingMetrics()
        self._path: DiscretePath | None = None  # of `decode_with`
        self._grammars: dict[GrammarOptions, ImageGrammar] = {}
        self.builder = DocumentBuilder(vocabulary, text_tokenizer, image_format)
        *digits_from_one, zero, self.star_id, _ = encode_grid(text_tokenizer, 1234567890, 1)
        self.digit_ids = [zero, *digits_from_one]

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        text_tokenizer: Path | str | None = None,
        vision_tokenizer: Path | str | None = None,
        options: InferenceOptions | None = None,
        *,
        untrained: bool = False,
    ) -> InferenceModel:
        """The model of a checkpoint folder (or of the newest one of a stage folder), in this process alone.

        The tokenizers are those that the checkpoint names, below its run folder, unless others are given; either way
        their fingerprints must be the recorded ones. `untrained` gives the stage's model with fresh weights instead.
        """
        loaded = load_checkpoint(checkpoint, text_tokenizer, vision_tokenizer, untrained=untrained)
        return cls(
            loaded.decoder,
            Vocabulary.from_config(loaded.config.vocabulary),
            loaded.text_tokenizer,
            loaded.vision_tokenizer,
            max_sequence_length=loaded.config.max_sequence_length,
            image_format=loaded.image_format,
            options=options,
            device=str(loaded.decoder.device),
            checkpoint=str(loaded.folder),
            dida=loaded.dida,
            diagonal=loaded.diagonal,
            rollout=loaded.rollout,
        )

    def sampling_as_trained(self, given: SamplingConfig) -> SamplingConfig:
        """`given`; where it sets no more than a length, the sampling of the answers that the checkpoint learnt from.

        A policy is good in the mode that it was trained in: one trained without guidance is worse with it, and the other
        way round. Raises KeyError or TypeError where the manifest is not what `Grpo.metadata` wrote.
        """
        plain = SamplingConfig(max_new_tokens=given.max_new_tokens)
        if self.rollout is None or given != plain:
            return given
        recorded = self.rollout["sampling"]
        text, image = (PhaseSampling(**recorded[name]) for name in ("text", "image"))
        return replace(plain, guidance_scale=float(recorded["guidance_scale"]), text=text, image=image)

    def decode_with(self, decoding: DecodingConfig) -> None:
        """From now on; `decoding_metrics` begin anew. Raises `UserError` for a checkpoint that cannot."""
        self.decoding, self.decoding_metrics, self._path = decoding, DecodingMetrics(), self._trained_path()
        self._strategy(self.grammar(), self.decoder)

    def _strategy(self, grammar: ImageGrammar, decoder: Decoder | None) -> Strategy:
        return make_strategy(
            self.decoding,
            decoder,
            grammar,
            self._path,
            self.decoding_metrics,
            self.options.max_batch_size,
            learnt_diagonals=self.diagonal is not None,
        )

    def _trained_path(self) -> DiscretePath | None:
        """The path that the checkpoint's copies were noised along; None: it was not trained on any."""
        if self.dida is None:
            return None
        codebook = self.vision_tokenizer.codebook() if self.dida["path"] == "metric" else None
        return make_path(self.dida, self.vocabulary.visual_size, codebook)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int = 0, first_index: int = 0
    ) -> list[Output]:
        """One answer for each prompt. Prompt i draws with index `first_index + i`, whatever its batch."""
        asked = self.ask(prompts, sampling, seed, range(first_index, first_index + len(prompts)))
        return self.outputs([one.generation for one in asked])

    def ask(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, draws: Sequence[int]) -> list[Asked]:
        """The answers as tokens, with the prompts that they follow; `draws` identify them to the random numbers."""
        questions = self.questions(prompts)
        groups: dict[GrammarOptions, list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            groups[question.grammar].append(index)
        answers: dict[int, Asked] = {}
        for indices in groups.values():
            group = [questions[index] for index in indices]
            found = self.sample(group, sampling, seed, [draws[index] for index in indices])
            for index, question, generation in zip(indices, group, found, strict=True):
                answers[index] = Asked(question.prompt, question.unconditional, generation)
        return [answers[index] for index in range(len(prompts))]

    def grammar(self, options: GrammarOptions | None = None) -> ImageGrammar:
        """The same of all answers: it remembers headers."""
        options = options or GrammarOptions()
        if options not in self._grammars:
            self._grammars[options] = ImageGrammar(self.vocabulary, self.digit_ids, self.star_id, options, self.device)
        return self._grammars[options]

    def questions(self, prompts: Sequence[Prompt]) -> list[Question]:
        """Prompts as tokens, with what may answer them."""
        return [
            Question(
                self._prompt_tokens(item),
                self._unconditional_tokens(item),
                self._grid(item),
                self._grammar_options(item.prompt),
            )
            for item in self._encode_prompts(prompts)
        ]

    def sample(
        self,
        questions: Sequence[Question],
        sampling: SamplingConfig,
        seed: int,
        draws: Sequence[int],
        decoder: Decoder | None = None,
    ) -> list[Generation]:
        """Answers to questions that share a grammar; `draws` identify them to the random numbers.

        `decoder` stands in place of the model's own, for a caller that wants to see each step.
        """
        assert self.decoder is not None, "only the tokenizers were loaded"
        grammar = self.grammar(questions[0].grammar)
        strategy = self._strategy(grammar, decoder or self.decoder)
        prompts = [question.prompt for question in questions]
        return strategy.sample(
            prompts,
            self._fit(sampling, prompts),
            seed,
            [question.grid for question in questions],
            [question.unconditional for question in questions],
            draws,
        )

    def picture(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [h * factor, w * factor, 3] of codes [h, w]."""
        return self._decode_images([codes])[0]

    def reconstruct(self, images: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[np.ndarray]:
        """Pictures through the vision tokenizer and back, at `image_size`."""
        return self._decode_images([picture.codes for picture in self._encode_images(images, image_size)])

    def _encode_prompts(self, prompts: Sequence[Prompt]) -> list[_EncodedPrompt]:
        sizes: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
        for prompt in prompts:
            if prompt.format not in FORMATS:
                raise UserError("unknown format of a prompt", expected=", ".join(FORMATS), got=prompt.format)
            sizes[prompt.image_size] += _pictures(prompt)
        codes = {size: iter(self._encode_images(images, size)) for size, images in sizes.items()}
        encoded = []
        for prompt in prompts:
            pictures = [next(codes[prompt.image_size]) for _ in _pictures(prompt)]
            in_order = iter(pictures)
            parts: list[Part] = [
                Text(part) if isinstance(part, str) else next(in_order)
                for part in (prompt.parts if prompt.format == "interleaved" else [])
            ]
            encoded.append(_EncodedPrompt(prompt, parts, pictures))
        return encoded

    def _encode_images(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> list[Picture]:
        """Codes of pictures, resized to the area of `size` (zeros: as they are, up to whole tokens); codes stay."""
        config = ImageConfig(max_area=size[0] * size[1], min_area=size[0] * size[1]) if size[0] else ImageConfig()
        factor = self.vision_tokenizer.factor
        resized = [smart_resize(image, config, factor) for image in images if image.ndim == 3]
        codes = iter(_by_shape(resized, self.vision_tokenizer.encode))
        return [Picture(np.asarray(next(codes) if image.ndim == 3 else image)) for image in images]

    def _decode_images(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        return _by_shape(codes, self.vision_tokenizer.decode)

    def _grammar_options(self, prompt: Prompt) -> GrammarOptions:
        base = GrammarOptions(
            emu3_format=self.builder.image_format == "emu3",
            repeat_grid=self.options.grids == "released",
            max_side=self.options.max_grid_side,
            max_image_tokens=self.options.image_tokens[1],
        )
        if prompt.format in INTERLEAVED_TASKS:
            return replace(base, max_images=self.options.max_images)
        if prompt.format != "interleaved":
            return replace(base, max_images=1, stop_after_images=1, begin_with_image=self.options.image_first)
        ends_with_text = bool(prompt.parts) and isinstance(prompt.parts[-1], str)
        limit = self.options.max_images
        first = self.options.image_first and ends_with_text
        return replace(base, max_images=limit, stop_after_images=limit, begin_with_image=first)

    def _prompt_tokens(self, item: _EncodedPrompt) -> list[int]:
        prompt = item.prompt
        if prompt.format != "interleaved":
            return self.builder.chat_prompt(prompt.format, prompt.text, item.pictures)
        if self.options.interleaved_as == "document":
            return self.builder.interleaved_prompt(item.parts)
        question, context, answered = split_context(item.parts, self.options.context_frames)
        return self.builder.chat_prompt(INTERLEAVED_TASK, question, context, answered)

    def _unconditional_tokens(self, item: _EncodedPrompt) -> list[int]:
        """The prompt of guidance: the pictures stay, the words of the question go; what is answered stays answered."""
        if item.prompt.format != "interleaved":
            return self.builder.unconditional_prompt(item.pictures)
        if self.options.interleaved_as == "document":
            return self.builder.interleaved_prompt(item.pictures)
        _, context, answered = split_context(item.parts, self.options.context_frames)
        return self.builder.unconditional_prompt(context, answered)

    def _grid(self, item: _EncodedPrompt) -> Grid | None:
        """The grid of the pictures to make; None: the model chooses (once, if later ones follow the first)."""
        height, width = item.prompt.image_size
        if self.options.grids == "released" and item.pictures:
            is_edit = item.prompt.format == "x2i" and len(item.pictures) == 1
            is_continued = item.prompt.format in ("interleaved", INTERLEAVED_TASK) and not height
            if is_edit or is_continued:
                rows, columns = item.pictures[-1].codes.shape
                self._check_trained(rows, columns)
                return rows, columns
        factor = self.vision_tokenizer.factor
        check_whole_tokens(height, width, factor)
        if not (height and width):
            return None
        self._check_trained(height // factor, width // factor)
        return height // factor, width // factor

    def _check_trained(self, rows: int, columns: int) -> None:
        trained = {"dida": self.dida, "verified": self.dida, "diagonal": self.diagonal}.get(self.decoding.strategy)
        if trained is not None:
            limits = (trained["heights"], trained["widths"])
            if not all(low <= side <= high for side, (low, high) in zip((rows, columns), limits, strict=True)):
                raise UserError(
                    "the checkpoint was not trained to decode images of this size in parallel",
                    expected="{} to {} x {} to {} visual tokens".format(*limits[0], *limits[1]),
                    got=f"{rows} x {columns}",
                    fix="decoding.strategy=ar, or another image size",
                )
        smallest, largest = self.options.image_tokens
        if not smallest <= rows * columns <= largest or max(rows, columns) > self.options.max_grid_side:
            raise UserError(
                "the image size is outside of what the model is asked for",
                expected=f"{smallest} to {largest} tokens, at most {self.options.max_grid_side} a side",
                got=f"{rows} x {columns} tokens of {self.vision_tokenizer.factor} pixels",
                fix="another image_size, or answers.image_tokens and answers.max_grid_side if it was trained on it",
            )

    def _fit(self, sampling: SamplingConfig, prompts: Sequence[list[int]]) -> SamplingConfig:
        """At most as many new tokens as the model's length leaves behind the longest prompt."""
        longest = max(len(prompt) for prompt in prompts)
        room = self.max_sequence_length - longest
        if room <= 0:
            raise UserError(
                "a prompt is longer than the model can read",
                got=f"{longest} tokens",
                expected=f"fewer than model.max_sequence_length = {self.max_sequence_length}",
                fix="give fewer or smaller pictures",
            )
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))

    def outputs(self, generations: Sequence[Generation]) -> list[Output]:
        """Text and pictures of answers; a picture that is cut short is left out."""
        split = [split_parts(generation.ids, self.vocabulary, self.text_tokenizer) for generation in generations]
        grids = [part for parts in split for part in parts if part.ndim == 2]
        pictures = iter(self._decode_images(grids))
        return [self._output(generation, parts, pictures) for generation, parts in zip(generations, split, strict=True)]

    def _output(self, generation: Generation, parts: list[np.ndarray], pictures: Iterator[np.ndarray]) -> Output:
        shown: list[str | np.ndarray] = []
        for part in parts:
            is_image = part.ndim == 2
            shown.append(next(pictures) if is_image else self.text_tokenizer.decode(part.tolist()))
        text = "".join(part for part in shown if isinstance(part, str))
        images = [part for part in shown if not isinstance(part, str)]
        codes = [part for part in parts if part.ndim == 2]
        return Output(text, images, shown, generation.ids, generation.log_probs, generation.finished, codes)


@dataclass(frozen=True)
class Question:
    """A prompt as tokens: what it is answered from."""

    prompt: list[int]
    unconditional: list[int]  # without what guidance leaves out
    grid: Grid | None  # of the pictures to make; None: the model chooses
    grammar: GrammarOptions


@dataclass(frozen=True)
class Asked:
    """An answer as tokens. The conditions are the ids before it, with and without what guidance leaves out."""

    prompt: Sequence[int]
    unconditional: Sequence[int]
    generation: Generation


@dataclass
class _EncodedPrompt:
    """A prompt with its pictures as codes: `parts` of an interleaved one, `pictures` in order of any."""

    prompt: Prompt
    parts: list[Part]
    pictures: list[Picture]


def _pictures(prompt: Prompt) -> list[np.ndarray]:
    if prompt.format == "interleaved":
        return [part for part in prompt.parts if not isinstance(part, str)]
    return list(prompt.images)


def _by_shape(arrays: Sequence[np.ndarray], function: Any) -> list[np.ndarray]:
    """`function` over batches of equal shape; results in the order of `arrays`."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, array in enumerate(arrays):
        by_shape[array.shape].append(index)
    results: dict[int, np.ndarray] = {}
    for indices in by_shape.values():
        for first in range(0, len(indices), ENCODER_BATCH_SIZE):
            batch = indices[first : first + ENCODER_BATCH_SIZE]
            results.update(zip(batch, function(np.stack([arrays[index] for index in batch])), strict=True))
    return [results[index] for index in range(len(arrays))]
