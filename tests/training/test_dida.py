"""The objective `dida`: which images get copies, what is learnt of them, and that nothing leaks either way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from image_rows import IDS, ROOM, ROW_TOKENS, Forward, batches_of, copy_places, dida_config, make_dida, micro_batch

from data_pipeline.loading.batch import MicroBatch
from model.errors import Problems, UserError
from model.generation.image_decoder import ImageDecoder
from model.generation.paths import FromReferencePath, Time, UniformPath
from training.contracts.inputs import LocalInput
from training.metrics import StepRecord
from training.objectives.dida import Dida
from training.objectives.dida_rows import DidaBatch, find_images
from training.objectives.next_token import NextToken

SEEDS = range(12)


class GivenScores:
    def __init__(self, log_probs: torch.Tensor) -> None:
        self.given = log_probs

    def weighted_losses(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -(self.given * weights).sum(), -self.given


def images_by_hand(rows: MicroBatch) -> list[tuple[int, int, int, int]]:
    """(start, length, height, width) of image blocks with loss, by a walk."""
    tokens, weights, found, at = rows.tokens.ravel().tolist(), rows.loss_weights.ravel(), [], 0
    while IDS.img in tokens[at:]:
        start = tokens.index(IDS.img, at)
        end = tokens.index(IDS.eoi, start)
        block = tokens[start + 1 : end]
        height = block.count(IDS.eol) + 1
        if weights[start] > 0:
            found.append((start, len(block) + 1, height, (len(block) + 1) // height - 1))
        at = end
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_images_are_those_that_are_learnt(seed: int) -> None:
    rows = micro_batch(seed)
    found = find_images(rows, IDS)
    values = [found.starts, found.lengths, found.heights, found.widths]
    assert list(zip(*(column.tolist() for column in values), strict=True)) == images_by_hand(rows)


def reference_by_hand(rows: MicroBatch, start: int, height: int, width: int) -> int:
    """Where the last block of this grid begins that stands before `start` in its document, by a walk; -1: there is none."""
    tokens, bounds = rows.tokens.ravel().tolist(), rows.cu_seqlens.tolist()
    first = max(bound for bound in bounds if bound <= start)
    found, at = -1, first
    while IDS.img in tokens[at:start]:
        at = tokens.index(IDS.img, at)
        block = tokens[at + 1 : tokens.index(IDS.eoi, at)]
        rows_of_codes = block.count(IDS.eol) + 1
        if (rows_of_codes, (len(block) + 1) // rows_of_codes - 1) == (height, width):
            found = at
        at += 1
    return found


def test_the_reference_is_the_last_image_of_its_grid_in_the_document() -> None:
    num_found = num_without_loss = 0
    for seed in range(60):
        rows = micro_batch(seed)
        images = find_images(rows, IDS)
        expected = [
            reference_by_hand(rows, *one)
            for one in zip(images.starts.tolist(), images.heights.tolist(), images.widths.tolist(), strict=True)
        ]
        assert images.references.tolist() == expected
        found = images.references[images.references >= 0]
        num_found += len(found)
        num_without_loss += int((rows.loss_weights.ravel()[found] == 0).sum())
    assert num_found > 20
    assert num_without_loss > 0, "what is not learnt is a reference too"


@pytest.mark.parametrize(("latest_time", "is_reference"), [(1e-9, True), (0.999, False)])
def test_copies_begin_as_their_references(latest_time: float, is_reference: bool) -> None:
    config = dida_config()
    objective = make_dida(config, start="reference", latest_time=latest_time)
    objective.path = FromReferencePath(UniformPath(18))
    from_noise = make_dida(config, latest_time=latest_time)
    num_references = num_others = num_clean = 0
    for batch in [one for first in range(0, 40, 4) for one in batches_of(config, first)]:
        found, flat = objective.inputs(batch), batch.rows.tokens.ravel()
        images, plain = batch.images, from_noise.inputs(replace(batch, prepared=None))
        for here, start, reference in zip(copy_places(found, batch), images.starts, images.references, strict=True):
            image = flat[start : start + len(here)]
            codes = IDS.is_visual(image)
            shown = found.tokens[here][codes]
            if reference < 0:
                assert np.array_equal(found.tokens[here], plain.tokens[here]), "the noise of the stage's path"
                num_others += int((shown != image[codes]).sum())
                continue
            expected = flat[reference : reference + len(here)][codes]
            num_references += len(expected)
            num_clean += int((shown != expected).sum())
            assert ((shown == expected) | (shown == image[codes])).all()
    assert num_references > 20
    assert num_others > 20, "without a reference there is noise"
    assert (num_clean == 0) == is_reference


def test_copies_fill_the_room_of_their_row_in_changing_choice() -> None:
    config = dida_config()
    kept, all_images = set(), set()
    for sample in range(0, 40, 4):
        for batch in batches_of(config, sample):
            images = find_images(batch.rows, IDS)
            assert batch.num_images == len(images.starts)
            for row in range(2):
                own = batch.images.lengths[batch.images.starts // ROW_TOKENS == row]
                assert own.sum() <= ROOM
                rest = set(images.starts[images.starts // ROW_TOKENS == row]) - set(batch.images.starts)
                lengths = dict(zip(images.starts, images.lengths, strict=True))
                assert all(lengths[start] > ROOM - own.sum() for start in rest), "one more would have fitted"
            kept |= set(batch.numbers)
            all_images |= {int(start) for start in images.starts}
    assert len(kept) > 20, "the test sees images"
    again = [one.numbers.tolist() for one in batches_of(config, 8)]
    assert again == [one.numbers.tolist() for one in batches_of(config, 8)]


@pytest.mark.parametrize(("path", "copies_an_image"), [("uniform", 1), ("metric", 1), ("uniform", 3)])
def test_what_is_learnt_of_rows_with_copies(path: str, copies_an_image: int) -> None:
    """Documents as without copies; of copies the codes alone, at the positions of the image."""
    config = dida_config()
    objective = make_dida(config, path=path, copies_an_image=copies_an_image)
    for batch in [one for first in (0, 4) for one in batches_of(config, first, copies=copies_an_image)]:
        plain, found = NextToken.inputs(objective, batch.rows), objective.inputs(batch)
        assert found.tokens.size == 2 * (ROW_TOKENS + ROOM)
        clean = found.fields["noisy"] == 0
        real = np.flatnonzero(clean)[: plain.tokens.size]
        for name in ("tokens", "labels", "weights", "position_ids"):
            assert np.array_equal(getattr(found, name)[real], getattr(plain, name))
        assert not found.weights[np.flatnonzero(clean)[plain.tokens.size :]].any(), "padding is not learnt"
        copies = np.flatnonzero(~clean)
        at = 0
        for start, length in zip(batch.images.starts, batch.images.lengths, strict=True):
            here, source = copies[at : at + length], slice(start, start + length)
            assert np.array_equal(found.position_ids[here], plain.position_ids[source])
            assert np.array_equal(found.labels[here], plain.labels[source])
            assert np.array_equal(found.weights[here] > 0, IDS.is_visual(plain.labels[source]))
            structure = ~IDS.is_visual(plain.tokens[source])
            assert np.array_equal(found.tokens[here][structure], plain.tokens[source][structure]), "never noised"
            assert IDS.is_visual(found.tokens[here][~structure]).all()
            at += length
        assert at == len(copies)


def test_a_clean_prefix_is_neither_noised_nor_learnt() -> None:
    config = dida_config()
    objective = make_dida(config, clean_prefix_share=1.0, latest_time=1e-9)  # all else is noise
    num_learnt = num_clean = 0
    for batch in batches_of(config, 0):
        plain, found = NextToken.inputs(objective, batch.rows), objective.inputs(batch)
        copies, at = np.flatnonzero(found.fields["noisy"] > 0), 0
        for start, length in zip(batch.images.starts, batch.images.lengths, strict=True):
            here, source = copies[at : at + length], slice(start, start + length)
            at += length
            codes = IDS.is_visual(plain.labels[source])
            learnt = (found.weights[here] > 0)[codes]
            same = (found.tokens[here] == plain.tokens[source])[IDS.is_visual(plain.tokens[source])]
            first = int(learnt.argmax()) if learnt.any() else len(learnt)
            assert learnt[first:].all(), "behind the prefix all is learnt"
            assert same[:first].all()
            num_learnt, num_clean = num_learnt + learnt.sum(), num_clean + first
    assert num_learnt > num_clean > 0


def test_the_loss_is_that_of_both_streams() -> None:
    config = dida_config()
    objective = make_dida(config, clean_weight=0.3)
    batches = batches_of(config, 0)
    totals, sums, expected = objective.totals(batches), np.zeros(objective.num_sums), [0.0, 0.0]
    loss = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        inputs = objective.inputs(batch)
        log_probs = -torch.rand(inputs.tokens.size, generator=generator)
        local = LocalInput(
            torch.from_numpy(inputs.labels),
            torch.from_numpy(inputs.weights),
            {name: torch.from_numpy(values) for name, values in inputs.fields.items()},
        )
        found = objective.loss(GivenScores(log_probs), local, torch.from_numpy(totals))  # type: ignore[arg-type]
        loss += float(found.loss)
        sums += found.sums.numpy()
        for stream in (0, 1):
            chosen = (inputs.fields["noisy"] == stream) * inputs.weights
            expected[stream] += float((-log_probs.numpy() * chosen).sum())
    clean_weight = sum(float(batch.rows.loss_weights.sum()) for batch in batches)
    num_codes = sum(int((batch.images.heights * batch.images.widths).sum()) for batch in batches)
    assert totals[-3] == num_codes
    mean = [expected[0] / clean_weight, expected[1] / num_codes]
    assert loss == pytest.approx(mean[1] + 0.3 * mean[0], rel=1e-5)
    result = objective.result(totals, sums, 1.0)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.metrics["loss_copies"] == pytest.approx(mean[1], rel=1e-5)
    assert result.metrics["loss_next_token"] == pytest.approx(mean[0], rel=1e-5)
    assert result.num_tokens == 4 * (ROW_TOKENS + ROOM)


def test_copies_of_one_image_share_the_way_among_them() -> None:
    """Each has its own number, and its time lies in its own part of the way."""
    config = dida_config()
    objective = make_dida(config, copies_an_image=4, latest_time=0.999, copy_tokens=4 * ROW_TOKENS)
    seen: list[float] = []

    class Watched(UniformPath):
        def corrupt(self, clean: torch.Tensor, time: Time, uniforms: torch.Tensor) -> torch.Tensor:
            assert isinstance(time, torch.Tensor)
            seen.extend(time[0].tolist())
            return super().corrupt(clean, time, uniforms)

    objective.path = Watched(18)
    for batch in batches_of(config, 0, room=ROW_TOKENS * 4, copies=4):
        seen.clear()
        inputs = objective.inputs(batch)
        codes = [int(IDS.is_visual(inputs.labels[at]).sum()) for at in copy_places(inputs, batch)]
        assert len(set(batch.numbers)) == len(batch.numbers) == 4 * batch.num_images, "there is room for all"
        first_codes = np.cumsum([0, *codes[:-1]])
        parts = [int(seen[at] / 0.999 * 4) for at in first_codes]
        assert parts == [0, 1, 2, 3] * batch.num_images


@pytest.fixture(scope="module")
def forward(single_process: None) -> Forward:
    return Forward(dida_config().model)


@pytest.fixture(scope="module")
def exact_forward(single_process: None) -> Forward:
    """In float64: in float32 one token of these rows is so ill-conditioned that kernels differ by over 1e-5."""
    found = Forward(dida_config().model)
    found.model.double()
    found.adapted.double()
    return found


def most_copied() -> tuple[Dida, DidaBatch]:
    config = dida_config()
    batches = [batch for sample in range(0, 24, 4) for batch in batches_of(config, sample)]
    return make_dida(config), max(batches, key=lambda batch: len(batch.numbers))


def test_the_clean_stream_is_that_without_copies(forward: Forward) -> None:
    objective, batch = most_copied()
    inputs = objective.inputs(batch)
    clean = np.flatnonzero(inputs.fields["noisy"] == 0)
    plain = forward(NextToken.inputs(objective, batch.rows))
    assert torch.allclose(forward(inputs)[clean[: len(plain)]], plain, atol=1e-5)
    other = inputs.tokens.copy()
    noisy_codes = (inputs.fields["noisy"] > 0) & IDS.is_visual(other)
    other[noisy_codes] = IDS.visual_start + (other[noisy_codes] - IDS.visual_start + 5) % 18
    before, after = forward(inputs), forward(replace(inputs, tokens=other))
    assert torch.equal(before[clean], after[clean]), "copies are seen by nothing clean"
    assert not torch.equal(before, after)


def test_copies_see_neither_their_clean_image_nor_what_follows(forward: Forward) -> None:
    objective, batch = most_copied()
    inputs = objective.inputs(batch)
    before = forward(inputs)
    copies = np.flatnonzero(inputs.fields["noisy"] > 0)
    clean = np.flatnonzero(inputs.fields["noisy"] == 0)
    bounds = np.cumsum(batch.images.lengths)
    for number, start in enumerate(batch.images.starts):
        own = copies[bounds[number] - batch.images.lengths[number] : bounds[number]]
        other = inputs.tokens.copy()
        document_end = batch.rows.cu_seqlens[np.searchsorted(batch.rows.cu_seqlens, start, "right")]
        changed = clean[start:document_end]  # the image and all behind it in its document
        other[changed] = (other[changed] + 7) % 30
        after = forward(replace(inputs, tokens=other))
        assert torch.equal(before[own], after[own])
        assert not torch.equal(before[changed], after[changed])


def test_adapters_on_copies_leave_everything_else_bit_for_bit(forward: Forward) -> None:
    objective, batch = most_copied()
    inputs = objective.inputs(batch)
    noisy = torch.from_numpy(inputs.fields["noisy"] > 0)
    plain, adapted = forward(inputs), forward(inputs, forward.adapted)
    assert torch.equal(adapted[~noisy], plain[~noisy])
    assert not torch.isclose(adapted[noisy], plain[noisy]).all(dim=1).any(), "every token of a copy is adapted"
    text = NextToken.inputs(objective, batch.rows)
    assert torch.equal(forward(text, forward.adapted), forward(text)), "rows without copies"
    ours, theirs = ImageDecoder(forward.adapted), ImageDecoder(forward.model)
    assert torch.equal(ours.start([[1, 2, 3]], 4), theirs.start([[1, 2, 3]], 4)), "token by token"
    assert torch.equal(ours.step(torch.tensor([4])), theirs.step(torch.tensor([4])))


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_what_no_copy_sees_can_be_left_out(exact_forward: Forward, which: str) -> None:
    """The same copies with the same logits in shorter rows, and nothing else that is learnt."""
    config, model = dida_config(), getattr(exact_forward, which)
    whole = make_dida(config, clean_weight=0.0)
    short = make_dida(config, clean_weight=0.0, clean_tokens=ROW_TOKENS - 8)
    num_copies = 0
    for sample in range(0, 24, 4):
        batches = batches_of(config, sample, clean_tokens=ROW_TOKENS - 8)
        for batch in batches:
            expected, found = whole.inputs(batch), short.inputs(replace(batch, prepared=None))
            assert found.tokens.size == 2 * (ROW_TOKENS - 8 + ROOM)
            there, here = (np.flatnonzero(inputs.fields["noisy"] > 0) for inputs in (expected, found))
            for name in ("tokens", "labels", "weights", "position_ids"):
                assert np.array_equal(getattr(found, name)[here], getattr(expected, name)[there])
            assert not found.weights[found.fields["noisy"] == 0].any()
            logits = exact_forward(found, model)[here], exact_forward(expected, model)[there]
            assert torch.allclose(*logits, rtol=0, atol=1e-6)
            num_copies += len(batch.numbers)
        made = [replace(batch, prepared=None) for batch in batches]
        totals = short.totals(made)
        sums = np.zeros(short.num_sums)
        sums[-1] = 5.0
        result = short.result(totals, sums, 1.0)
        assert result.metrics["loss_next_token"] is None
        assert StepRecord(1, result, 1e-3, 4, 0.5).to_line()["loss_next_token"] is None, "a line can say so"
        assert result.loss == result.metrics["loss_copies"] == 5.0 / totals[-3]
    assert num_copies > 20


@pytest.mark.parametrize("clean_tokens", [0, 12, 30])
def test_beginnings_of_documents_fit_their_room(clean_tokens: int) -> None:
    """Of each row, whichever copies were drawn; one copy more would not have fitted."""
    num_left_out = 0
    for sample in range(0, 60, 4):
        for batch in batches_of(dida_config(), sample, clean_tokens=clean_tokens):
            bounds, images = batch.rows.cu_seqlens, find_images(batch.rows, IDS)

            def beginnings(starts: np.ndarray, bounds: np.ndarray = bounds) -> int:
                firsts = bounds[np.searchsorted(bounds, starts, "right") - 1].tolist()
                last = {first: max(starts[firsts.index(first) :][: firsts.count(first)]) for first in firsts}
                return sum(int(stop - first) for first, stop in last.items())

            for row in range(2):
                own = batch.images.starts[batch.images.starts // ROW_TOKENS == row]
                assert not clean_tokens or beginnings(own) <= clean_tokens
                free = ROOM - int(batch.images.lengths[batch.images.starts // ROW_TOKENS == row].sum())
                for start, length in zip(images.starts, images.lengths, strict=True):
                    if start // ROW_TOKENS == row and start not in own:
                        num_left_out += 1
                        with_it = beginnings(np.sort(np.append(own, start)))
                        assert length > free or 0 < clean_tokens < with_it
    assert num_left_out > 5 or not clean_tokens


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_logits_of_copies_are_those_of_decoding(exact_forward: Forward, which: str) -> None:
    """The block behind a cached prefix, as a sampler reads it."""
    objective, batch = most_copied()
    inputs = objective.inputs(batch)
    model = getattr(exact_forward, which)
    trained, flat = exact_forward(inputs, model), batch.rows.tokens.ravel()
    decoder = ImageDecoder(model)
    places = copy_places(inputs, batch)
    for start, length, here in zip(batch.images.starts, batch.images.lengths, places, strict=True):
        first = batch.rows.cu_seqlens[np.searchsorted(batch.rows.cu_seqlens, start, "right") - 1]
        decoder.start([flat[first:start].tolist()], int(length))
        block = torch.from_numpy(inputs.tokens[here])[None]
        for _ in range(2):  # a look leaves no trace
            found = decoder.look(block, whole=True)[0]
            assert torch.allclose(found[:, : IDS.size], trained[here][:, : IDS.size], rtol=0, atol=1e-6)


def test_a_start_that_no_image_has_is_refused() -> None:
    images = [np.zeros((2, 2), np.int64)]
    objective = make_dida(dida_config(), start="reference")
    objective.look_at(images, num_references=1)
    assert objective.metadata()["dida"]["start"] == "reference"
    with pytest.raises(UserError, match="no image has another one of its size before it"):
        objective.look_at(images, num_references=0)
    make_dida(dida_config()).look_at(images, num_references=0)


def test_options_that_cannot_work_are_refused() -> None:
    problems = Problems()
    options = Dida.Options(path="metrik", c=-1.0, latest_time=1.0, document_attention="full", clean_prefix_share=2.0)
    options.copies_an_image, options.clean_tokens = 0, 4
    options.start = "middle"
    options.validate(problems, "stage.objective")
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    keys = ("path", "c", "latest_time", "document_attention", "clean_prefix_share", "copies_an_image")
    for key in (*keys, "clean_tokens", "start"):
        assert f"stage.objective.{key}" in str(caught.value)
    config = dida_config(tensor=2, context=2)
    config.stage.data.datasets = {}
    problems = Problems()
    Dida.Options(copy_tokens=33).validate_run(problems, config)
    with pytest.raises(UserError, match="97 is not a multiple"):
        problems.raise_if_any()
