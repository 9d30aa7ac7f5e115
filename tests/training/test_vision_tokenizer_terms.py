"""The tokenizer's stage with all of its losses and with streamed images: resume, start of the adversary, purity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_vision_tokenizer_stage import (
    MODEL,
    build,
    forward_backward,
    make_config,
    parse_options,
    png,
    run_steps,
    weights_of,
    write_tar,
)
from torch import nn

from launch.command_line import cli
from launch.composition.compose import compose_config
from model.checkpoint.reader import CheckpointReader
from model.errors import UserError
from model.vision_tokenizer import load_vision_tokenizer
from model.vision_tokenizer.config import ibq_emu35
from model.vision_tokenizer.wrapper import to_model_range
from training.reliability.checkpoint import CheckpointStore
from training.tokenizers.image_data import BatchShare, stack_by_size
from training.tokenizers.image_stream import StreamingImageSource


class Features(nn.Module):
    """A small backbone and teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolution(images)) + 0.01


class Maps(Features):
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        return [super().forward(images)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    for shard in range(3):
        entries = []
        for index in range(8):
            key = f"{shard}{index}"
            entries += [(f"{key}.txt", b"a box"), (f"{key}.png", png(10 * shard + index))]
        write_tar(folder / f"scenes_{shard}.tar", entries)
    pictures = {"a": b"not a picture", "b": png(77), "c": png(78)}
    entries = [(f"{k}.{e}", d) for k, png_bytes in pictures.items() for e, d in (("png", png_bytes), ("txt", b"x"))]
    write_tar(folder / "scenes.tar", entries)
    edits = [(f"{i}.{part}.png", png(100 + i, 40, 80)) for i in range(4) for part in ("source_0", "target")]
    edits += [(f"{i}.instruction.txt", b"move it") for i in range(4)]
    write_tar(folder / "edits.tar", sorted(edits))
    return folder


def all_terms(tmp_path: Path, start_step: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    save_file(Maps().state_dict(), tmp_path / "features.safetensors")
    weights = str(tmp_path / "features.safetensors")
    return {
        "perceptual": {"weight": 0.5, "backbone": f"{__name__}.Maps", "weights": weights},
        "adversarial": {"weight": 0.1, "start_step": start_step, "channels": 4, "num_layers": 2},
        "distillation": {"weight": 0.3, "teacher": f"{__name__}.Features", "weights": weights, "level": 2},
    }


def streamed(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "corpora": {
            "scenes": {"path": str(folder / "scenes*.tar"), "weight": 3.0},
            "edits": {"path": str(folder / "edits.tar")},
        },
        "views": [{"area": 2304}, {"area": 2304, "crop": 16, "crops_per_image": 2}],
        "num_held_back": 6,
        "streaming": True,
    } | changes


@pytest.mark.parametrize("published", [False, True])
def test_resume_is_bitwise_with_every_term(corpora: Path, tmp_path: Path, published: bool) -> None:
    terms = all_terms(tmp_path, 2)
    if published:  # as the open IBQ: the averages of LeCam are part of the state
        terms["adversarial"] |= {"weighting": "fixed", "generator": "non_saturating", "lecam_weight": 0.05}
    options = {"terms": terms, "data": streamed(corpora), "losses": {"entropy": 0.05, "consistency": 0.5}}
    config = make_config(corpora, tmp_path, **options)
    whole = build(config)
    losses = run_steps(whole, 0, 6)
    for broken_at in (1, 4):  # before and after the adversary joins
        broken = build(config)
        run_steps(broken, 0, broken_at)
        stage = tmp_path / f"stage_{broken_at}"
        store = CheckpointStore(stage, broken.engine.ranks, broken.engine.shards, 2, lambda phase: None)
        folder = store.save(broken_at, broken.objective.metadata(), "")
        resumed = build(config)
        with CheckpointReader(folder) as reader:
            resumed.engine.shards.load_model(reader)
            resumed.engine.shards.load_optimizer(reader)
        assert run_steps(resumed, broken_at, 6) == losses[broken_at:]
        expected, got = weights_of(whole.engine), weights_of(resumed.engine)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        # The tokenizer itself is saved under the published keys, nothing else among them.
        assert load_vision_tokenizer(stage).factor == 8
    assert any(key.startswith("optimizer/adversary/exp_avg/main") for key in expected)
    assert "optimizer/weights/terms.distillation.projection.weight" in expected


def test_the_adversary_joins_at_its_step_and_both_sides_learn(corpora: Path, tmp_path: Path) -> None:
    job = build(make_config(corpora, tmp_path, terms=all_terms(tmp_path, 2), continuous_steps=0))
    adversary = job.objective.adversary
    before = {name: value.clone() for name, value in adversary.model.state_dict().items()}
    for step in range(4):
        result = forward_backward(job, job.objective.images.batch(4 * step))
        names = {name for name in result.metrics if "adversarial" in name or "discriminator" in name}
        if step < 2:
            assert not names
            assert all(parameter.grad is None for parameter in adversary.model.parameters())
        else:
            assert names == {"loss_adversarial", "loss_discriminator", "discriminator_gradient_norm"}
            assert result.metrics["loss_adaptive_weight"] > 0
        assert {"loss_perceptual", "loss_distillation"} <= result.metrics.keys()
        job.engine.optimizer_step(1e-3, result.gradient_norm)
        after = adversary.model.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert bool(changed) == (step >= 2)
    # The last bias moves real and reconstructed logits alike: far from the hinges its gradient is zero.
    assert set(before) - set(changed) <= {"main.8.bias"}


def test_a_broken_discriminator_refuses_the_step(corpora: Path, tmp_path: Path) -> None:
    job = build(make_config(corpora, tmp_path, terms={"adversarial": {"weight": 1e-30, "channels": 4}}))
    with torch.no_grad():
        job.objective.adversary.model.main[0].weight.fill_(float("inf"))
    result = forward_backward(job, job.objective.images.batch(0))
    assert not np.isfinite(result.gradient_norm)


def test_each_term_moves_the_gradient_as_its_weight_says(corpora: Path, tmp_path: Path) -> None:
    """The gradient of the loss is that of its terms: doubling one weight adds that term's gradient once more."""

    def gradient(**weights: float) -> torch.Tensor:
        terms = {name: values | {"weight": weights.get(name, 0.0)} for name, values in all_terms(tmp_path).items()}
        job = build(make_config(corpora, tmp_path, terms=terms, continuous_steps=0))
        forward_backward(job, job.objective.images.batch(0))
        return torch.cat([p.grad.flatten().clone() for p in job.objective.model.parameters()])

    plain = gradient()
    for name in ("perceptual", "distillation"):
        once, twice = gradient(**{name: 1.0}) - plain, gradient(**{name: 2.0}) - plain
        assert once.abs().max() > 1e-4
        torch.testing.assert_close(twice, 2 * once, atol=1e-5, rtol=1e-3)


def test_streamed_batches_are_a_pure_function_whatever_is_cached(corpora: Path) -> None:
    def source(seed: int = 3, micro: int = 5, **changes: Any) -> StreamingImageSource:
        options = parse_options({"model": MODEL, "data": streamed(corpora, **changes)})
        return StreamingImageSource(options.data, 8, seed, BatchShare(9, micro))

    first = source()
    others = [source(cache_bytes=0), source(cache_bytes=30_000, num_readers=1)]
    for start in (18, 0, 9, 18):
        expected = first.batch(start)
        limits = {16: 10}
        assert all(len(images) <= limits.get(images.shape[1], 5) for images in expected)
        for other in others:
            for a, b in zip(expected, other.batch(start), strict=True):
                assert np.array_equal(a, b)
    assert all(other.fingerprint == first.fingerprint for other in others)
    assert others[0].cached_bytes == 0
    assert 0 < others[1].cached_bytes <= 30_000
    assert source(seed=4).fingerprint != first.fingerprint
    assert any(not np.array_equal(a, b) for a, b in zip(first.batch(0), source(seed=4).batch(0), strict=False))


def test_held_back_images_are_never_trained_on_and_bad_ones_are_counted(corpora: Path) -> None:
    options = parse_options({"model": MODEL, "data": streamed(corpora, views=[{"area": 2304}])})
    source = StreamingImageSource(options.data, 8, 0, BatchShare(32, 32))
    held_back = {image.tobytes() for images in source.held_back.values() for image in images}
    # A quarter of the small corpus at most; one picture of each sample.
    assert len(held_back) in (3, 4)
    seen = {image.tobytes() for start in range(0, 640, 32) for images in source.batch(start) for image in images}
    assert not seen & held_back
    # 24 + 2 readable scenes of their own pixels, 3 edits of one picture each: all are reached.
    assert len(seen) == 26 + 4 - len(held_back)
    assert source.num_bad["corrupt_image"] >= 1


@pytest.mark.parametrize("cut", [8192, 8800])  # between members; within one
def test_truncated_shards_keep_what_comes_before_the_damage(cut: int, corpora: Path, tmp_path: Path) -> None:
    content = (corpora / "scenes_0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:cut])
    data = streamed(corpora, corpora={"a": {"path": str(tmp_path / "cut.tar")}})
    options = parse_options({"model": MODEL, "data": data})
    source = StreamingImageSource(options.data, 8, 0, BatchShare(4, 4))
    assert 2 <= len(source.corpora[0]) < 8
    assert source.num_bad["truncated_tar"] == 1
    assert source.batch(0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("0.txt", b"words")], "no usable images"),
        (None, "no input shards"),
        ([(f"{i}.png", b"?") for i in range(9)], "almost no usable"),
    ],
)
def test_corpora_without_images_are_the_users(entries: Any, message: str, tmp_path: Path) -> None:
    if entries:
        write_tar(tmp_path / "a.tar", entries)
    data = {"corpora": {"a": {"path": str(tmp_path / "a.tar")}}, "streaming": True}
    options = parse_options({"model": MODEL, "data": data})
    with pytest.raises(UserError, match=message):
        StreamingImageSource(options.data, 8, 0, BatchShare(4, 4)).batch(0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"perceptual": {"weight": 1.0}}, "needs the weights"),
        ({"distillation": {"weight": 1.0}}, "names no teacher"),
        ({"distillation": {"level": 9}}, "distillation.level"),
        ({"adversarial": {"start_step": -1}}, "start_step"),
        ({"adversary": {}}, "adversary"),
    ],
)
def test_bad_terms_are_refused(terms: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_options({"terms": terms, "data": {"corpora": {"a": {"path": "x"}}}})


def test_stacks_have_one_size() -> None:
    images = [np.zeros((8, 8, 3), np.uint8)] * 5 + [np.zeros((8, 16, 3), np.uint8)] * 2
    assert [len(stack) for stack in stack_by_size(images)] == [5, 2]


def test_the_published_stage_composes_and_a_small_one_runs(corpora: Path, tmp_path: Path, capfd: Any) -> None:
    config = compose_config("train", ["stage=vision_tokenizer", "stage.objective.data.corpora.a.path=x"])
    options = parse_options(config.stage.objective_options)
    assert options.model == ibq_emu35()
    assert (options.model.factor, options.model.n_embed, options.model.num_res_blocks) == (16, 131_072, 4)
    assert (config.stage.steps, config.stage.optimizer.beta2) == (500_000, 0.9)
    assert (
        cli.main(
            [
                "train",
                "stage=vision_tokenizer",
                "vision_tokenizer=ibq_small",
                f"run_folder={tmp_path}",
                f"stage.objective.data.corpora.a.path={corpora}/scenes*.tar",
                "stage.steps=2",
                "stage.global_batch_size=2",
                "stage.optimizer.warmup_steps=0",
                "stage.micro_batch_size=2",
                "stage.objective.num_threads=1",
                "stage.objective.data.views=[{area: 4096}]",
                "stage.objective.terms.adversarial.start_step=1",
                "stage.objective.min_codebook_use=0",
                "logging.wandb_mode=disabled",
                "json=true",
            ]
        )
        == 0
    )
    summary = json.loads(capfd.readouterr().out)
    assert summary["steps"] == 2
    assert summary["psnr_db"] > 0
    lines = (tmp_path / "vision_tokenizer" / "metrics.jsonl").read_text().splitlines()
    assert "loss_discriminator" not in lines[0]
    assert "loss_discriminator" in lines[1]
    tokenizer = load_vision_tokenizer(tmp_path / "vision_tokenizer")
    assert (tokenizer.factor, tokenizer.codebook_size) == (16, 1024)


def test_consistency_is_the_distance_of_a_window_alone_and_within_its_image(corpora: Path, tmp_path: Path) -> None:
    """Zero where a code depends on its own patch only; with neighbours it is above zero, and the term lowers it."""
    local = MODEL | {"patch_local_encoder": True}
    found = {}
    for name, model, weight in (("local", local, 1.0), ("plain", MODEL, 0.0), ("asked", MODEL, 2.0)):
        losses = {"consistency": weight}
        job = build(make_config(corpora, tmp_path / name, model=model, losses=losses, continuous_steps=100))
        first = forward_backward(job, job.objective.images.batch(0)).metrics.get("loss_consistency")
        job.engine.optimizer.zero_grad()
        run_steps(job, 0, 25)
        pixels = to_model_range(np.concatenate(job.objective.images.batch(0)[:1])).to(job.objective.device)
        with torch.no_grad():
            after = job.objective._consistency(pixels, job.objective.model.latents(pixels)).item()
        found[name] = first, after
    assert found["local"] == (pytest.approx(0.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))
    assert found["plain"][0] is None
    assert found["asked"][0] > 0.005
    assert found["asked"][1] < 0.5 * found["plain"][1]
