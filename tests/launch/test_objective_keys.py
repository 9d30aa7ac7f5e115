"""`stage.objective.*`: keys of the objective that is chosen, typed, shown in the help, refused when it has no such key."""

import dataclasses
import typing

import pytest

from launch.command_line import cli
from launch.command_line.help import field_comments
from launch.composition.compose import compose_config
from launch.composition.registry import command_summaries, load_command
from model.registry import find_class, without_none
from training.objectives.registry import KEY, OPTIONS

OBJECTIVE = "fake_objective.FakeObjective"


@pytest.fixture(autouse=True)
def other_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("form", ["stage.objective=NAME", "stage.objective.name=NAME", "stage/objective=NAME"])
def test_an_objective_is_chosen_as_an_option_of_a_group_is(form):
    """It starts from its own defaults, not from what the preset gives to another one."""
    config = compose_config("plan", ["stage=toy_pretrain_1", form.replace("NAME", "next_token")])
    assert config.stage.objective["loss_weights"]["text"] == 0.2
    with pytest.raises(Exception, match=r"stage\.objective\.corpora: is required"):
        compose_config("train", ["stage=toy_pretrain_1", form.replace("NAME", "text_tokenizer")])


def test_options_are_complete_and_typed():
    config = compose_config("train", ["stage=toy_text_tokenizer", "stage.objective.size=512", "run_folder=R"])
    assert config.stage.objective == {
        "name": "text_tokenizer",
        "corpora": ["R/corpora/*/*.tar"],
        "size": 512,
        "character_coverage": 0.9995,
        "max_bytes": 1 << 30,
        "template_copies": 2000,
        "extra_texts": [],
        "kinds": [],
        "parts": {"caption": "", "ignore": []},
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stage.objective.clip_rang=0.2"], "stage.objective.clip_rang: the objective next_token has no such key"),
        (["stage.objective.loss_weights.txt=1"], "did you mean stage.objective.loss_weights.text?"),
        (["stage.objective.loss_weights.text=many"], "stage.objective.loss_weights.text"),
        (["stage=toy_vision_tokenizer", "stage.objective.loss_weights.text=9"], "vision_tokenizer has no such key"),
        (["stage=toy_vision_tokenizer", "stage.objective.data.views=[{aera: 9}]"], "data.views.0.aera"),
        (["stage=toy_text_tokenizer", "stage.initialize_from=x"], "no effect with the objective text_tokenizer"),
        (["stage=toy_vision_tokenizer", "stage.data.datasets.a.path=x"], "no effect with the objective"),
        (["stage.objective=next_tokn"], "stage.objective.name=next_token"),
        (["stage.objective=my_package.Mine"], "the objective cannot be imported"),
        (["stage.options.size=4"], "fix:      stage.objective.size"),
        (["+stage.options.size=4"], "fix:      stage.objective"),
        (["stage.loss_weights.text=9"], "fix:      stage.objective.loss_weights.text"),
        (["stage.document_attention=full"], "fix:      stage.objective.document_attention"),
        (["loss_weights.text=9"], "did you mean stage.objective.loss_weights.text?"),
        (["engine=megatrn"], "engine=megatron"),
    ],
)
def test_keys_of_no_effect_are_refused(overrides, expected, capsys):
    assert cli.main(["train", *overrides]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("objective: next_token", "objective: {name: next_token}"),
        ("loss_weights: {text: 1.0}", "stage.objective.loss_weights"),
        ("objective: {clip_range: 0.2}", "stage.objective.clip_range"),
    ],
)
def test_a_preset_in_the_former_form_is_told_the_new_one(stage, expected, tmp_path, capsys):
    (tmp_path / "conf" / "stage").mkdir(parents=True)
    (tmp_path / "conf" / "stage" / "mine.yaml").write_text(f"# @package _global_\nstage:\n  name: mine\n  {stage}\n")
    assert cli.main(["train", "stage=mine"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["toy_pretrain_1", "toy_vision_tokenizer", "toy_text_tokenizer"])
def test_the_help_shows_the_keys_of_the_stages_objective(stage, capsys):
    assert cli.main(["train", f"stage={stage}", "--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"    {KEY}.")]
    assert "next_token | dida | diagonal | grpo | vision_tokenizer | text_tokenizer | package.module.Class" in lines[0]
    name = lines[0].split()[1]
    plain = [one for one, kind in leaves(find_class("objective", name, OPTIONS, ""))]
    assert sorted(line.split()[0].removeprefix(f"{KEY}.") for line in lines[1:]) == sorted(plain)


def leaves(schema: type, prefix: str = "") -> list[tuple[str, type]]:
    """(dotted key, dataclass that has it) of every plain field."""
    found = []
    for name, hint in typing.get_type_hints(schema).items():
        inner = without_none(hint)
        if name not in {field.name for field in dataclasses.fields(schema)}:
            continue
        if dataclasses.is_dataclass(inner):
            found += leaves(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, schema))
    return found


def entries_of(schema: type) -> set[type]:
    """Dataclasses in the lists and mappings of a dataclass, and of those in it."""
    found = set()
    for hint in typing.get_type_hints(schema).values():
        inner = without_none(hint)
        for one in (inner, *typing.get_args(inner)):
            if dataclasses.is_dataclass(one):
                found |= {one} | entries_of(one)
    return found


def test_every_key_of_every_command_has_a_comment():
    schemas = {load_command(name).Config for name in command_summaries()}
    schemas |= {find_class("objective", name, OPTIONS, "") for name in OPTIONS}
    owners: dict[type, set[str]] = {}
    for schema in schemas | set().union(*(entries_of(schema) for schema in schemas)):
        for key, owner in leaves(schema):
            owners.setdefault(owner, set()).add(key.rpartition(".")[2])
    uncommented = {
        f"{owner.__module__}.{owner.__qualname__}": keys - field_comments(owner).keys()
        for owner, keys in owners.items()
    }
    assert not {owner: keys for owner, keys in uncommented.items() if keys}


def test_a_key_of_another_command_is_refused_with_its_new_name(capsys):
    assert cli.main(["pack", "target=t", "open_bins=3"]) == 2
    assert "open_bins is called window_rows now" in capsys.readouterr().err
