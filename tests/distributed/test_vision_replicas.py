"""The vision tokenizer's stage on several replicas trains what one process trains."""

from __future__ import annotations

import json
import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vision_tokenizer_stage import make_config, png, write_tar
from test_vision_tokenizer_terms import all_terms
from vision_runs import Trained, one_bad_rank, train

from launch.local.ranks import run_local
from model.checkpoint.reader import CheckpointReader, read_manifest, step_folder_name
from training.config import CallbackEntry, TrainConfig
from training.reliability.watchdog import read_heartbeats

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, ADVERSARY_FROM, BROKEN_AT = 6, 3, 4  # codes start in step 2, free ones restart in step 3
RATIOS = ("loss_adaptive_weight", "discriminator_gradient_norm")  # of small numbers
PUBLISHED = {"weighting": "fixed", "generator": "non_saturating", "lecam_weight": 0.05}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    entries = [(f"{i:03d}.{end}", png(i) if end == "png" else b"a box") for i in range(16) for end in ("png", "txt")]
    write_tar(folder / "scenes.tar", entries)
    # Of another size, so that a micro-batch may be two arrays.
    edits = [(f"{i}.{part}.png", png(100 + i, 40, 80)) for i in range(6) for part in ("source_0", "target")]
    write_tar(folder / "edits.tar", sorted([*edits, *((f"{i}.instruction.txt", b"move it") for i in range(6))]))
    return folder


def config_of(corpora: Path, folder: Path, replicas: int, **changes: Any) -> TrainConfig:
    """Every term of the loss, some pictures of another size, micro-batches of two."""
    folder.mkdir(exist_ok=True)
    terms = all_terms(folder, ADVERSARY_FROM)
    terms["adversarial"] |= changes.pop("adversarial", {})
    losses = {"entropy": 0.05, "consistency": 0.5, "contrast": 4.0}
    config = make_config(corpora, folder, terms=terms, losses=losses, restart_codes_every_steps=3, **changes)
    config.stage.global_batch_size, config.stage.micro_batch_size = 4, 2
    config.parallel.data = replicas
    return config


def is_same_training(found: Trained, expected: Trained, steps: slice = slice(None)) -> None:
    """To rounding: sums are added in another order, and AdamW makes of gradients near zero what it likes."""
    wanted = expected.results[steps]
    assert len(found.results) == len(wanted)
    for one, other in zip(found.results, wanted, strict=True):
        assert one.num_tokens == other.num_tokens
        assert one.metrics.keys() == other.metrics.keys()
        for name, value in (other.metrics | {"loss": other.loss, "norm": other.gradient_norm}).items():
            got = (one.metrics | {"loss": one.loss, "norm": one.gradient_norm})[name]
            tolerance = 1e-3 if name in RATIOS else 1e-5
            assert got == pytest.approx(value, rel=tolerance, abs=1e-5), name
    for one, other in zip(found.gradients, expected.gradients[steps], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", params=["adaptive", "published"])
def runs(request: Any, pool: Any, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process and two replicas; both save before a step after the codes started and the adversary joined."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"adversarial": PUBLISHED if request.param == "published" else {}}
    alone, two = (config_of(corpora, folder / str(n), n, **deepcopy(changes)) for n in (1, 2))
    return {
        "configs": (alone, two),
        "alone": train(alone, 0, STEPS, save_at=(BROKEN_AT,)),
        "two": pool.run(train, two, 0, STEPS, save_at=(BROKEN_AT,), ranks=2),
    }


def checkpoint_of(config: TrainConfig) -> Path:
    return config.stage_folder / "checkpoints" / step_folder_name(BROKEN_AT)


def test_two_replicas_train_what_one_process_trains(runs: dict[str, Any]) -> None:
    first, second = runs["two"]
    is_same_training(first, runs["alone"])
    assert {"loss_batch_entropy", "loss_consistency", "discriminator_gradient_norm"} <= first.results[-1].metrics.keys()
    # Nothing is told from one rank to the other but what is added up: they stay equal to the last bit.
    assert first.results == second.results
    assert all(torch.equal(one, other) for one, other in zip(first.gradients, second.gradients, strict=True))
    assert first.final == second.final
    assert first.final["psnr_db"] == pytest.approx(runs["alone"].final["psnr_db"], rel=1e-3)


def test_rank_0_writes_and_a_broken_run_goes_on_bitwise(runs: dict[str, Any], pool: Any) -> None:
    _, config = runs["configs"]
    folder, whole = checkpoint_of(config), runs["two"]
    resumed = pool.run(train, config, BROKEN_AT, STEPS, folder, ranks=2)
    for rank in range(2):
        assert resumed[rank].results == whole[rank].results[BROKEN_AT:]
        assert equal(resumed[rank].weights, whole[rank].weights)
    assert whole[0].weights
    assert not whole[1].weights
    manifest = read_manifest(folder)
    assert manifest["layout"]["data"] == 2
    with CheckpointReader(folder) as reader:
        own = [name for name in reader.keys() if name.startswith("random/")]  # noqa: SIM118 - no mapping
    assert own == ["random/rank_00000/torch", "random/rank_00001/torch"]


def test_a_run_goes_on_with_another_number_of_replicas(runs: dict[str, Any], pool: Any) -> None:
    alone, two = runs["configs"]
    of_two = train(alone, BROKEN_AT, STEPS, checkpoint_of(two))
    of_one = pool.run(train, two, BROKEN_AT, STEPS, checkpoint_of(alone), ranks=2)[0]
    for found in (of_two, of_one):
        is_same_training(found, runs["alone"], slice(BROKEN_AT, None))


def test_a_bad_step_of_one_rank_is_bad_on_all_and_leaves_no_trace(pool: Any, corpora: Path, tmp_path: Path) -> None:
    config = config_of(corpora, tmp_path / "bad", 2, adversarial=PUBLISHED | {"start_step": 0})
    for norm, loss_is_nan, averages in pool.run(one_bad_rank, config, 1, ranks=2):
        assert not math.isfinite(norm)
        assert loss_is_nan
        assert averages == [0.0, 0.0]


def test_the_launcher_starts_replicas_without_megatron(corpora: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Two processes, from the launcher to the summary: figures once, heartbeats of both, codes from the latents of both."""
    config = make_config(corpora, tmp_path, min_codebook_use=0.0)
    config.stage.steps, config.stage.micro_batch_size, config.parallel.data = 3, 2, 2
    config.logging.wandb_mode, config.checkpoint.every_steps = "disabled", 2
    config.callbacks["told"] = CallbackEntry(path="vision_runs.ToldModules")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(Path(__file__).parent), str(REPOSITORY))))
    summary = run_local(config)
    folder = config.stage_folder
    assert (summary["data"], summary["steps"]) == (2, 3)
    assert summary["num_codes_used"] > 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["codes_used"] >= 1
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    assert [beat["rank"] for beat in read_heartbeats(folder, 2)] == [0, 1]
    told = {path.name: path.read_text().split() for path in folder.glob("modules_*")}
    assert sorted(told) == ["modules_0", "modules_1"]
    for modules in told.values():
        assert "training.tokenizers.vision" in modules
        assert not [name for name in modules if name.startswith("megatron")]
