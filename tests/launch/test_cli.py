"""The command line: help without heavy imports, exit codes, one message a mistake, JSON alone on stdout."""

import errno
import json
import os
import subprocess
import sys

import pytest

from launch.command_line import cli
from launch.composition import registry
from launch.local import worker


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
    assert not loaded & {"torch", "megatron"}


def test_a_checkpoint_that_is_not_there_is_told_before_torch_is_imported():
    calls = [
        ["generate", "checkpoint=no/such", "prompt=x"],
        ["evaluate", "checkpoint=such", "run_folder=no", "tasks={}", "tasks.a.path=no.such.Class"],
        ["serve", "checkpoint=no/such"],
        ["score", "checkpoint=no/such", "text=x"],
    ]
    loaded = modules_after(
        f"from launch.command_line import cli; assert [cli.main(call) for call in {calls}] == [2] * 4"
    )
    assert not loaded & {"torch", "megatron"}


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
        (["report", "runs/mine"], "nextstate report run_folder=runs/mine"),
        (["plan", "now"], "nextstate plan run_folder=now"),
        (["train", "optimizer.learning_rate=1"], "did you mean stage.optimizer.learning_rate?"),
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
