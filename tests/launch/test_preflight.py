"""What cannot work is refused before a process or a job starts, with figures and layouts that fit; presets fit as shipped."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from handmade_checkpoints import publish_manifest
from tiny_stage import make_config, write_packed

from launch.command_line import cli
from launch.composition.compose import compose_config
from launch.curriculum import actions
from launch.curriculum.entries import CurriculumConfig, EntryConfig, command_line, insisting
from launch.local.left_environment import refuse_left_environment, refuse_tasks_without_ranks
from launch.plan import places, preflight
from launch.plan.places import host, place_of, visible_accelerators
from launch.plan.preflight import is_planned, judge, missing_inputs, refuse_impossible
from model.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EMU = ["model=emu35_34b", "stage=pretrain_1"]
SLURM = ["cluster=slurm", *EMU]
ONE_NODE = ["parallel.pipeline=1", "parallel.data=1"]
# name: command and overrides, what the message says
IMPOSSIBLE = {
    "help's old example on a laptop": (["train", *EMU, *ONE_NODE], "all 16 ranks together would need"),
    "the preset on a laptop": (["train", *EMU], "all 1,024 ranks together would need"),
    "a billion parameters in one process": (
        ["train", "model=1b", "stage=sft_1", *ONE_NODE, "parallel.tensor=1"],
        "the rank would need",
    ),
    "a year of a laptop": (
        ["train", "model=300m", "stage=toy_pretrain_1", "stage.steps=90000000"],
        "it would take at least",
    ),
    "rows too long for a laptop": (
        ["train", "model.max_sequence_length=1048576", "stage.sequence_length=1048576"],
        "together would need",
    ),
    "no packed rows": (["train", "stage=toy_pretrain_1"], "there are no packed rows of text"),
    "nothing to start from": (["train", "stage=toy_sft", "parallel.data=1"], "pretrain_2 does not exist"),
    "two nodes": (["submit", *SLURM, *ONE_NODE], "it would take 8,907 days"),
    "no recomputation": (["submit", *SLURM, "parallel.recompute=none"], "an accelerator would need 112.7 GB"),
    "more ranks than accelerators": (
        ["submit", *SLURM, "cluster.num_accelerators=64"],
        "1,024 ranks are asked for, 64 accelerators are there",
    ),
    "more replicas of a tokenizer than accelerators": (
        ["submit", "cluster=slurm", "stage=vision_tokenizer", "parallel.data=32", "cluster.num_accelerators=16"]
        + ["stage.objective.data.corpora.a.path=x"],
        "32 ranks are asked for, 16 accelerators are there",
    ),
    "small accelerators": (["submit", *SLURM, "cluster.device=a100_40gb"], "35.6 GB can be used"),
    "many rows at once": (["submit", *SLURM, "stage.micro_batch_size=7"], "an accelerator would need"),
    "an optimizer that is not sharded": (
        ["submit", *SLURM, "parallel.distributed_optimizer=false"],
        "an accelerator would need",
    ),
    "no sequence parallelism": (["submit", *SLURM, "parallel.sequence=false"], "an accelerator would need"),
    "no tensor parallelism": (
        ["submit", *SLURM, "parallel.tensor=1", "parallel.data=224"],
        "an accelerator would need",
    ),
    "sixteen times the steps": (["submit", *SLURM, "stage.steps=11200000"], "it would take 2,453 days"),
    "an unknown device": (["submit", *SLURM, "cluster.device=h1000"], "unknown device 'h1000'"),
    "an illegal layout": (["submit", *SLURM, "parallel.tensor=3"], "3 does not divide"),
    "rows longer than the model reads": (["submit", *SLURM, "stage.sequence_length=65536"], "above model.max_sequence"),
    "the curriculum on a laptop": (["curriculum", "curriculum=emu35"], "sft_2: this stage cannot run here"),
    "the curriculum on a small cluster": (
        ["curriculum", "curriculum=emu35", "cluster=slurm", "cluster.num_accelerators=256"],
        "pretrain_2: this stage cannot run here",
    ),
    "a disk too small for one checkpoint": (["submit", *SLURM], "one checkpoint takes 477.6 GB"),
}


@pytest.fixture
def small_machine(monkeypatch):
    """A laptop: whatever this machine has, 16 GB and 4 cores count; nothing can be started."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(places, "this_machine", lambda: host(16e9, 4))
    monkeypatch.setattr("subprocess.Popen", started)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_jobs_are_refused_before_anything_starts(name, small_machine, tmp_path, capsys, monkeypatch):
    overrides, message = IMPOSSIBLE[name]
    disk = 100e9 if "disk" in name else 1e13
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": disk}))
    assert cli.main([*overrides, f"run_folder={tmp_path / 'run'}", "json=true"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]
    assert list(tmp_path.iterdir()) == []


# Overrides of the stage of `tiny_stage`, which finds its rows, and what is said of them.
UNFIT = {
    "rows of another length": (["stage.sequence_length=32"], "expected 32 tokens, got 64; stage.sequence_length=64"),
    "another vocabulary": (["model.vocabulary.text_size=65"], "got {'text_size': 64}; model.vocabulary.text_size=64"),
    "token files": (["stage.data.datasets.text.path={folder}/tokens"], "no finished packed dataset"),
    "the start is a vision tokenizer": (["stage.initialize_from={folder}/vision"], "of kind vision_tokenizer"),
    "the start is a folder of rows": (["stage.initialize_from={folder}/packed"], "no complete checkpoint found"),
}


@pytest.fixture(scope="module")
def tiny_rows(tmp_path_factory):
    """Packed rows, and beside them the manifest of a vision tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_packed(folder)
    (folder / "vision").mkdir()
    publish_manifest(folder / "vision", {"format_version": 1, "kind": "vision_tokenizer", "keys": {}})
    return folder


def test_rows_and_weights_that_a_stage_cannot_read_are_told_by_the_preflight(tiny_rows, tmp_path):
    for overrides, message in UNFIT.values():
        config = make_config(tmp_path, tiny_rows / "packed")
        assert missing_inputs(config) == []
        for override in overrides:
            key, _, value = override.format(folder=tiny_rows).partition("=")
            if key.startswith("stage.data"):
                config.stage.data.datasets["text"].path = value
            else:
                *path, last = key.split(".")
                owner = functools.reduce(getattr, path, config)
                setattr(owner, last, int(value) if value.isdigit() else value)
        (found,) = missing_inputs(config)
        assert message in found


def test_a_stage_that_cannot_go_on_from_its_checkpoint_is_told_by_the_preflight(tiny_rows, tmp_path):
    config = make_config(tmp_path, tiny_rows / "packed")
    folder = config.stage_folder / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    publish_manifest(
        folder, {"format_version": 1, "kind": "transformer", "keys": {}, "step": 4, "config": config.to_dict()}
    )
    refuse_impossible(config)
    config.model.num_layers += 1
    with pytest.raises(UserError, match="made with another configuration"):
        refuse_impossible(config)
    config.model.num_layers -= 1
    config.stage.steps = 3
    with pytest.raises(UserError, match="already trained to step 4"):
        refuse_impossible(config)
    config.stage.steps = 5
    refuse_impossible(config)
    (folder / "manifest.json").write_text("{")
    refuse_impossible(config)  # an older checkpoint may serve


def test_the_layouts_that_are_offered_fit(small_machine, tmp_path):
    place = place_of(compose_config("plan", ["cluster=h100"]).cluster)
    config = compose_config("train", [*EMU, *ONE_NODE])
    offers = judge(config, place).offers
    assert len(offers) == 3
    assert (
        "parallel.tensor=8 parallel.pipeline=1 parallel.context=2 parallel.data=64 parallel.recompute=full" in offers[0]
    )
    for offer in offers:
        assert judge(compose_config("train", [*EMU, *offer.split()]), place).problems == []


def test_preflight_false_insists(tmp_path, small_machine):
    refuse_impossible(compose_config("train", [*EMU, f"run_folder={tmp_path}", "preflight=false"]))
    with pytest.raises(AssertionError, match="something was started"):
        cli.main(["train", "stage=toy_pretrain_1", f"run_folder={tmp_path}", "preflight=false"])
    overrides = ["stage=toy_pretrain_1", "parallel.data=1000", "stage.global_batch_size=2000"]
    entry = EntryConfig(command="train", overrides=overrides, outputs=["x"])
    curriculum = CurriculumConfig(run_folder=str(tmp_path / "c"), entries={"x": entry})
    with pytest.raises(UserError, match="x: this stage cannot run here"):
        actions.act(curriculum)
    assert not (tmp_path / "c").exists()
    curriculum.preflight = False
    with pytest.raises(AssertionError, match="something was started"):
        actions.act(curriculum)
    assert command_line(entry, *insisting(curriculum, entry))[-1] == "preflight=false"


STAGES = sorted(path.stem for path in (ROOT / "conf" / "stage").glob("*.yaml"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_preset_fits_where_it_is_meant_to_run(stage):
    """Toy stages on a laptop, the published ones in their own layout on the cluster that `nextstate plan` names."""
    is_toy = stage.startswith(("toy_", "world_", "words_"))
    tokenizer = "vision_tokenizer" in stage
    corpus = ["stage.objective.data.corpora.a.path=x"] if stage.endswith("vision_tokenizer") else []
    config = compose_config("train", [f"stage={stage}", f"model={'toy' if is_toy else 'emu35_34b'}", *corpus])
    place = host(8e9, 2) if is_toy else place_of(compose_config("plan", []).cluster)
    verdict = judge(config, place)
    assert verdict.problems == []
    assert is_planned(config) == (not tokenizer and "text_tokenizer" not in stage)


def test_a_rank_environment_that_another_launcher_left_is_told_at_once(monkeypatch, tmp_path, capsys):
    config = compose_config("train", ["stage=toy_pretrain_1"])
    good = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    refuse_left_environment(config, good)
    for changes, message in (
        ({"WORLD_SIZE": "16"}, "WORLD_SIZE is 16 and the layout has 2"),
        ({"RANK": "2"}, "RANK is 2 of 2"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is missing"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
    ):
        left = {name: value for name, value in (good | changes).items() if value is not None}
        with pytest.raises(UserError, match=message):
            refuse_left_environment(config, left)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", "stage=toy_pretrain_1", f"run_folder={tmp_path / 'run'}"]) == 2
    assert "env -u RANK -u WORLD_SIZE" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    refuse_tasks_without_ranks({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"})
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert cli.main(["train", "stage=toy_pretrain_1", f"run_folder={tmp_path / 'run'}"]) == 2
    assert "srun started 16 copies of this command" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_accelerators_are_those_that_the_driver_and_the_environment_name(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(places, "is_cpu_build", lambda: False)
    assert len(visible_accelerators()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    place = places.this_machine()
    assert (place.cluster.num_accelerators, place.has_known_speed, place.is_host) == (1, True, False)
    assert place.device.memory_bytes == 81559 * 2**20
    tool.write_text("#!/bin/sh\necho 'NVIDIA T4, 15360'\n")
    unknown = judge(compose_config("train", [*EMU, *ONE_NODE]), places.this_machine())
    assert unknown.days is None
    assert any("16 ranks are asked for, 1 accelerators are there" in text for text in unknown.problems)
