"""`nextstate submit` without a cluster: the script, its quoting, the snapshot, and every way to be refused."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_runs import fake_submission

from launch.cluster import job_folders as jobs
from launch.cluster import snapshot
from launch.cluster import submission as submit
from launch.cluster.batch_script import SECRETS_NAME
from launch.cluster.job_folders import JobFolder
from launch.cluster.profile import ClusterConfig
from launch.cluster.rank import rank_variables
from launch.cluster.submission import prepare
from launch.command_line import cli
from launch.commands import submit as command
from launch.composition.secrets import SECRET_NAME, without_secrets
from launch.report.sweep import losses_by_value, record_sweep
from model.errors import Problems, UserError
from training.reliability.signals import COMMAND_VARIABLE

NASTY = """a'b "c" $(touch pwned) `touch pwned` %j; touch pwned #"""


def script_of(config: command.Config) -> str:
    config.dry_run = True
    config.validate()
    return str(command.run(config)["script"])


def check_syntax(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_a_dry_run_prints_the_script_alone_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from launch.command_line import cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'megatron', 'transformers', 'datatrove', 'wandb'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    arguments = ["submit", "dry_run=true", "cluster=slurm", "stage=pretrain_1", "model=toy", "name=outside"]
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(snapshot.ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("#!/bin/bash\n")
    check_syntax(answer.stdout)
    assert "#SBATCH --nodes=128\n#SBATCH --ntasks-per-node=8" in answer.stdout
    assert "this would be refused" in answer.stderr  # the toy model has no 8 query groups
    assert list(tmp_path.iterdir()) == []


def test_what_a_dry_run_shows_a_submission_refuses(tmp_path):
    config = command.Config(run_folder=str(tmp_path))
    config.parallel.tensor = 3
    with pytest.raises(UserError, match="does not divide"):
        config.validate()


def test_every_setting_of_a_profile_reaches_the_script(tmp_path):
    config = fake_submission(tmp_path, num_ranks=16)
    cluster = config.cluster = ClusterConfig(
        partition="long",
        account="team",
        qos="high",
        constraint="h100&ib",
        reservation="r",
        exclude="n[1-2]",
        time_limit="1-12",
        signal_seconds=120,
        requeue=False,
        cpus_per_task=6,
        memory="0",
        gres="gpu:h100",
        options={"mail-type": "END"},
        modules=["cuda/12.8"],
        environment={"NCCL_DEBUG": "WARN"},
        network_interface="ib0",
        infiniband_devices="mlx5_0",
        container="pyxis",
        container_image="/images/a b.sqsh",
        container_mounts=["/data:/data"],
        python="/opt/python",
    )
    script = script_of(config)
    check_syntax(script)
    for line in (
        "--partition=long",
        "--account=team",
        "--qos=high",
        "--constraint='h100&ib'",
        "--reservation=r",
        "--exclude='n[1-2]'",
        "--time=1-12",
        "--signal=USR1@120",
        "--no-requeue",
        "--cpus-per-task=6",
        "--mem=0",
        "--gres=gpu:h100:8",
        "--mail-type=END",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--exclusive",
    ):
        assert f"#SBATCH {line}\n" in script
    for line in (
        "module load cuda/12.8",
        "export NCCL_DEBUG=WARN",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export NCCL_IB_HCA=mlx5_0",
        "export OMP_NUM_THREADS=6",
        "python=/opt/python",
        "--container-image='/images/a b.sqsh'",
    ):
        assert line in script
    assert f"--container-mounts=/data:/data,{Path.cwd()}:{Path.cwd()}" in script
    cluster.container, cluster.container_image = "apptainer", "a.sif"
    assert "apptainer exec --nv --bind /data:/data" in script_of(config)


def test_nothing_in_a_name_becomes_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = fake_submission(tmp_path / NASTY)
    config.name, config.cluster.partition, config.cluster.modules = NASTY, NASTY, [NASTY]
    config.cluster.environment["X"] = NASTY
    script = script_of(config)
    check_syntax(script)
    until_the_call = script[: script.index("# The ranks meet")].replace("cd --", "true --")
    show = 'module() { echo "module $2"; }\n' + until_the_call + 'echo "$job_folder"; echo "$X"; echo "${call[4]}"\n'
    told = subprocess.run(["bash"], input=show, text=True, capture_output=True, check=True, cwd=tmp_path)
    folder = tmp_path / NASTY / "jobs" / "fake"
    assert told.stdout.splitlines() == [f"module {NASTY}", str(folder), NASTY, f"{folder}/config.yaml"]
    assert not list(tmp_path.rglob("pwned"))
    (line,) = [line for line in script.splitlines() if "--partition" in line]
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--partition={NASTY}"]


@pytest.mark.parametrize("letter", ["\n", "\r", "\x1b", "\x00", "\x85", "\u2028"])
@pytest.mark.parametrize("place", ["name", "run_folder", "stage_name", "arguments", "working folder"])
def test_a_control_character_in_any_value_is_refused(tmp_path, monkeypatch, letter, place):
    """A line break would end the comment that a directive is, and what follows would be run."""
    nasty = f"a{letter}touch pwned"
    if place == "working folder":
        if letter == "\x00":
            return  # no folder can have it
        (tmp_path / nasty).mkdir()
        monkeypatch.chdir(tmp_path / nasty)
    config = fake_submission(tmp_path / (nasty if place == "run_folder" else "run"))
    config.name = nasty if place == "name" else "fine"
    config.stage.name = nasty if place == "stage_name" else config.stage.name
    if place == "arguments":
        monkeypatch.setattr(submit, "PYTHON_MODULE", [nasty])
    with pytest.raises(UserError, match=r"control character|cannot name a folder"):
        script_of(config)
    assert not (tmp_path / "run").exists()


def test_secrets_are_in_no_file_that_others_may_read(tmp_path, capfd):
    """The script of this machine is run for real: the job has its secret, the script and the log do not."""
    config = fake_submission(tmp_path)
    config.cluster.kind = "local"
    config.cluster.environment = {"WANDB_API_KEY": "hunter2 'x'", "TOKENIZERS_PARALLELISM": "false"}
    assert "hunter2" not in script_of(config)
    folder = JobFolder(tmp_path, "fake")
    config.dry_run = False
    prepare(command.work_of(config), config.cluster, folder, tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and b"hunter2" in path.read_bytes():
            assert path.stat().st_mode & 0o077 == 0
            assert path.name == SECRETS_NAME
    script = folder.script.read_text()
    check_syntax(script)
    assert "export TOKENIZERS_PARALLELISM=false" in script
    show = script[: script.index("exec ")] + 'echo "$WANDB_API_KEY"'
    told = subprocess.run(["bash"], input=show, text=True, capture_output=True, check=True)
    assert told.stdout == "hunter2 'x'\n"
    config.cluster.environment.clear()
    prepare(command.work_of(config), config.cluster, folder, tmp_path)
    assert not (folder.path / SECRETS_NAME).exists()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "KEY"])
def test_names_of_secrets(name):
    assert SECRET_NAME.search(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "KEYBOARD", "AUTHOR", "MONKEY", "token_file"])
