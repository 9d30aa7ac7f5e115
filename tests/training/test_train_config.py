"""The config: all problems at once, unknown keys refused, what a fingerprint sees, no key that nobody reads."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from model.errors import UserError
from training.config import DatasetEntry, TrainConfig, from_dict, load_yaml, save_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "data_pipeline", "training", "launch")


def good() -> TrainConfig:
    config = TrainConfig()
    config.stage.data.datasets = {"one": DatasetEntry(path="somewhere", weight=2.0)}
    return config


def test_a_good_one_passes():
    good().validate()


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
        config.validate()
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
        config.validate()
    assert "stage.global_batch_size=12" in str(caught.value)
    assert "stage.sequence_length=512" in str(caught.value)


def test_other_objectives_need_no_packed_data():
    config = TrainConfig()
    config.stage.objective = "text_tokenizer"
    config.validate()
    config.stage.objective = "next_tokn"
    with pytest.raises(UserError, match="next_token"):
        config.validate()


def test_round_trips(tmp_path):
    config = good()
    config.stage.options = {"nested": {"list": [1, "a", None]}}
    config.stage.initialize_from = "runs/x"
    assert from_dict(config.to_dict()) == config
    save_yaml(config, tmp_path / "config.yaml", {"torch": "0"})
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
    with pytest.raises(UserError, match="no such"):
        load_yaml(tmp_path / "none.yaml")


def test_the_fingerprint_sees_what_decides_the_weights():
    base = good().fingerprint()

    def changed(change) -> bool:
        config = good()
        change(config)
        return config.fingerprint() != base

    assert changed(lambda config: setattr(config, "seed", 5))
    assert changed(lambda config: setattr(config.model, "hidden_size", 256))
    assert changed(lambda config: setattr(config.stage.loss_weights, "text", 0.3))
    assert changed(lambda config: setattr(config.stage.data.datasets["one"], "weight", 1.0))
    assert changed(lambda config: config.stage.options.update(a=1))
    assert not changed(lambda config: setattr(config.parallel, "data", 2))
    assert not changed(lambda config: setattr(config, "run_folder", "elsewhere"))
    assert not changed(lambda config: setattr(config.stage.data.datasets["one"], "path", "moved"))
    assert not changed(lambda config: setattr(config.logging, "every_steps", 7))


def config_classes(cls=TrainConfig) -> set[type]:
    found = {cls}
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            found |= config_classes(type(default))
    return found | ({DatasetEntry} if cls is TrainConfig else set())


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
