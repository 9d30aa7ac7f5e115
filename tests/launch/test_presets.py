"""The presets hold the published figures of Emu3.5 (arXiv 2510.26583, Tables 1 and 2, section 4.1.3)."""

import json
from pathlib import Path

import pytest
import yaml

from launch.command_line import cli
from launch.composition.compose import compose_config
from launch.inspection.contents import inspect_model


def train_config(*overrides: str, model: str = "emu35_34b"):
    return compose_config("train", [f"model={model}", *overrides])


def tokens_of(stage: str) -> int:
    config = train_config(f"stage={stage}").stage
    return config.global_batch_size * config.sequence_length * config.steps


def test_emu35_34b_has_exactly_the_published_parameters():
    parameters = inspect_model(train_config("stage=pretrain_1").model)["parameters"]
    assert parameters["total"] == 34_103_460_864
    assert parameters["layers"] == 31_206_298_624
    assert parameters["embeddings"] == 2_897_162_240


@pytest.mark.parametrize(("stage", "trillions"), [("pretrain_1", 10.3), ("pretrain_2", 3.5)])
def test_pretraining_reads_the_published_tokens(stage, trillions):
    assert round(tokens_of(stage) / 1e12, 1) == trillions


def test_fine_tuning_reads_the_published_tokens():
    """151.0B from batch x length x steps; Table 3 sums its tasks to 150.1B."""
    assert round((tokens_of("sft_1") + tokens_of("sft_2")) / 1e9, 1) == 151.0


def test_published_mixtures():
    first = {name: entry.weight for name, entry in train_config("stage=pretrain_1").stage.data.datasets.items()}
    second = {name: entry.weight for name, entry in train_config("stage=pretrain_2").stage.data.datasets.items()}
    assert first == {"text": 0.20, "image_text": 0.20, "video_text": 0.05, "video_interleaved": 0.55}
    assert second == {"text": 0.18, "image_text": 0.16, "video_text": 0.08, "x2i": 0.03, "video_interleaved": 0.55}
    tasks = train_config("stage=sft_1").stage.data.datasets
    assert sum(entry.weight for entry in tasks.values()) == pytest.approx(150.1)


@pytest.mark.parametrize(
    ("stage", "layout", "learning_rate", "visual"),
    [
        ("pretrain_1", (8, 2), 5e-4, 0.5),
        ("pretrain_2", (8, 2), 1e-5, 0.5),
        ("sft_1", (8, 1), 6e-6, 1.0),
        ("sft_2", (8, 2), 6e-6, 0.5),
    ],
)
def test_published_hyper_parameters(stage, layout, learning_rate, visual):
    config = train_config(f"stage={stage}")
    assert (config.parallel.tensor, config.parallel.context) == layout
    assert config.stage.optimizer.learning_rate == learning_rate
    assert (config.stage.optimizer.beta1, config.stage.optimizer.beta2) == (0.9, 0.95)
    assert config.stage.objective["loss_weights"]["visual"] == visual
    if stage.startswith("pretrain"):
        optimizer = config.stage.optimizer
        assert (optimizer.warmup_steps, optimizer.weight_decay, optimizer.gradient_clip) == (700, 0.1, 5.0)


def test_toy_stages_inherit_and_form_a_chain():
    first, second, third = (
        train_config(f"stage=toy_{name}", "run_folder=R", model="toy") for name in ("pretrain_1", "pretrain_2", "sft")
    )
    assert [config.stage.name for config in (first, second, third)] == ["pretrain_1", "pretrain_2", "sft"]
    assert [config.stage.initialize_from for config in (first, second, third)] == [None, "R/pretrain_1", "R/pretrain_2"]
    assert (first.parallel.tensor, second.parallel.pipeline, third.parallel.data) == (2, 2, 2)
    assert all(config.parallel.world_size == 2 for config in (first, second, third))
    assert second.stage.data.datasets["x2i"].path == "R/packed/pretrain_2/x2i"


