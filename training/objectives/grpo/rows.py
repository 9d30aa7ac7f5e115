"""Answers as the trainer reads them: samples of a group, and micro-batches of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model.generation.grammar import HEADER_SIZE, Phase
from model.vocabulary import Vocabulary

TEXT, IMAGE = 0, 1  # modalities of a token
MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Sample:
    """One answer as tokens, with what the sampler said of them."""

    prompt: np.ndarray  # int32 [p]
    unconditional: np.ndarray  # int32 [u], the prompt of guidance; empty without
    ids: np.ndarray  # int32 [n]
    log_probs: np.ndarray  # float32 [n]; 0 where forced
    sampled: np.ndarray  # bool [n]; False where the grammar left no choice
    mask_numbers: np.ndarray  # int32 [n], see `ImageGrammar.masks_of`
    finished: bool

    @property
    def is_code(self) -> np.ndarray:
        """bool [n]: a visual code."""
        found: np.ndarray = self.mask_numbers // 2**HEADER_SIZE == Phase.CODES
        return found


@dataclass
class MicroBatch:
    """Rows one behind the other, flattened to T tokens. What concerns a token stands where it is predicted."""

    tokens: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T]
    bounds: np.ndarray  # int64, cumulated lengths of the documents, 0 first, padding last
    labels: np.ndarray  # int64 [T]
    learnt: np.ndarray  # float32 [T]: 1 where the label was sampled and its answer teaches
    fields: dict[str, np.ndarray] = field(default_factory=dict)  # [T] each
    answers: list[np.ndarray] = field(default_factory=list)  # places at which each answer's tokens are predicted


def micro_batch(
    samples: Sequence[Sample],
    advantages: Sequence[float | None],
    set_of: dict[int, int],
    temperatures: tuple[float, float],
    vocabulary: Vocabulary,
    multiple: int,
) -> MicroBatch:
    """Samples as one micro-batch, filled up to a multiple of `multiple` tokens (tensor-parallel ranks share them).

    `advantages`: None for an answer that is not learnt from. `set_of`: mask number -> number of the allowed set.
    `temperatures` of text and of images.
    """
    lengths = [len(s.prompt) + len(s.ids) for s in samples]
    guides = [_read_without_condition(sample, vocabulary) for sample in samples]
    total = sum(lengths) + sum(map(len, guides))
    size = max(1, -(-total // multiple)) * multiple
    batch = _empty(size, vocabulary.pad)
    starts = np.cumsum([0, *lengths, *map(len, guides)])
    batch.bounds = np.unique([*starts, size])
    num_segments = 0
    for row, (sample, advantage) in enumerate(zip(samples, advantages, strict=True)):
        start = int(starts[row])
        ids = np.concatenate([sample.prompt, sample.ids])
        batch.tokens[start : start + len(ids)] = ids
        batch.position_ids[start : start + len(ids)] = np.arange(len(ids))
        first = start + len(sample.prompt) - 1
        place = np.arange(first, first + len(sample.ids))
        batch.answers.append(place)
        batch.labels[place] = sample.ids
        batch.learnt[place] = sample.sampled & (advantage is not None)
        is_code, fields = sample.is_code, batch.fields
        fields["advantage"][place] = advantage or 0.0
        fields["sampler"][place] = sample.log_probs
        fields["allowed"][place] = [set_of[number] for number in sample.mask_numbers.tolist()]
        fields["modality"][place] = np.where(is_code, IMAGE, TEXT)
        fields["temperature"][place] = np.where(is_code, temperatures[1], temperatures[0])
        segments = segments_of(sample, vocabulary)
        fields["segment"][place] = num_segments + segments
        num_segments += int(segments.max(initial=-1)) + 1
        if len(sample.unconditional):
            _add_guide(batch, int(starts[len(samples) + row]), guides[row], place, sample, vocabulary)
    _add_padding_positions(batch, total)
    return batch


def segments_of(sample: Sample, vocabulary: Vocabulary) -> np.ndarray:
    """int64 [n]: number of the run of text or the image that each token belongs to."""
    begins = sample.ids == vocabulary.boi
    begins[1:] |= sample.ids[:-1] == vocabulary.eoi
    begins[:1] = False
    numbers: np.ndarray = begins.cumsum()
    return numbers


def inside_images(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """bool [n]: from BOI to EOI. The stream without the condition reads these tokens only."""
    opened = (ids == vocabulary.boi).cumsum()
    closed_before = (ids == vocabulary.eoi).cumsum() - (ids == vocabulary.eoi)
    found: np.ndarray = opened > closed_before
    return found


def _empty(size: int, pad: int) -> MicroBatch:
    fields: dict[str, np.ndarray] = {
        "advantage": np.zeros(size, np.float32),
        "sampler": np.zeros(size, np.float32),
        "allowed": np.full(size, -1, np.int64),
        "modality": np.zeros(size, np.int64),
        "segment": np.zeros(size, np.int64),
        "temperature": np.ones(size, np.float32),
        "partner": np.full(size, -1, np.int64),
    }
    return MicroBatch(
        np.full(size, pad, np.int64),
        np.zeros(size, np.int64),
        np.zeros(0, np.int64),
        np.full(size, pad, np.int64),
        np.zeros(size, np.float32),
        fields,
    )


def _read_without_condition(sample: Sample, vocabulary: Vocabulary) -> np.ndarray:
    """The document of the unconditional stream; empty without guidance."""
    if not len(sample.unconditional):
        return sample.unconditional
    return np.concatenate([sample.unconditional, sample.ids[inside_images(sample.ids, vocabulary)]])


def _add_guide(
    batch: MicroBatch, start: int, ids: np.ndarray, place: np.ndarray, sample: Sample, vocabulary: Vocabulary
) -> None:
    """Each code's partner is the last token that the unconditional stream had read when the code was drawn."""
    batch.tokens[start : start + len(ids)] = ids
    batch.position_ids[start : start + len(ids)] = np.arange(len(ids))
    inside = inside_images(sample.ids, vocabulary)
    num_read = len(sample.unconditional) + inside.cumsum() - inside
    batch.fields["partner"][place] = np.where(sample.is_code, start + num_read - 1, -1)


def _add_padding_positions(batch: MicroBatch, total: int) -> None:
    batch.position_ids[total:] = np.arange(len(batch.tokens) - total)
