"""The config: all problems at once, unknown keys refused, what a fingerprint sees, no key that nobody reads."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.errors import UserError
from model.registry import find_class
from training.config import (
    CallbackEntry,
    DatasetEntry,
    TrainConfig,
    differences,
    from_dict,
    load_yaml,
    results_of,
    save_yaml,
)
from training.objectives.checks import complete, fixed_of, in_todays_form
from training.objectives.registry import OBJECTIVES, OPTIONS
from training.stage import validate

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "data_pipeline", "training", "launch")


def good() -> TrainConfig:
    config = TrainConfig()
    config.stage.data.datasets = {"one": DatasetEntry(path="somewhere", weight=2.0)}
    return config


def test_a_good_one_passes():
    validate(good())


def test_weights_may_change_within_a_stage_and_the_fingerprint_knows():
    config = from_dict(
        {
            "stage": {
                "data": {
                    "datasets": {
                        "one": {"path": "a", "weight": 3},
                        "two": {"path": "b", "weight": 0},
                        "off": {"weight": 0},
                    },
                    "weight_changes": {
                        "last": {"from_step": 70, "weights": {"one": 0}},
                        "first": {"from_step": 50, "weights": {"two": 1}},
                    },
                }
            }
        }
    )
    data = config.stage.data
    assert data.weights_by_step() == [
        (0, {"one": 3, "two": 0, "off": 0}),
        (50, {"one": 3, "two": 1, "off": 0}),
        (70, {"one": 0, "two": 1, "off": 0}),
    ]
    assert list(data.datasets_in_use()) == ["one", "two"]
    before = config.fingerprint()
    data.weight_changes["first"].from_step = 70
    data.weight_changes["last"].weights = {"three": -1.0}
    assert config.fingerprint() != before
    with pytest.raises(UserError) as caught:
        validate(config)
    for key in ("first.from_step", "last.from_step", "last.weights.three"):
        assert f"stage.data.weight_changes.{key}: " in str(caught.value)
    data.weight_changes = {}
    plain, changed = config.to_dict(), config.to_dict()
    del plain["stage"]["data"]["weight_changes"]  # a checkpoint of an older version
    assert not differences(results_of(plain), results_of(changed))


def test_every_problem_is_told_with_its_fix():
    config = good()
    config.stage.steps = 0
    config.stage.name = "a/b"
    config.stage.optimizer.schedule = "cosin"
    config.stage.optimizer.min_learning_rate = 1.0
    config.stage.data.datasets["two"] = DatasetEntry(path="", weight=-1.0)
    config.parallel.tensor = 3
    config.checkpoint.keep = 0
    config.logging.wandb_mode = "loud"
    config.reliability.spike_factor = 0.5
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    for key in (
        "stage.steps",
        "stage.name",
        "stage.optimizer.schedule",
        "stage.optimizer.min_learning_rate",
        "stage.data.datasets.two.path",
        "stage.data.datasets.two.weight",
        "parallel.tensor",
        "checkpoint.keep",
        "logging.wandb_mode",
        "reliability.spike_factor",
    ):
        assert f". {key}: " in message, key
    lines = message.splitlines()[1:]
    assert all("(fix: " in line for line in lines), message


def test_batch_and_length_fixes_are_valid():
    config = good()
    config.parallel.data, config.stage.global_batch_size = 3, 8
    config.stage.sequence_length, config.parallel.tensor = 511, 2
    with pytest.raises(UserError) as caught:
        validate(config)
    assert "stage.global_batch_size=12" in str(caught.value)
    assert "stage.sequence_length=512" in str(caught.value)


def of_objective(name: str, **options: Any) -> TrainConfig:
    config = TrainConfig()
    config.stage.objective = {"name": name} | options
    return config


def test_other_objectives_need_no_packed_data():
    validate(of_objective("text_tokenizer", corpora=["x"]))
    with pytest.raises(UserError, match="next_token"):
        validate(of_objective("next_tokn"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda stage: setattr(stage, "steps", 7), "stage.steps"),
        (lambda stage: setattr(stage, "initialize_from", "runs/x"), "stage.initialize_from"),
        (lambda stage: setattr(stage, "sequence_length", 64), "stage.sequence_length"),
        (lambda stage: setattr(stage.optimizer, "beta1", 0.5), "stage.optimizer.beta1"),
        (lambda stage: stage.data.datasets.update(a=DatasetEntry("x")), "stage.data.datasets.a"),
    ],
)
def test_keys_of_the_stage_that_an_objective_does_not_read_are_refused(change, key):
    config = of_objective("text_tokenizer", corpora=["x"])
    change(config.stage)
    with pytest.raises(UserError, match=f"{key}.*has no effect with the objective text_tokenizer"):
        validate(config)


def test_the_vision_tokenizer_reads_steps_but_no_packed_rows():
    config = of_objective("vision_tokenizer", data={"corpora": {"a": {"path": "x"}}})
    config.stage.steps, config.stage.initialize_from = 7, "runs/x"
    validate(config)
    config.stage.data.datasets["a"], config.stage.sequence_length = DatasetEntry("x"), 64
    with pytest.raises(UserError, match=r"(?s)stage\.data\.datasets\.a.*stage\.sequence_length") as caught:
        validate(config)
    assert "2 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip_rang": 0.2}, "stage.objective.clip_rang"),
        ({"loss_weights": {"txt": 1.0}}, "did you mean stage.objective.loss_weights.text"),
        ({"loss_weight": {"text": 1.0}}, "did you mean stage.objective.loss_weights"),
        ({"loss_weights": {"text": "much"}}, "stage.objective.loss_weights.text"),
        ({"loss_weights": {"text": -1.0}}, "stage.objective.loss_weights.text"),
        ({"loss_weights": {"text": 0, "visual": 0, "structure": 0}}, "nothing would be learned"),
        ({"document_attention": "none"}, "stage.objective.document_attention=document"),
    ],
)
def test_options_that_the_objective_does_not_own_or_take_are_refused(options, expected):
    config = good()
    config.stage.objective |= options
    with pytest.raises(UserError, match=expected):
        validate(config)


def test_an_engine_and_callbacks_are_looked_up_before_anything_starts():
    config = good()
    config.engine = "megatro"
    with pytest.raises(UserError, match="engine=megatron"):
        validate(config)
    config.engine, config.callbacks = None, {"mine": CallbackEntry("mine")}
    with pytest.raises(UserError, match=r"callbacks\.mine\.path"):
        validate(config)


OLD_STAGE = {
    "loss_weights": {"text": 0.3, "visual": 1.0, "structure": 0.5},
    "document_attention": "full",
    "options": {},
}


def test_a_config_written_before_objectives_had_keys_is_read(tmp_path):
    old = good().to_dict()
    old["stage"] |= {"objective": "next_token"} | OLD_STAGE
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(old))
    config = load_yaml(path)
    assert config.stage.objective == {
        "name": "next_token",
        "loss_weights": OLD_STAGE["loss_weights"],
        "document_attention": "full",
    }
    old["stage"] |= {"objective": "text_tokenizer", "options": {"corpora": ["x"], "size": 400}}
    today = in_todays_form(old)
    assert today["stage"]["objective"] == complete({"name": "text_tokenizer", "corpora": ["x"], "size": 400})
    assert fixed_of(today)["stage"]["objective"] == {"name": "text_tokenizer"}
    assert in_todays_form(today) is today


def test_what_may_not_change_between_a_checkpoint_and_its_run():
    config = good()
    config.stage.objective = complete(config.stage.objective)
    before = fixed_of(config.to_dict())
    config.stage.objective["loss_weights"]["text"] = 0.1
    assert fixed_of(config.to_dict()) == before
    config.stage.objective["document_attention"] = "full"
    assert differences(before, fixed_of(config.to_dict())) == [
        "stage.objective.document_attention: 'document' -> 'full'"
    ]


def test_round_trips(tmp_path):
    config = good()
    config.stage.objective["nested"] = {"list": [1, "a", None]}
    config.stage.initialize_from = "runs/x"
    assert from_dict(config.to_dict()) == config
    save_yaml(config, tmp_path / "config.yaml", {"versions": {"torch": "0"}, "machine": {"host": "h"}})
    assert load_yaml(tmp_path / "config.yaml") == config
    assert from_dict({}) == TrainConfig()


@pytest.mark.parametrize(
    "values",
    [
        {"stag": {}},
        {"stage": {"step": 3}},
        {"stage": {"optimizer": {"lr": 1}}},
        {"stage": {"steps": "many"}},
        {"stage": {"data": {"datasets": {"a": {"pth": "x"}}}}},
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(values):
    with pytest.raises(UserError, match="schema"):
        from_dict(values)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.yaml"
    for content in ("a: [", "- 1"):
        path.write_text(content)
        with pytest.raises(UserError):
            load_yaml(path)
    with pytest.raises(UserError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LAUGHS, "alias"),
        ("run_folder: ${oc.env:HOME}", r"run_folder[\s\S]*\$\{oc.env:HOME\}"),
        ("stage: {data: {datasets: {a: {path: '${oc.env:HOME}'}}}}", "stage.data.datasets.a.path"),
        ("stage: {data: {datasets: {'${oc.env:HOME}': {}}}}", "outside"),
        ("a: '" + "x" * (1 << 20) + "'", "too large"),
        ("[" * 100_000, "more than 64 levels"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_recorded_config_takes_nothing_from_here_and_is_bounded(tmp_path, content, told):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=told):
        load_yaml(tmp_path / "config.yaml")


def test_the_fingerprint_sees_what_decides_the_weights():
    base = good().fingerprint()

    def changed(change) -> bool:
        config = good()
        change(config)
        return config.fingerprint() != base

    assert changed(lambda config: setattr(config, "seed", 5))
    assert changed(lambda config: setattr(config.model, "hidden_size", 256))
    assert changed(lambda config: config.stage.objective.update(loss_weights={"text": 0.3}))
    assert changed(lambda config: setattr(config.stage.data.datasets["one"], "weight", 1.0))
    assert changed(lambda config: config.stage.objective.update(a=1))
    assert not changed(lambda config: setattr(config.parallel, "data", 2))
    assert not changed(lambda config: setattr(config, "run_folder", "elsewhere"))
    assert not changed(lambda config: setattr(config.stage.data.datasets["one"], "path", "moved"))
    assert not changed(lambda config: setattr(config.logging, "every_steps", 7))


def test_the_light_options_are_those_of_the_objectives():
    for name in OBJECTIVES:
        assert find_class("objective", name, OBJECTIVES, "").Options is find_class("objective", name, OPTIONS, "")


def config_classes(cls=TrainConfig) -> set[type]:
    found = {cls}
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            found |= config_classes(type(default))
    if cls is not TrainConfig:
        return found
    options = [config_classes(find_class("objective", name, OPTIONS, "")) for name in OPTIONS]
    return found.union({DatasetEntry, CallbackEntry}, *options)


def test_every_key_is_read_by_somebody():
    """Each field is read as an attribute, or by name through a string, outside its own declaration."""
    read: set[str] = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for function in ast.walk(tree):
                # Validation alone does not make use of a key.
                if isinstance(function, ast.FunctionDef) and "validate" in function.name:
                    function.body = [ast.Pass()]
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
    unread = {
        f"{cls.__name__}.{field.name}"
        for cls in config_classes()
        for field in dataclasses.fields(cls)
        if field.name not in read
    }
    assert unread - READ_AS_A_WHOLE == set()


# Loss weights go to the loader as a dict of all classes; the command line reads `json` of every command's config.
READ_AS_A_WHOLE = {"LossWeights.text", "LossWeights.visual", "LossWeights.structure", "TrainConfig.json"}
