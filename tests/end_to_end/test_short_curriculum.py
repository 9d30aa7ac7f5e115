"""The demo's curriculum with every size cut down: all entries, all layouts, the report, and a rerun that does nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.composition.compose import compose_config
from launch.curriculum.entries import CurriculumConfig
from launch.curriculum.running import run_curriculum

TASKS = ("t2i_accuracy", "next_state_accuracy", "edit_accuracy")
# Added to the overrides of each entry: the same path, next to no work.
SMALL = {
    "corpora": ["num_images=80", "num_clips=16", "num_captioned_clips=4", "num_edits=40"],
    "vision_tokenizer": [
        "stage.steps=60",
        "stage.objective.continuous_steps=30",
        "stage.objective.restart_codes_every_steps=35",
        "stage.objective.min_codebook_use=0",
        "stage.objective.data.num_held_back=16",
        "logging.wandb_mode=disabled",
    ],
    "pretrain_1": ["stage.steps=3", "stage.optimizer.warmup_steps=0", "logging.wandb_mode=disabled"],
    "pretrain_2": ["stage.steps=3", "stage.optimizer.warmup_steps=0", "logging.wandb_mode=disabled"],
    "sft": ["stage.steps=3", "stage.optimizer.warmup_steps=0"],  # W&B offline, as in the demo
    "evaluate_untrained": [f"tasks.{task}.num_prompts=8" for task in TASKS],
    "dida": ["stage.steps=3", "stage.optimizer.warmup_steps=0", "logging.wandb_mode=disabled"],
    "evaluate_dida": [
        *(f"tasks.{task}.num_prompts=8" for task in TASKS),
        "comparison.dida_steps=[2]",
        "comparison.single_prompts=1",
        "rollouts.num_rollouts=2",
    ],
    "rl": [
        "stage.steps=2",
        "stage.global_batch_size=16",
        "stage.micro_batch_size=4",
        "stage.optimizer.warmup_steps=0",
        "stage.objective.max_refills=0",
        "logging.wandb_mode=disabled",
    ],
    "evaluate_rl_start": ["tasks.t2i_reward.num_prompts=8", "tasks.t2i_sampled.num_prompts=8"],
    "evaluate_rl": ["tasks.t2i_reward.num_prompts=8", "tasks.t2i_sampled.num_prompts=8"],
    "evaluate": [
        *(f"tasks.{task}.num_prompts=8" for task in ("reconstruction_accuracy", *TASKS)),
        *(f"seen.{task}.num_prompts=4" for task in TASKS),
        *(f"+baselines.{name}.num_prompts=4" for name in ("dictionary", "copy_of_the_last")),
        *(f"baselines.{name}.num_prompts=4" for name in ("other_words", "shuffled_captions")),
        "+baselines.dictionary.num_clips=16",
    ],
}
LAYOUTS = {"pretrain_1": (2, 1, 1, 1), "pretrain_2": (1, 2, 1, 1), "sft": (1, 1, 1, 2), "dida": (1, 1, 1, 2)}
ROW_TOKENS = {"dida": 440 + 246}  # what copies see, and copies
ROWS = {"pretrain_2": 4, "sft": 4}


def short_demo(folder: Path) -> CurriculumConfig:
    config = compose_config("demo", [f"run_folder={folder}"])
    for name, overrides in SMALL.items():
        config.entries[name].overrides += overrides
    return config


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    answer = run_curriculum(short_demo(folder))
    assert answer.get("exit_code", 0) == 0, answer
    return folder, answer


def test_every_entry_runs(demo):
    folder, answer = demo
    assert answer["ran"] == [entry["name"] for entry in answer["entries"]]
    assert {entry["state"] for entry in answer["entries"]} == {"done"}
    assert (folder / "sft" / "wandb").is_dir()


def test_report_holds_every_figure(demo):
    folder, _ = demo
    report = json.loads((folder / "report.json").read_text())
    assert report["wall_seconds"] > 0
    assert report["peak_memory_bytes"] > 0
    assert report["tokenizer"]["psnr_db"] > 0
    assert 0 < report["tokenizer"]["codebook_use"] <= 1
    assert 0 < report["packing"]["fill"] <= 1
    stages = {stage["name"]: stage for stage in report["stages"]}
    for name, layout in LAYOUTS.items():
        stage = stages[name]
        assert (stage["tensor"], stage["pipeline"], stage["context"], stage["data"]) == layout
        assert stage["steps"] == 3
        assert stage["tokens"] == 3 * ROWS.get(name, 2) * ROW_TOKENS.get(name, 576)
        assert stage["loss_first"] > 0
        assert stage["loss_last"] > 0
        assert stage["wall_seconds"] > 0
    rl = report["rl"]
    assert rl["steps"] == 2
    assert {
        "reward_sft",
        "reward_final",
        "reward_max",
        "held_out_accuracy_sft",
        "held_out_accuracy_rl",
        "wall_seconds",
        "dropped_groups",
        "entropy_sft",
        "entropy_final",
    } <= rl.keys()
    dida = report["dida"]
    assert dida["chosen_steps"] == 6
    assert dida["forwards_ratio"] > 3
    assert dida["joint_by_steps"].keys() == dida["entropy_ratio_by_steps"].keys() == {"2"}
    assert dida["ar_after_minus_before"] == dict.fromkeys(("t2i_accuracy", "next_state_accuracy", "edit_accuracy"), 0.0)
    assert dida["wall_seconds"] > 0
    assert len(report["rollout"]["accuracy_by_step"]) == 8
    metrics = report["metrics"]
    for name in (
        "reconstruction_accuracy",
        "t2i_accuracy_untrained",
        "t2i_accuracy",
        "next_state_accuracy",
        "edit_accuracy",
    ):
        assert 0 <= metrics[name] <= 1, name
    assert metrics["num_prompts"] == 8
    assert metrics["seen_accuracy"].keys() == set(TASKS)
    assert {task: set(names) for task, names in metrics["baselines"].items()} == {
        "t2i_accuracy": {"dictionary", "shuffled_captions", "untrained"},
        "next_state_accuracy": {"dictionary", "copy_of_the_last", "other_words", "untrained"},
        "edit_accuracy": {"dictionary", "copy_of_the_last", "other_words", "untrained"},
        "real_video_reconstruction": {"one_flat_colour", "a_flat_colour_a_code"},
    }


def test_report_page_stands_alone(demo):
    folder, _ = demo
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_stages_follow_one_another(demo):
    """Each stage is told to start from the one before it, and says in its event log that it did."""
    folder, _ = demo
    for before, stage in (("pretrain_1", "pretrain_2"), ("pretrain_2", "sft"), ("sft", "dida")):
        config = (folder / stage / "config.yaml").read_text()
        assert f"initialize_from: {folder}/{before}" in config
        events = [json.loads(line) for line in (folder / stage / "events.jsonl").read_text().splitlines()]
        starts = [event for event in events if event["event"] == "start"]
        assert [event["initialize_from"] for event in starts] == [f"{folder}/{before}"]


def test_rerun_does_nothing(demo):
    folder, _ = demo
    before = (folder / "report.json").read_bytes()
    answer = run_curriculum(short_demo(folder))
    assert answer["ran"] == []
    assert (folder / "report.json").read_bytes() == before