def test_names_of_no_secrets(name):
    assert not SECRET_NAME.search(name)


def test_a_snapshot_leaves_credentials_where_they_are_and_says_so(tmp_path, monkeypatch, capsys):
    names = [".env", "conf/.env.local", "conf/secrets.yaml", "launch/id_ed25519", "model/wandb_api_key.txt"]
    names += ["training/server.pem", "launch/.netrc", "launch/.aws/credentials", "conf/hf_access_token"]
    names += ["conf/.hf_token", "conf/token.txt", "model/private_key.json", "launch/kubeconfig", "conf/x.p8"]
    kept = ["conf/model/keyframes.yaml", "conf/next_token.yaml", "data_pipeline/token_files.py", "launch/secrets.py"]
    for name in [*names, *kept]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(snapshot, "ROOT", tmp_path)
    (tmp_path / kept[0]).chmod(0o600)
    copied = snapshot.snapshot(tmp_path / "run")
    assert sorted(str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()) == kept
    assert (copied / kept[0]).stat().st_mode & 0o777 == 0o600
    told = capsys.readouterr().err
    assert all(name in told for name in names if name != ".env")  # that one is in no package


def test_the_command_to_go_on_with_has_no_secret(monkeypatch):
    """A stage prints it into its log, also on another machine."""
    monkeypatch.setenv(COMMAND_VARIABLE, "")
    monkeypatch.delenv(COMMAND_VARIABLE)
    monkeypatch.setattr("sys.argv", ["nextstate", "--version", "cluster.environment.HF_TOKEN=s3cr3t", "seed=1"])
    assert cli.main() == 0
    assert os.environ[COMMAND_VARIABLE] == "nextstate --version 'cluster.environment.HF_TOKEN=***' seed=1"


def test_control_characters_and_other_mistakes_are_all_named():
    cluster = ClusterConfig(
        kind="pbs",
        partition="a\n#SBATCH --x",
        time_limit="soon",
        signal_seconds=0,
        max_restarts=-1,
        environment={"A B": "c"},
        options={"--x": "y"},
        container="docker",
        container_mounts=["/data"],
    )
    problems = Problems()
    cluster.validate(problems)
    text = "\n".join(problems.found)
    for key in ("kind", "time_limit", "signal_seconds", "max_restarts", "environment", "options", "container_mounts"):
        assert f"cluster.{key}: " in text
    assert "control character" in text
    assert len(problems.found) == 10


def test_secrets_in_the_calls_of_an_array_are_refused(tmp_path):
    """The script holds every call of its tasks."""
    calls = {"a": ["run_folder=a"], "b": ["+cluster={environment: {HF_TOKEN: s3cr3t}}"]}
    config = command.Config(run_folder=str(tmp_path), command="report", calls=calls)
    with pytest.raises(UserError, match=r"others may read\n.*\+cluster\n") as caught:
        script_of(config)
    assert "s3cr3t" not in str(caught.value)


def test_ranks_that_do_not_fill_the_nodes_are_refused(tmp_path):
    config = fake_submission(tmp_path, num_ranks=3)
    config.cluster.tasks_per_node = 2
    with pytest.raises(UserError, match="do not fill whole nodes"):
        script_of(config)


