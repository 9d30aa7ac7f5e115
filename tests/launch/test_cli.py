"""The command line: help without heavy imports, exit codes, one message a mistake, JSON alone on stdout."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from toy_inference import TEXT_SIZE, TEXTS

from data_pipeline.documents.tokenizers import train_sentencepiece
from launch.command_line import cli
from launch.composition import registry
from launch.local import worker
from model.checkpoint.manifest import manifest_checksum
from model.config import ModelConfig


def nextstate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.command_line.cli", *arguments], capture_output=True, text=True, check=False
    )


def modules_after(statement: str) -> set[str]:
    """Names of what is loaded, from the last line of the output: what a statement prints itself may hold any word."""
    code = f"import sys; {statement}; print(); print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split())


def test_the_overview_lists_every_command_without_importing_one():
    assert set(registry.command_summaries()) >= {"curriculum", "demo", "doctor", "inspect", "report"}
    loaded = modules_after("from launch.command_line import cli; cli.main(['--help'])")
    assert not loaded & {"torch", "hydra", "omegaconf", "numpy", "megatron"}


def test_help_and_config_of_commands_need_no_torch():
    commands = list(registry.command_summaries())
    calls = [[name, *options] for name in commands for options in (["--help"], ["--cfg", "job"])]
    calls += [["train", f"stage=toy_{name}_tokenizer", "--help"] for name in ("text", "vision")]
    loaded = modules_after(f"from launch.command_line import cli; [cli.main(call) for call in {calls}]")
    assert "launch.commands.train" in loaded
    assert not loaded & {"torch", "megatron", "numba"}


def test_a_checkpoint_that_is_not_there_is_told_before_torch_is_imported():
    calls = [
        ["generate", "checkpoint=no/such", "prompt=x"],
        ["evaluate", "checkpoint=such", "run_folder=no", "tasks={}", "tasks.a.path=no.such.Class"],
        ["serve", "checkpoint=no/such"],
        ["score", "checkpoint=no/such", "text=x"],
        ["distill", "checkpoint=no/such", "target=no/such", "prompts.t2i.options.path=x"],
    ]
    assert not modules_after_refusals(calls) & {"torch", "megatron"}


def modules_after_refusals(calls: list[list[str]]) -> set[str]:
    """What is loaded once all calls were made; each has to end with 2."""
    return modules_after(
        f"from launch.command_line import cli; assert [cli.main(call) for call in {calls}] == [2] * {len(calls)}"
    )


def test_what_is_named_beside_a_good_checkpoint_is_looked_at_before_torch_is_imported(tmp_path):
    model = {"model": asdict(ModelConfig())}
    write_manifest(tmp_path, {"kind": "transformer", **model})
    write_manifest(tmp_path / "vision", {"kind": "vision_tokenizer"})
    write_manifest(tmp_path / "cut", {"kind": "transformer", **model, "files": {"a": {"bytes": 9, "crc32": "x"}}})
    write_manifest(tmp_path / "newer", {"kind": "transformer", "model": model["model"] | {"new_key": 1}})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.model").touch()
    (tmp_path / "prompts.jsonl").write_text('{"text": "a red circle"}\n')
    tokenizers = [f"{name}_tokenizer={tmp_path}/{name}" for name in ("text", "vision")]
    common = [f"checkpoint={tmp_path}", *tokenizers]
    generate = ["generate", "prompt=x", f"out={tmp_path}/out"]
    evaluate = ["evaluate", *common, "tasks={}", "run_folder=/", f"out={tmp_path}/out.json"]
    good = ["tasks.a.path=examples.shapes_world.tasks.T2IAccuracy"]
    distill = ["distill", *common, f"target={tmp_path}/tokens"]
    prompts = f"prompts.t2i.options.path={tmp_path}/prompts.jsonl"
    signal = ["rewards.signals.one.path=rule_aesthetic", "rewards.signals.one.range=[0,1]"]
    calls = [
        [*evaluate, "tasks.a.path=no.such.Class"],
        [*evaluate, *good, "seen.a.path=no.such.Class"],
        [*evaluate, *good, "baselines.a.path=no.such.Class"],
        [*evaluate, *good, "rollouts.path=no.such.Class"],
        [*evaluate, *good, f"out={tmp_path}/manifest.json/out.json"],
        [*distill, f"prompts.t2i.options.path={tmp_path}/absent.jsonl"],
        [*distill, "prompts.t2i.path=no.such.Class"],
        [*distill, prompts, "rewards.signals.one.path=no.such.Class", "rewards.signals.one.range=[0,1]"],
        [*distill, prompts, *signal, "rewards.signals.one.tasks=[x2i]"],
        [*distill, prompts, f"target={tmp_path}/manifest.json"],
        [*generate, *common, "format=x2i", "images=[absent.png]"],
        [*generate, *common, f"text_tokenizer={tmp_path}/vision"],
        [*generate, *common, f"vision_tokenizer={tmp_path}"],
        [*generate, *tokenizers, f"checkpoint={tmp_path}/cut"],
        [*generate, *tokenizers, f"checkpoint={tmp_path}/newer"],
        ["score", f"checkpoint={tmp_path}", f"tokens={tmp_path}/absent.npy"],
    ]
    assert not modules_after_refusals(calls) & {"torch", "megatron"}


def write_manifest(folder: Path, values: dict) -> None:
    folder.mkdir(exist_ok=True)
    manifest = {"format_version": 1, "keys": {}, "files": {}} | values
    (folder / "manifest.json").write_text(json.dumps(manifest | {"manifest_crc32": manifest_checksum(manifest)}))


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["stage=text_tokenizer"], "stage.objective.corpora="),
        (["stage=toy_text_tokenizer"], "stage.objective.corpora="),
        (["stage=toy_vision_tokenizer"], "stage.objective.data.corpora."),
        (["stage=toy_rl", "stage.objective.prompts.own.options.path=no/such"], "prompts.own.options.path=no/such"),
        (["stage=toy_rl", "stage.objective.text_tokenizer=no/such"], "stage.objective.text_tokenizer=no/such"),
        (
            ["stage=toy_rl", "stage.objective.rewards.signals.scene.path=no.such.Reward"],
            "stage.objective.rewards.signals.scene=no.such.Reward",
        ),
        (["stage=toy_sft", "callbacks.mine.path=no.such.Callback"], "callbacks.mine.path=no.such.Callback"),
        (
            ["stage=toy_sft", "callbacks.mine.path=training.engines.replicated.ReplicateEngine"],
            "has no attribute 'ReplicateEngine'",
        ),
        (["stage=toy_sft", "engine=training.engines.replicate.ReplicatedEngine"], "engine=training.engines.replicate"),
        (["stage=toy_dida", "stage.objective.vision_tokenizer=no/such"], "stage.objective.vision_tokenizer=no/such"),
    ],
)
def test_inputs_that_are_not_there_are_told_before_a_stage_starts(arguments, missing, tmp_path, capsys):
    call = ["train", *arguments, f"run_folder={tmp_path / 'run'}"]
    assert not modules_after_refusals([call]) & {"torch", "megatron"}
    assert cli.main(call) == 2
    assert missing in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_help_shows_groups_keys_types_values_and_comments(capsys):
    assert cli.main(["train", "stage=pretrain_1", "--help"]) == 0
    text = capsys.readouterr().out
    assert "emu35_34b" in text
    assert "pretrain_2, rl, rl_one_node, sft" in text
    steps = next(line for line in text.splitlines() if "stage.steps " in line)
    assert "700000" in steps
    assert "int" in steps
    assert "shard optimizer state over data-parallel ranks" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "nextstate train"),
        (["saver"], "nextstate --help"),  # like several commands, and near none
        (["train", "stage.stepz=3"], "did you mean stage.steps?"),
        (["train", "stage.model=toy"], "did you mean model?"),
        (["train", "cluster=h100"], "cluster is a key of nextstate curriculum, demo, plan, submit"),
        (["train", "help"], "nextstate train --help"),
        (["convert", "from_hf", "source=docs", "target=/dev/null/x", "layout=emu35"], "Not a directory"),
        (["report", "runs/mine"], "nextstate report run_folder=runs/mine"),
        (["plan", "now"], "nextstate plan run_folder=now"),
        (["train", "optimizer.learning_rate=1"], "did you mean stage.optimizer.learning_rate?"),
        (["train", "stage.optimizer.lr=1"], "did you mean stage.optimizer.learning_rate?"),
        (["train", "lr=1"], "did you mean stage.optimizer.learning_rate?"),
        (["train", "parallel.tp=2"], "did you mean parallel.tensor?"),
        (["train", "stage.seq_len=64"], "did you mean stage.sequence_length?"),
        (["train", "stage.objective.weights=1"], "did you mean stage.objective.loss_weights?"),
        (["train", "+surprise=1"], "unknown key 'surprise'"),
        (["train", "+model.surprise=1"], "unknown key 'model.surprise'"),
        (["train", "stage.data.datasets.extra.pth=x"], "unknown key 'stage.data.datasets.extra.pth'"),
        (["train", "stage.steps=many"], "stage.steps"),
        (["train", "stage=pretrain_3"], "stage=pretrain_2"),
        (["train", "stage.steps=a=b"], """quote values with special characters: 'stage.steps="a=b"'"""),
        (["train", "stage.steps"], "not of the form key=value"),
        (["train", "--frobnicate"], "unknown option"),
        (["train", "--cfg", "hydra"], "--cfg job"),
        (["train", "run_folder=${nam}"], "nam"),
        (["inspect"], "give a path or a model"),
        (["inspect", "no/such/file"], "there is no such file"),
        (["report", "run_folder=no/such/run"], "no such run folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, expected, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_help_takes_a_command(capsys):
    assert cli.main(["help", "report"]) == 0
    assert "usage: nextstate report" in capsys.readouterr().out


def test_a_shard_that_is_no_archive_is_told_so(tmp_path, capsys):
    (tmp_path / "notes.tar").write_text("words " * 200)
    train_sentencepiece(TEXTS, tmp_path / "text", TEXT_SIZE)
    call = ["tokenize", f"input={tmp_path}/notes.tar", f"target={tmp_path}/tokens", f"text_tokenizer={tmp_path}/text"]
    assert cli.main(call) == 2
    assert "no tar archives at all" in capsys.readouterr().err
    assert cli.main(["inspect", f"{tmp_path}/notes.tar"]) == 2
    assert "notes.tar: cut or damaged before its first sample: not a tar archive\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["defaults: [oops\n", "- 1\n", "defaults: {a: b}\n", "\tx: 1\n"])
def test_a_command_file_of_ones_own_that_cannot_be_read_is_one_message(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train"]) == 2
    assert str(tmp_path / "conf" / "train.yaml") in capsys.readouterr().err


# The reader's own file of conf/stage/ (None: there is none), and what is said of it.
OWN_FILES = {
    "one level too deep": (b"stage: {name: own, steps: 2}", "`# @package _global_` as the first line"),
    "not in UTF-8": ("# @package _global_\nstage: {name: ä}".encode("latin-1"), "own.yaml"),
    "a list for a mapping": (b"# @package _global_\nstage: [1, 2]", "stage/own"),
    "in another folder": (None, "config_folder=FOLDER"),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_stage_of_ones_own_that_cannot_be_read_is_one_message(name, tmp_path, monkeypatch, capsys):
    content, expected = OWN_FILES[name]
    if content is not None:
        (tmp_path / "conf" / "stage").mkdir(parents=True)
        (tmp_path / "conf" / "stage" / "own.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "stage=own"]) == 2
    assert expected in capsys.readouterr().err


def test_every_problem_of_a_configuration_is_listed_with_its_mend(capsys):
    assert cli.main(["train", "stage.steps=-1", "model.num_query_groups=3", "parallel.tensor=1"]) == 2
    message = capsys.readouterr().err
    assert "problems" in message
    assert "stage.steps" in message
    assert "model.num_query_groups=4" in message


def test_a_mapping_takes_new_names_without_a_plus(capsys):
    assert cli.main(["train", "stage.data.datasets.extra.path=somewhere", "--cfg", "job"]) == 0
    assert "extra:\n        path: somewhere\n        weight: 1.0" in capsys.readouterr().out


def test_json_answers_are_alone_on_stdout_whatever_is_printed(tmp_path):
    script = (
        "import os, sys, types; from launch.command_line import cli; from launch.composition import registry; real = registry.load_command('inspect');"
        "fake = types.SimpleNamespace(Config=real.Config, HELP='', run=lambda config: (print('noise'),"
        "os.system('echo child'), {'answer': 1})[2]);"
        "registry.load_command = lambda name: fake; sys.exit(cli.main(['inspect', 'path=x', 'json=true']))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert json.loads(finished.stdout) == {"answer": 1}
    assert "noise" in finished.stderr
    assert "child" in finished.stderr


def test_a_mistake_under_json_answers_json_too(capsys):
    assert cli.main(["train", "stage.stepz=3", "json=true"]) == 2
    assert "stage.stepz" in json.loads(capsys.readouterr().out)["error"]


def test_a_defect_shows_its_traceback_and_exits_with_1():
    script = (
        "import sys, types; from launch.command_line import cli; from launch.composition import registry; real = registry.load_command('inspect');"
        "registry.load_command = lambda name: types.SimpleNamespace(Config=real.Config, run=lambda config: 1 / 0);"
        "sys.exit(cli.main(['inspect', 'path=x']))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "ZeroDivisionError" in finished.stderr


def test_a_full_disk_is_the_users_to_mend(monkeypatch, capsys):
    def full(call):
        raise OSError(28, "No space left on device", "runs/demo/x")

    monkeypatch.setattr(cli, "execute", full)
    assert cli.main(["doctor"]) == 2
    assert "disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.EIO])
def test_what_the_system_says_of_a_file_is_the_users_to_mend(number, tmp_path, monkeypatch, capsys):
    """In every command and in every rank, whoever opened the file."""

    def refused(*_):
        raise OSError(number, os.strerror(number), "runs/demo/x")

    monkeypatch.setattr(cli, "execute", refused)
    assert cli.main(["doctor"]) == 2
    monkeypatch.setitem(worker.TASKS, "train", refused)
    for name in ("end_with_parent", "hear_signals"):
        monkeypatch.setattr(worker, name, lambda: None)
    monkeypatch.setenv(worker.REPORT_VARIABLE, str(tmp_path / "report.json"))
    assert worker.main(["--config", "x"]) == 2
    for told in (capsys.readouterr().err, json.loads((tmp_path / "report.json").read_text())["message"]):
        assert os.strerror(number) in told
        assert "runs/demo/x" in told
        assert "fix:" in told


def test_an_error_of_the_system_that_is_about_no_file_is_a_defect(monkeypatch):
    def refused(call):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "execute", refused)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["doctor"])


def test_files_in_the_way_of_cheap_commands_are_one_message(tmp_path, capsys):
    """Really tried, as root too: a folder in place of a file, a file in place of a folder, a link to itself."""
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("x")
    (tmp_path / "run" / "report.json").mkdir(parents=True)
    (tmp_path / "answers.jsonl").write_text("")
    rewards = ["signals.rule.path=rule_aesthetic", f"answers={tmp_path}/answers.jsonl"]
    calls = [
        ["report", f"run_folder={tmp_path}/run"],
        ["chats", f"input={tmp_path}", f"target={tmp_path}/target"],
        ["chats", f"input={tmp_path}/answers.jsonl", f"target={tmp_path}/file"],
        ["rewards", "score", *rewards, f"out={tmp_path}/file/scores.jsonl"],
        ["rewards", "score", rewards[0], f"answers={tmp_path}/circle", f"out={tmp_path}/scores.jsonl"],
        ["inspect", f"{tmp_path}/circle"],
        ["tokenize", f"input={tmp_path}/circle", f"target={tmp_path}/file/x", f"text_tokenizer={tmp_path}/circle"],
        ["pack", f"tokens.text={tmp_path}/file", f"target={tmp_path}/circle"],
        ["train", "stage=toy_text_tokenizer", f"run_folder={tmp_path}/file", "preflight=false"]
        + [f"stage.objective.corpora=[{tmp_path}/circle]"],
    ]
    for call in calls:
        assert cli.main(call) == 2, call
        assert capsys.readouterr().err.count("error: ") == 1, call


def test_multirun_runs_each_combination_in_its_own_folder(tmp_path):
    """`curriculum dry_run=true` is the cheapest command with a run folder."""
    command = ["curriculum", "-m", f"run_folder={tmp_path}", "dry_run=true", "until=corpora", "name=a,b", "json=true"]
    finished = nextstate(*command)
    assert finished.returncode == 0, finished.stderr
    jobs = json.loads(finished.stdout)["jobs"]
    assert len({job["answer"]["run_folder"] for job in jobs}) == 2
    assert {job["answer"]["name"] for job in jobs} == {"a", "b"}


def test_a_bad_job_of_a_multirun_stops_it_before_the_first_starts(capsys):
    assert cli.main(["inspect", "-m", "model=toy,huge", "json=true"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("there is no model named 'huge'")