def test_a_folder_may_be_given_where_other_commands_have_a_group_of_that_name():
    config = compose_config("generate", ["checkpoint=c", "prompt=p", "vision_tokenizer=runs/a/vision_tokenizer"])
    assert config.vision_tokenizer == "runs/a/vision_tokenizer"
    corpus = "stage.objective.data.corpora.a.path=x"
    options = train_config("stage=vision_tokenizer", "vision_tokenizer=ibq_small", corpus).stage.objective
    assert options["model"]["ch"] == 16


PUBLISHED_STAGES = ("pretrain_1", "pretrain_2", "sft_1", "sft_2")


def test_the_published_curriculum_is_whole(tmp_path, capsys):
    """Raw shards to evaluation: what an entry reads is given, or made by an entry that it waits for."""
    assert cli.main(["curriculum", "curriculum=emu35", f"run_folder={tmp_path}", "dry_run=true", "json=true"]) == 0
    shown = [entry["name"] for entry in json.loads(capsys.readouterr().out)["planned"]]
    entries = compose_config("curriculum", ["curriculum=emu35", f"run_folder={tmp_path}"]).entries
    assert shown == list(entries)
    assert [name for name in entries if name in (*PUBLISHED_STAGES, "rl")] == [*PUBLISHED_STAGES, "rl"]
    given = {str(tmp_path / name) for name in ("raw", "published", "prompts")}
    made: dict[str, set[str]] = {}  # what is there once an entry is done
    for name, entry in entries.items():
        before = set(given).union(*(made[needed] for needed in entry.needs))
        made[name] = before | {str(tmp_path / output) for output in entry.outputs}
        for read in paths_read(entry, tmp_path):
            assert any(read == one or read.startswith(f"{one}/") for one in before), f"{name} reads {read}"
    assert (tmp_path / "start").as_posix() in paths_read(entries["pretrain_1"], tmp_path)


def paths_read(entry, run_folder) -> list[str]:
    """Below the run folder, outputs excepted; for a stage those of its composed configuration."""
    if entry.command == "train":
        stage = compose_config("train", entry.overrides).stage
        return [stage.initialize_from, *(dataset.path for dataset in stage.data.datasets.values())]
    given = [*entry.overrides, *(text for one in entry.each.values() for text in one)]
    texts = [text for text in given if not text.startswith("run_folder=")]
    values = [text.split("=", 1) for text in texts]
    own = [str(run_folder / output) for output in entry.outputs]
    paths = [path for key, path in values if key != "target" and path.startswith(str(run_folder))]
    return [path for path in paths if path not in own]


@pytest.mark.parametrize("task_at", [("sft_1", "x2i", 768), ("sft_1", "exploration", 720), ("sft_2", "narrative", 720)])
def test_the_published_resolutions_of_tasks(task_at):
    stage, task, side = task_at
    entry = compose_config("curriculum", ["curriculum=emu35"]).entries[f"tokenize_{stage}"]
    assert f"image.max_area={side * side}" in entry.each[task]


def spike_factor_of(path: Path) -> float:
    """Of a preset, or of the one that it is made from."""
    values = yaml.safe_load(path.read_text())
    if "spike_factor" in values.get("reliability", {}):
        return values["reliability"]["spike_factor"]
    bases = [path.parent / f"{name}.yaml" for name in values.get("defaults", []) if isinstance(name, str)]
    return max((spike_factor_of(base) for base in bases if base.exists()), default=0)


def test_presets_have_the_guard_against_spikes():
    """All but those that are fitted without steps; a wider one where steps of four rows spike by themselves."""
    presets = {path.stem: path for path in (Path(__file__).parents[2] / "conf" / "stage").glob("*.yaml")}
    factors = {name: spike_factor_of(path) for name, path in presets.items()}
    assert {name for name, factor in factors.items() if not factor} == {"text_tokenizer", "toy_text_tokenizer"}
    wide = {"toy_sft", "toy_dida", "toy_dida_all_weights", "toy_diagonal", "world_sft"}
    assert {name: factor for name, factor in factors.items() if factor not in (0, 10)} == dict.fromkeys(wide, 50)
