"""Text of users stays text, on the command line and in YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch.command_line import cli
from launch.composition import folders as places
from launch.composition import registry
from launch.composition.chosen import compose_files
from launch.composition.compose import compose_tree, parse_override, store_schema
from launch.composition.written_text import files_of, quoted_text
from model.errors import UserError


@dataclass
class Part:
    text: str = ""
    number: int = 0


@dataclass
class Schema:
    name: str = ""
    folder: str | None = None
    steps: int = 0
    anything: Any = None
    part: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)


TEXTS = [
    "20260105_1200",
    "0123",
    "12:00:00",
    "1.10",
    "1e5",
    "yes",
    "Hello, world",
    "/data/a[0-9].tar",
    "s3://x/{000..010}.tar",
    "~/data",
    "a=b",
    "it's (so)",
    "back\\slash\\",
    "C:\\'x",
    '"Hello" she said',
    "a\nb",
    "",
    "红色 的圆",
]


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith('"')])
@pytest.mark.parametrize("key", ["name", "folder", "part.text", "parts.mine.text", "+name", "++folder"])
def test_a_text_key_takes_what_is_written(key: str, text: str) -> None:
    override = parse_override(quoted_text(Schema, f"{key}={text}"))
    assert override.value() == text


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="$")).filter(lambda text: text[:1] not in ("'", '"'))
)
def test_any_text_arrives(text: str) -> None:
    if text != "null":
        assert parse_override(quoted_text(Schema, f"name={text}")).value() == text


@pytest.mark.parametrize(
    "override",
    ["folder=null", "name='a, b'", 'name="a"', "steps=1_000", "anything=0123", "part.number=7", "~name", "parts={}"],
)
def test_the_rest_is_hydras(override: str) -> None:
    assert quoted_text(Schema, override) == override


def test_names_and_texts_of_real_commands_arrive_as_written(tmp_path: Path) -> None:
    config = compose_tree("submit", ["cluster=slurm", "stage=pretrain_1", "name=20260105_1200", "cluster.account=0123"])
    assert (config.name, config.cluster.account) == ("20260105_1200", "0123")
    config = compose_tree("generate", ["checkpoint=a[1]", "prompt=Hello, world: yes"])
    assert (config.checkpoint, config.prompt) == ("a[1]", "Hello, world: yes")


@pytest.mark.parametrize("written", ["0123", "12:00:00", "1_000", "1.10", "on"])
def test_what_yaml_changes_is_refused_with_the_quoting_to_use(tmp_path: Path, written: str) -> None:
    own = tmp_path / "conf"
    (own / "cluster").mkdir(parents=True)
    file = own / "cluster/ours.yaml"

    def compose(value: str) -> Any:
        file.write_text(f"name: ours\nkind: slurm\npartition: gpu\naccount: {value}  # ours\ndevice: h100\n")
        return compose_tree("submit", [f"config_folder={own}", "cluster=ours", "stage=pretrain_1"])

    with pytest.raises(UserError, match=f"put it in quotes: account: '{written}'"):
        compose(written)
    assert compose(f"'{written}'").cluster.account == written
    assert compose("123").cluster.account == "123"


@pytest.mark.parametrize(
    "overrides",
    [
        ["stage=toy_sft", "parallel.data=1", "name=mine", "name=yours"],
        ["stage.steps=7", "stage=toy_sft", "model=300m", "stage.optimizer.learning_rate=1e-3"],
        ["stage=toy_sft", "stage.initialize_from=null", "seed=3", "logging.wandb_mode=disabled"],
        ["seed='7'", "validation={num_rows: 9}", "+name=x"],
        ["stage=toy_sft", "stage.nothing=1"],
        ["seed=many"],
        ["stage=toy_nothing", "seed=many"],
        ["stage=toy_sft,toy_pretrain_1"],
        ["model=300m", "~stage.steps", "+cluster=slurm"],
    ],
)
def test_what_is_kept_of_a_composition_gives_what_hydra_gives(overrides):
    schema, folders = registry.load_command("train").Config, [places.CONFIG_FOLDER]
    store_schema("train", schema)

    def told(compose_it: Callable[[], Any]) -> Any:
        try:
            return OmegaConf.to_container(compose_it())
        except HydraException as error:
            return type(error), str(error)

    def with_hydra() -> Any:
        with places.hydra_in(folders):
            return hydra.compose("train", overrides=overrides)

    parsed = [parse_override(text) for text in overrides]
    kept = [told(lambda: compose_files("train", schema, parsed, folders, files_of(folders))) for _ in range(2)]
    assert kept == [told(with_hydra)] * 2


@pytest.mark.parametrize("text", ["hydra.verbose=true", "+hydra.job.name=x", "hydra/launcher=basic"])
def test_settings_of_hydra_have_no_effect_and_are_refused(text):
    with pytest.raises(UserError, match="unknown key 'hydra"):
        compose_tree("train", [text])


def test_a_file_that_was_changed_is_read_again(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    own = f"config_folder={tmp_path}"
    for size in (64, 192):
        (folder / "mine.yaml").write_text(f"name: mine\nhidden_size: {size}\n")
        assert compose_tree("train", ["model=mine", own]).model.hidden_size == size


@pytest.mark.parametrize(
    ("content", "said"), [("a:\n  - b\n  c", "bad.yaml, line 3"), ("a: " + "[" * 3000, "too deeply")]
)
def test_a_file_that_is_no_yaml_is_one_message(tmp_path, capsys, content, said):
    (tmp_path / "curriculum").mkdir()
    (tmp_path / "curriculum/bad.yaml").write_text(content)
    assert cli.main(["curriculum", "curriculum=bad", f"config_folder={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert "cannot be read as YAML" in told
    assert said in told
