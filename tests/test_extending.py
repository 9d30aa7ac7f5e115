"""docs/extending.md as a user's own folder: everything on the page runs, and nothing of ours is changed for it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from documented_files import standing_in, write_shown_files
from tiny_stage import write_packed

from data_pipeline.documents.builder import Text
from data_pipeline.filters.base import FilterChain
from data_pipeline.kinds.base import MediaDecoder, PreparedSample
from data_pipeline.kinds.registry import KindSet
from data_pipeline.sources.image import ImageConfig
from data_pipeline.sources.samples import SampleError
from data_pipeline.video.keyframes import VideoConfig
from launch.command_line import cli
from launch.commands import submit
from launch.composition.compose import compose_config
from model.errors import UserError
from training.inference.evaluation import evaluate, load_task
from training.metrics import METRICS_NAME
from training.objectives.registry import options_of
from training.rewards.base import Answer
from training.rewards.system import RewardSystem

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


@pytest.fixture
def own_folder(tmp_path: Path) -> Iterator[Path]:
    write_shown_files(PAGE, tmp_path)
    with standing_in(tmp_path):
        yield tmp_path


def nextstate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As the installed command runs: the working folder is not where Python looks first (`-P`)."""
    command = [sys.executable, "-P", "-m", "launch.command_line.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_page_trains(own_folder):
    """Objective, engine, callback, model, stage and curriculum of the user's own, in the ranks of a curriculum's entry."""
    run = own_folder / "runs" / "mine"
    write_packed(run)
    finished = nextstate("curriculum", "curriculum=mine", "json=true")
    assert finished.returncode == 0, finished.stderr
    assert {entry["state"] for entry in json.loads(finished.stdout)["entries"]} == {"done"}
    summary = json.loads((run / "focal" / "summary.json").read_text())
    assert (summary["objective"], summary["steps"], summary["data"]) == ("my_lab.objectives.Focal", 4, 2)
    lines = [json.loads(line) for line in (run / "focal" / METRICS_NAME).read_text().splitlines()]
    written = [line.split() for line in (run / "focal" / "losses.txt").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in written] == [
        (line["step"], line["loss"]) for line in lines if line["step"] % 2 == 0
    ]
    assert "forward and backward: " in finished.stderr
    # Focal: (1 - p)^2 leaves nearly all of the loss of a fresh model, and never more than it.
    assert 0.9 < lines[0]["loss"] / np.log(160) < 1.1
    manifest = json.loads(next((run / "focal" / "checkpoints").glob("step_*/manifest.json")).read_text())
    assert manifest["config"]["stage"]["objective"]["gamma"] == 2.0


def test_options_of_the_users_objective_are_typed_and_listed(own_folder, capsys):
    config = compose_config("train", ["model=nano", "stage=focal", "stage.objective.gamma=1"])
    assert config.stage.objective["gamma"] == 1.0
    assert config.stage.objective["loss_weights"] == {"text": 1.0, "visual": 0.5, "structure": 1.0}
    for override, message in (("gama=1", "did you mean stage.objective.gamma"), ("gamma=-1", "must not be negative")):
        with pytest.raises(UserError, match=message):
            compose_config("train", ["model=nano", "stage=focal", f"stage.objective.{override}"])
    assert cli.main(["train", "stage=focal", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "0: plain cross entropy" in shown
    for option in ("nano", "focal"):
        assert f"{option}, " in shown


def test_the_users_kind_and_filter_see_samples(own_folder):
    config = compose_config(
        "tokenize",
        ["input=raw/*.tar", "target=t", "text_tokenizer=t", "kinds=[my_lab.kinds.Poem,text]"]
        + ["filters=[{name: my_lab.filters.LetterShare, minimum: 0.6}]"],
    )
    kinds, filters = KindSet(config.kinds), FilterChain(config.filters)
    sample = kinds.sample("one", {"title.txt": b"Spring", "verses.txt": b"Green, green."})
    assert (sample.kind, list(kinds["poem"].texts(sample))) == ("poem", ["Green, green."])
    assert kinds.sample("two", {"txt": b"prose"}).kind == "text"
    decoder = MediaDecoder(ImageConfig(), VideoConfig(), 8)
    parts = kinds["poem"].prepare(sample, decoder)
    assert parts == [Text("Spring\n\nGreen, green.")]
    filters.check(PreparedSample("one", "poem", parts))
    with pytest.raises(SampleError, match="filter_letter_share"):
        filters.check(PreparedSample("two", "poem", [Text("1 2 3 4 x")]))


def test_the_users_task_judges(own_folder):
    class Painter:
        def generate(self, prompts, sampling, seed, first_index=0):
            from training.inference.prompts import Output

            red = np.zeros((16, 16, 3), np.uint8)
            red[..., 0] = 200
            return [Output("", [red], [red], np.zeros(1), np.zeros(1), True) for _ in prompts]

    config = compose_config("evaluate", ["evaluation=colours"])
    arguments = {key: value for key, value in config.tasks["red"].items() if key != "path"}
    task = load_task(config.tasks["red"]["path"], arguments)
    result = evaluate(Painter(), {"red": task}, config.sampling)["red"]
    assert (result["accuracy"], result["count"]) == (1.0, 4)


def test_the_users_reward_judges_beside_ours(own_folder):
    """As the reinforcement learning of a configuration makes it."""
    changed = "stage.objective.rewards.signals.red={path: my_lab.rewards.Redness, range: [0.0, 1.0]}"
    config = compose_config("train", ["stage=toy_rl", "run_folder=runs/mine", changed])
    system = RewardSystem(options_of(config).rewards)
    red, blue = np.zeros((2, 8, 8, 3), np.uint8)
    red[:4, :, 0] = red[4:, :, 1] = 100
    blue[:4, :, 1] = blue[4:, :, 2] = 100
    judged = system.judge([Answer("t2i", images=[picture], fields={"scenes": [[]]}) for picture in (red, blue, None)])
    assert judged.raw["red"][:2] == pytest.approx([0.5, 0.0])
    assert judged.signals["red"] == pytest.approx([5.5, 1.0, 1.0])
    assert set(judged.raw) == {"scene", "red"}


def script_of(*overrides: str) -> str:
    answer = submit.run(compose_config("submit", ["cluster=ours", "model=nano", "dry_run=true", *overrides]))
    return str(answer["script"])


def test_the_users_cluster_and_folder_reach_a_job(own_folder, monkeypatch):
    script = script_of("stage=focal", "run_folder=runs/mine")
    assert "#SBATCH --partition=gpu" in script
    assert f"work_folder={own_folder}" in script
    assert '"$code${PYTHONPATH:+:$PYTHONPATH}:$work_folder"' in script
    (own_folder / "elsewhere").mkdir()
    monkeypatch.chdir(own_folder / "elsewhere")
    folder = "config_folder=../conf"
    job = script_of(folder, "command=evaluate", 'arguments=["evaluation=colours"]')
    assert shlex.join(["evaluate", "config_folder='../conf'", "evaluation=colours"]) in job
    config = compose_config("curriculum", ["curriculum=mine", folder])
    assert config.entries["focal"].overrides[0] == "config_folder='../conf'"
    assert config.entries["note"].overrides == ["runs/mine/note.txt"]


def test_where_configurations_are_looked_for(own_folder):
    with pytest.raises(UserError, match="no stage named 'focal'"):
        compose_config("train", ["stage=focal", "config_folder=null"])
    with pytest.raises(UserError, match="no such folder"):
        compose_config("train", ["config_folder=nowhere"])
    (own_folder / "conf" / "model" / "toy.yaml").write_text("name: mine\n")
    assert compose_config("convert", ["action=init", "target=x", "model=toy"]).model.name == "mine"
    assert compose_config("convert", ["action=init", "target=x", "model=toy", "config_folder=null"]).model.name == "toy"


def test_the_help_tells_of_the_folder(own_folder, capsys):
    """Also of commands that have no field for it because they start no other command."""
    for command in ("train", "submit", "curriculum", "report"):
        assert cli.main([command, "--help"]) == 0
        assert "    config_folder " in capsys.readouterr().out, command
