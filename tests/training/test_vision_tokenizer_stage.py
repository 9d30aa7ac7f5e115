"""The vision tokenizer's stage: images out of shards, determinism, bitwise resume, collapse."""

from __future__ import annotations

import io
import tarfile
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.checkpoint.reader import CheckpointReader
from model.errors import UserError
from model.registry import checked_options
from model.vision_tokenizer import load_vision_tokenizer
from model.vision_tokenizer.wrapper import to_model_range
from training import stage
from training.config import StageConfig, TrainConfig
from training.objectives.registry import make_objective
from training.reliability.checkpoint import CheckpointStore
from training.tokenizers import vision
from training.tokenizers.codes import CALIBRATION_BATCHES
from training.tokenizers.collisions import describe_collisions
from training.tokenizers.image_data import BatchShare, ImageSource, busiest_crops, squares
from training.tokenizers.image_stream import StreamingImageSource
from training.tokenizers.vision import VisionTokenizerOptions, measure

MODEL = {
    "ch": 8,
    "ch_mult": [1, 1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "resolution": 48,
    "z_channels": 8,
    "embed_dim": 8,
    "n_embed": 32,
    "norm_groups": 4,
    "cosine_similarity": True,
    "logit_scale": 10.0,
    "mid_attention": False,
    "norm_scope": "pixel",
    "padding_mode": "replicate",
}


def png(seed, height=48, width=48):
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 245, dtype=np.uint8)
    top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
    pixels[top : top + 12, left : left + 12] = rng.integers(0, 256, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, entries):
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    entries = []
    for index in range(20):
        entries += [(f"{index:03d}.png", png(index)), (f"{index:03d}.txt", b"a box")]
    entries += [("020.png", b"not a picture"), ("020.txt", b"broken"), ("021.xyz", b"?")]
    write_tar(folder / "scenes.tar", entries)
    edits = []
    for index in range(4):
        edits += [
            (f"{index}.instruction.txt", b"move it"),
            (f"{index}.source_0.png", png(100 + index, 40, 80)),
            (f"{index}.target.png", png(200 + index, 40, 80)),
        ]
    write_tar(folder / "edits.tar", edits)
    return folder


def make_config(corpora, tmp_path, **options):
    data = {
        "corpora": {
            "scenes": {"path": str(corpora / "scenes.tar"), "weight": 3.0},
            "edits": {"path": str(corpora / "edits.tar")},
        },
        "views": [{"area": 2304, "share": 1.0}, {"area": 2304, "share": 1.0, "crop": 16, "crops_per_image": 2}],
        "num_held_back": 6,
    }
    values = {"model": MODEL, "data": data, "continuous_steps": 2, "average_decay": 0.9, "num_threads": 1}
    settings = StageConfig(
        name="vision_tokenizer",
        steps=6,
        global_batch_size=4,
        micro_batch_size=4,
        objective={"name": "vision_tokenizer"} | values | options,
    )
    return TrainConfig(run_folder=str(tmp_path), seed=5, stage=settings)


def parse_options(values):
    return checked_options(VisionTokenizerOptions, values, "stage.objective", "the objective vision_tokenizer")


def build(config):
    return stage.build(config, make_objective(config))


def forward_backward(job, batches):
    return job.objective.result(*job.engine.forward_backward(batches, job.objective).read())


def run_steps(job, first, last):
    losses = []
    for step in range(first, last):
        result = forward_backward(job, job.objective.images.batch(step * 4))
        job.engine.optimizer_step(1e-3, result.gradient_norm)
        losses.append(result.loss)
    return losses


def weights_of(engine):
    shards = engine.shards.model_shards() + engine.shards.optimizer_shards()
    return {shard.key: shard.tensor.clone() for shard in shards}