def test_arrays_need_a_command_that_can_be_divided(tmp_path):
    config = command.Config(run_folder=str(tmp_path), shares=4)
    with pytest.raises(UserError, match="2 problems"):
        config.validate()
    tokenize = command.Config(run_folder=str(tmp_path), command="tokenize", shares=4)
    tokenize.arguments, tokenize.cluster.array_limit = (["input=x/*.tar", "target=t", "text_tokenizer=t"], 2)
    script = script_of(tokenize)
    assert "#SBATCH --array=0-3%2" in script
    assert 'num_tasks=4 "task=$SLURM_ARRAY_TASK_ID"' in script
    calls = command.Config(run_folder=str(tmp_path), command="report", calls={"a": ["run_folder=a"], "b": []})
    assert "  0) call=(-P -m launch.command_line.cli report run_folder=a) ;;" in script_of(calls)
    with pytest.raises(UserError, match="there is no command"):
        script_of(command.Config(command="tokenise"))


def test_the_snapshot_is_the_code_and_is_made_once(tmp_path):
    copy = snapshot.snapshot(tmp_path)
    assert (copy / "launch" / "cluster" / "snapshot.py").read_bytes() == Path(snapshot.__file__).read_bytes()
    assert (copy / "conf" / "stage" / "pretrain_1.yaml").exists()
    assert not list(copy.rglob("*.pyc"))
    assert snapshot.snapshot(tmp_path) == copy
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def test_srun_tells_each_task_its_rank():
    environment = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4"}
    assert rank_variables(environment) == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert rank_variables({}) == {}


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no Slurm on this machine"):
        command.run(fake_submission(tmp_path / "run"))


def test_a_stale_lock_is_none_and_a_held_one_is_respected(tmp_path):
    lock = tmp_path / "jobs" / ".submit.lock"
    lock.parent.mkdir()
    lock.write_text("since last year\n")
    with jobs.locked(tmp_path):
        assert lock.exists()
    assert not lock.exists()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another submission is at work"), jobs.locked(tmp_path):
            pass


def test_a_run_folder_of_another_configuration_is_refused(tmp_path):
    config = fake_submission(tmp_path)
    folder = tmp_path / "fake"
    folder.mkdir()
    submit.save_yaml(config_without_cluster(config), folder / "config.yaml")
    submit.check_run_folder(command.work_of(config))
    config.seed = 77
    with pytest.raises(UserError, match=r"seed: 1234 -> 77"):
        submit.check_run_folder(command.work_of(config))


def config_without_cluster(config: command.Config):
    training = command.work_of(config).training
    assert training is not None
    return training


def test_this_machine_is_a_cluster_too(tmp_path, capfd):
    (tmp_path / "shown").mkdir()
    config = command.Config(run_folder=str(tmp_path / "run"), command="report")
    config.arguments, config.cluster.kind = [f"run_folder={tmp_path}/shown"], "local"
    answer = command.run(config)
    assert (answer["state"], answer["exit_code"]) == ("done", 0), capfd.readouterr().err
    assert (tmp_path / "shown" / "report.json").exists()
    assert "srun" not in Path(answer["script"]).read_text()


def test_the_words_of_the_command_line(tmp_path, capsys):
    assert (
        cli.main(["submit", "dry_run=true", "cluster=slurm", "cluster.partition=main", f"run_folder='{tmp_path}'"]) == 0
    )
    assert "#SBATCH --partition=main" in capsys.readouterr().out


def test_losses_of_a_sweep_by_value():
    rows = [
        {"overrides": ["lr=0.02", "model=a"], "loss": 2.0},
        {"overrides": ["lr=0.01", "model=a"], "loss": 3.0},
        {"overrides": ["lr=0.01", "model=b"], "loss": 1.0},
        {"overrides": ["lr=0.03", "model=b"], "loss": None},
    ]
    found = losses_by_value(rows)
    assert found == {"lr": {"model_a": [(0.01, 3.0), (0.02, 2.0)], "model_b": [(0.01, 1.0)]}}


def test_a_sweep_shows_and_writes_no_secret(tmp_path, capfd):
    secret = "cluster.environment.HF_TOKEN=s3cr3t"
    sweep = ["seed=1,2", secret, f"run_folder='{tmp_path}'", "cluster=slurm", "dry_run=true", "json=true"]
    assert cli.main(["submit", "-m", *sweep]) == 0
    jobs = [["seed=1", secret, f"run_folder='{tmp_path}/1'"], ["seed=2", f"run_folder='{tmp_path}/2'"]]
    folder = record_sweep("submit", jobs)
    output, errors = capfd.readouterr()
    for text in (output, errors, (folder / "sweep.json").read_text()):
        assert "s3cr3t" not in text
        assert "=***" in text
        assert "seed=2" in text
    own = ["+cluster.environment={A:'1',HF_TOKEN:s3cr3t}", "lr=1,2", "text_tokenizer=a", "~stage.x"]
    assert without_secrets(own) == ["+cluster.environment=***", *own[1:]]