def test_batches_are_a_pure_function(corpora, tmp_path):
    first, second = (build(make_config(corpora, tmp_path)).objective.images for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert dict(first.num_bad) == {"corrupt_image": 1, "unknown_kind": 1}
    for start in (8, 0, 4):
        for a, b in zip(first.batch(start), second.batch(start), strict=True):
            assert np.array_equal(a, b)
    shapes = {images.shape[1:] for start in range(0, 80, 4) for images in first.batch(start)}
    # 40 x 80 pictures keep their aspect: 32 x 64 pixels hold no more than the area of 48 x 48.
    assert shapes == {(48, 48, 3), (32, 64, 3), (16, 16, 3)}
    trained = {image.tobytes() for images in first.images[2304] for image in images}
    assert [len(images) for images in first.held_back.values()] == [3, 2]
    assert not trained & {image.tobytes() for images in first.held_back.values() for image in images}


@pytest.mark.parametrize("streaming", [False, True])
def test_no_part_and_no_double_of_a_held_back_picture_is_trained_on(tmp_path, streaming):
    """Every picture is one flat colour, in two samples each; squares of it have its colour."""
    colours = [(20 * index, 255 - 20 * index, 128) for index in range(12)]
    entries = []
    for index in range(24):
        buffer = io.BytesIO()
        Image.fromarray(np.full((64, 64, 3), colours[index % 12], dtype=np.uint8)).save(buffer, "PNG")
        entries += [(f"{index:03d}.png", buffer.getvalue()), (f"{index:03d}.txt", b"flat")]
    write_tar(tmp_path / "flat.tar", entries)
    data = {
        "corpora": {"flat": {"path": str(tmp_path / "flat.tar"), "random_squares": 3}},
        "views": [{"area": 2304}],
        "num_held_back": 4,
        "streaming": streaming,
    }
    options = parse_options({"model": MODEL, "data": data})
    source = (StreamingImageSource if streaming else ImageSource)(options.data, 8, 3, BatchShare(16, 16))
    held_back = {tuple(image[0, 0]) for image in source.held_back["flat"]}
    trained = {tuple(image[0, 0]) for start in range(0, 640, 16) for images in source.batch(start) for image in images}
    source.close()
    assert 2 <= len(held_back) <= 4
    assert not trained & held_back
    assert len(trained) == 12 - len(held_back)


def test_resume_is_bitwise(corpora, tmp_path):
    config = make_config(corpora, tmp_path, restart_codes_every_steps=3)  # in the first step of the run that goes on
    whole = build(config)
    losses = run_steps(whole, 0, 6)

    broken = build(config)
    run_steps(broken, 0, 3)
    store = CheckpointStore(
        tmp_path / "vision_tokenizer", broken.engine.ranks, broken.engine.shards, 2, lambda phase: None
    )
    folder = store.save(3, broken.objective.metadata(), "")
    resumed = build(config)
    with CheckpointReader(folder) as reader:
        resumed.engine.shards.load_model(reader)
        resumed.engine.shards.load_optimizer(reader)
    assert run_steps(resumed, 3, 6) == losses[3:]
    expected, got = weights_of(whole.engine), weights_of(resumed.engine)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_free_codes_restart_where_their_step_says_and_no_others(corpora, tmp_path):
    job = build(make_config(corpora, tmp_path, continuous_steps=1, restart_codes_every_steps=2))
    objective = job.objective
    model, average = objective.model, objective.average
    run_steps(job, 0, 1)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.quantize.embedding.weight[:5] = -model.quantize.embedding.weight[5:].mean(dim=0)  # behind the others
            average.quantize.embedding.weight.fill_(7.0)
        before = model.quantize.embedding.weight.detach().clone()
        batches = [batch for start in range(0, 4 * CALIBRATION_BATCHES, 4) for batch in objective.images.batch(start)]
        taken = {code for batch in batches for code in model.encode(to_model_range(batch)).flatten().tolist()}
        with mock.patch.object(objective.images, "batch", wraps=objective.images.batch) as read:
            result = forward_backward(job, read(4 * step))
        placed_on = [call.args[0] for call in read.call_args_list[1:]]
        assert placed_on == ([] if step == 3 else list(range(0, 4 * CALIBRATION_BATCHES, 4)))
        changed = (model.quantize.embedding.weight != before).any(dim=1)
        if step == 1:
            assert changed.all(), "the codes start"
        elif step == 2:
            assert taken, "or nothing shows that those stay"
            assert set(torch.nonzero(~changed).flatten().tolist()) == taken
            assert changed[:5].all()
        else:
            assert not changed.any()
        moved = average.quantize.embedding.weight == model.quantize.embedding.weight
        assert torch.equal(moved.all(dim=1), changed)
        job.engine.optimizer_step(1e-3, result.gradient_norm)


def test_codes_restart_within_six_tenths_of_the_stage():
    options = parse_options({"model": MODEL, "data": {"corpora": {"a": {"path": "x"}}}, "continuous_steps": 4})
    assert not any(options.restarts_codes(step, 20) for step in range(20))
    options.restart_codes_every_steps = 2
    assert [step for step in range(20) if options.restarts_codes(step, 20)] == [6, 8, 10, 12]
    assert [step for step in range(20) if options.starts_codes(step)] == [4]


@pytest.mark.parametrize(("every", "continuous"), [(4, 2), (3, 3), (100, 0)])
def test_restarts_that_never_come_are_refused(every, continuous, corpora, tmp_path):
    config = make_config(corpora, tmp_path, continuous_steps=continuous, restart_codes_every_steps=every)
    with pytest.raises(UserError, match=r"restart_codes_every_steps.*has no effect"):
        stage.validate(config)


def test_saved_tokenizer_loads_and_matches(corpora, tmp_path):
    job = build(make_config(corpora, tmp_path))
    run_steps(job, 0, 4)
    stage_folder = tmp_path / "vision_tokenizer"
    CheckpointStore(stage_folder, job.engine.ranks, job.engine.shards, 2, lambda phase: None).save(
        4, job.objective.metadata(), ""
    )
    tokenizer = load_vision_tokenizer(stage_folder)
    assert (tokenizer.factor, tokenizer.codebook_size) == (8, 32)
    codes = tokenizer.encode(np.stack(job.objective.images.held_back["scenes"]))
    metrics = job.objective.final_metrics()
    assert 0 < metrics["codebook_use"] <= 1
    for corpus in ("scenes", "edits"):
        assert metrics[f"psnr_db_{corpus}"] > 0
        expected = []
        for image in job.objective.images.held_back[corpus]:
            height, width = image.shape[:2]
            blocks = image.reshape(height // 8, 8, width // 8, 8, 3).astype(np.float64)
            error = blocks - blocks.mean(axis=(1, 3), keepdims=True)
            expected.append(10 * np.log10(255.0**2 / np.square(error).mean()))
        assert metrics[f"block_mean_psnr_db_{corpus}"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert np.unique(codes).size <= metrics["num_codes_used"]
    assert [value for name, value in metrics.items() if name.endswith("_of")] == [1]  # all scenes have one caption


def test_different_pictures_of_the_same_codes_are_named_by_their_captions(corpora, tmp_path):
    job = build(make_config(corpora, tmp_path))
    pixels = [np.asarray(Image.open(io.BytesIO(png(seed)))) for seed in range(3)]
    images = dict(zip(("red", "blue", "green"), pixels, strict=True)) | {"also red": pixels[0]}
    captioned = {2304: images, 576: {}}
    model = job.objective.model
    codes = {name: model.encode(to_model_range(image[None])).tolist() for name, image in images.items()}
    apart = describe_collisions(model, captioned)
    pairs = [("red", "blue"), ("red", "green"), ("blue", "green")]
    assert apart["colliding_captions_2304"] == sum(codes[one] == codes[other] for one, other in pairs)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(torch.ones(32, 8))
    assert describe_collisions(model, captioned) == {
        "colliding_captions_2304": 3,
        "colliding_captions_2304_of": 4,
        "colliding_captions_2304_names": ["blue / green", "blue / red", "green / red"],
        "colliding_captions_576": 0,
        "colliding_captions_576_of": 0,
        "colliding_captions_576_names": [],
    }


def test_training_lowers_the_loss_and_reports(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "PICTURES_EVERY_STEPS", 20)
    config = make_config(corpora, tmp_path, continuous_steps=15)
    job = build(config)
    losses = run_steps(job, 0, 30)
    pictures = sorted((config.stage_folder / "answers").rglob("*.png"))
    assert [path.name for path in pictures] == ["edits_0.png", "edits_1.png", "scenes_0.png", "scenes_1.png"]
    original = job.objective.images.held_back["scenes"][0]
    kept = np.asarray(Image.open(pictures[2]))
    assert pictures[2].parent.name == "step_000020"
    assert np.array_equal(kept[:, : original.shape[1]], original)
    assert kept.shape == (original.shape[0], 2 * original.shape[1], 3)
    assert np.mean(losses[10:15]) < 0.7 * losses[0]
    result = forward_backward(job, job.objective.images.batch(0))
    assert {"psnr_db", "codes_used", "loss_l1", "loss_l2", "loss_quantization"} <= result.metrics.keys()
    assert np.isfinite(result.gradient_norm)


def test_collapse_stops_the_stage(corpora, tmp_path):
    job = build(make_config(corpora, tmp_path))
    with torch.no_grad():
        job.objective.model.quantize.embedding.weight.copy_(torch.ones(32, 8))
    with pytest.raises(UserError, match="collapsed"):
        measure(job.objective.model, job.objective.images.held_back, min_codebook_use=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"chanels": 8}}, "chanels"),
        ({"model": {"ch": "many"}}, "stage.objective"),
        ({"data": {"corpora": {}}}, "no corpus given"),
        ({"restart_codes_every_steps": -1}, "restart_codes_every_steps"),
        ({"data": {"corpora": {"a": {"path": "x"}}, "views": [{"crop": 7}]}}, "views.0.crop"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        parse_options(options)


def test_missing_and_empty_corpora_are_refused(corpora, tmp_path):
    for path, message in ((tmp_path / "no_*.tar", "no input shards"), (tmp_path / "text.tar", "no usable images")):
        write_tar(tmp_path / "text.tar", [("0.txt", b"words")])
        with pytest.raises(UserError, match=message):
            build(make_config(corpora, tmp_path, data={"corpora": {"a": {"path": str(path)}}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.tensor": 2}, "parallel.data alone, got tensor 2"),
        ({"parallel.pipeline": 2, "parallel.context": 3}, "parallel.data alone, got pipeline 2, context 3"),
        ({"parallel.data": 2}, "4 is not a multiple of micro_batch_size \\* parallel.data = 8"),
    ],
)
def test_layouts_that_cut_the_module_or_the_batch_are_refused_before_anything_starts(
    changes, message, corpora, tmp_path
):
    config = make_config(corpora, tmp_path)
    for key, value in changes.items():
        setattr(config.parallel, key.partition(".")[2], value)
    with pytest.raises(UserError, match=message) as refused:
        stage.validate(config)
    assert str(refused.value).count("parallel") <= 4
    if config.parallel.data == 1:
        with pytest.raises(UserError, match="whole replicas"):
            build(config)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_are_the_same_whatever_the_number_of_replicas(micro, times, replicas):
    size = micro * times * replicas
    whole = BatchShare(size, micro).micro_batches
    parts = [BatchShare(size, micro, replica, replicas).micro_batches for replica in range(replicas)]
    assert [places for part in parts for places in part] == whole
    assert {len(part) for part in parts} == {times}
    assert [place for places in whole for place in places] == list(range(size))
    assert [len(places) for places in BatchShare(9, 5).micro_batches] == [5, 4]


def test_crops_and_squares():
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    image[20:24, 36:40] = 255
    image[2:3, 2:3] = 255
    crops = busiest_crops(image, 16, 2)
    assert np.array_equal(crops[0], image[16:32, 32:48])
    assert np.array_equal(crops[1], image[:16, :16])
    assert busiest_crops(image, 64, 2)[0] is image
    found = list(squares(image, 5, np.random.default_rng(0)))
    assert all(square.shape[0] == square.shape[1] >= 8 for square in found)
    assert next(squares(image, 0, np.random.default_rng(0))) is image
