"""The curriculum: order, skipping, what makes an entry run again, failures, signals, and its state on disk."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from small_disk import small_disk

from launch.command_line.calls import split_calls
from launch.commands import curriculum as command
from launch.composition.compose import compose_config
from launch.curriculum.entries import (
    Curriculum,
    CurriculumConfig,
    EntryConfig,
    alive,
    command_line,
    locked,
    measure,
    ordered,
    summary,
)
from launch.curriculum.running import LocalRun, run_curriculum
from launch.local import subprocesses
from launch.local.subprocesses import run_supervised
from model.errors import UserError

WRITER = """
import sys, pathlib
target, text = sys.argv[1:3]
path = pathlib.Path(target)
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(text)
with open(path.parent / "ran.txt", "a") as log:
    log.write(path.name + "\\n")
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A curriculum of three entries a -> b -> c, each writing one file with a small script."""
    (tmp_path / "writer_module.py").write_text(WRITER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def build(texts=("1", "2", "3"), **options):
        run = tmp_path / "run"
        entries = {}
        for name, text, needs in zip("abc", texts, ([], ["a"], ["b"]), strict=True):
            entries[name] = EntryConfig(
                module="writer_module", overrides=[str(run / name), text], needs=needs, outputs=[name]
            )
        config = CurriculumConfig(name="test", run_folder=str(run), entries=entries, **options)
        config.validate()
        return config

    return build


def ran(config: CurriculumConfig) -> list[str]:
    path = Path(config.run_folder) / "ran.txt"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_entries_run_in_order_once_and_are_recorded(make):
    config = make()
    answer = run_curriculum(config)
    assert ran(config) == ["a", "b", "c"] == answer["ran"]
    state = json.loads((Path(config.run_folder) / "curriculum.json").read_text())
    assert [entry["state"] for entry in state["entries"].values()] == ["done"] * 3
    assert all(entry["exit_code"] == 0 for entry in state["entries"].values())
    assert state["wall_seconds"] > 0
    assert run_curriculum(config)["ran"] == []
    assert ran(config) == []


def test_a_changed_entry_runs_again_with_everything_after_it(make):
    run_curriculum(make())
    config = make(texts=("1", "changed", "3"))
    ran(config)
    assert [one["state"] for one in run_states(config)] == ["done", "changed", "done"]
    assert run_curriculum(config)["ran"] == ["b", "c"]
    assert (Path(config.run_folder) / "superseded" / "b" / "b").read_text() == "2"


def run_states(config: CurriculumConfig) -> list[dict]:
    curriculum = Curriculum(config)
    return [{"name": name, "state": curriculum.state(name)} for name in curriculum.order]


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_output_is_made_again(make, damage):
    config = make()
    run_curriculum(config)
    target = Path(config.run_folder) / "b"
    target.unlink() if damage == "delete" else target.write_text("")
    assert run_curriculum(config)["ran"] == ["b", "c"]
    assert target.read_text() == "2"


def test_force_until_and_dry_run(make, capsys):
    assert run_curriculum(make(until="b"))["ran"] == ["a", "b"]
    answer = command.run(make(dry_run=True))
    assert answer["ran"] == []
    assert [(one["what"], one["is_due"]) for one in answer["planned"]] == [
        ("writer_module", name == "c") for name in "abc"
    ]
    assert "up to date" in command.render(answer)
    assert run_curriculum(make())["ran"] == ["c"]
    assert run_curriculum(make(force=["b"]))["ran"] == ["b", "c"]


def test_keys_of_an_entry_are_set_from_the_command_line():
    sft = EntryConfig(command="train", overrides=["stage=toy_sft", "stage.steps=500"], outputs=["sft"])
    entries = {"sft": sft, "corpora": EntryConfig(module="m", outputs=["x"])}
    values = {"parallel": {"data": 1}, "stage": {"steps": 77, "optimizer": {"learning_rate": 1e-5}}, "name": "a'b\\"}
    config = CurriculumConfig(entries=entries, set={"sft": values})
    config.validate()
    trained = compose_config("train", config.entries["sft"].overrides)
    assert (trained.parallel.data, trained.stage.steps, trained.name) == (1, 77, "a'b\\")
    assert trained.stage.optimizer.learning_rate == 1e-5
    with pytest.raises(UserError, match="5 problems"):
        CurriculumConfig(entries=entries, set={"no_entry": {"a": 1}, "corpora": {"a": 1}, "sft": 7, "x": 1}).validate()


def test_a_failing_entry_stops_the_curriculum_with_its_code_and_message(make, capsys):
    config = make()
    config.entries["b"] = EntryConfig(command="report", overrides=["run_folder=no/such"], needs=["a"], outputs=["b"])
    answer = run_curriculum(config)
    assert (answer["exit_code"], answer["stopped_at"]) == (2, "b")
    assert "no such run folder" in capsys.readouterr().err
    assert "no such run folder" in (Path(config.run_folder) / "logs" / "b.log").read_text()
    assert [one["state"] for one in run_states(config)] == ["done", "failed", "pending"]
    shown = command.render(summary(Curriculum(config))).splitlines()
    assert [line for line in shown if line.startswith("b: ")] == ["b: error: there is no such run folder"]


def test_status_shows_the_figures_of_entries_of_every_kind(tmp_path):
    """Each from files as its command leaves them, wherever below the run folder its outputs are."""
    for name, count in (("raw/a", 3), ("tokens/one", 2), ("packed/one", 1), ("packed/two", 1)):
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / name / f"{number:06d}.{'tar' if name.startswith('raw') else 'json'}").write_text(
                '{"num_rows": 40}'
            )
    os.utime(tmp_path / "tokens/one/000000.json", (1000.0, 1000.0))
    os.utime(tmp_path / "tokens/one/000001.json", (1060.0, 1060.0))
    (tmp_path / "packed/one/dataset.json").write_text('{"num_rows": 50, "num_tokens": 3200}')
    (tmp_path / "final.json").write_text('{"metrics": {"t2i_accuracy": 0.75, "num_prompts": 8}}')
    settings = "stage: {steps: 40, sequence_length: 64, objective: {name: next_token}}"
    held_out = {"held_out_loss": {"photos": {"all": 1.25, "text": 2.0}}}
    for folder, rest in (("models/deep", {}), ("rl", {"reward": 0.5})):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text(settings)
        line = {"loss": 2.5, "step_seconds": 2.0, "tokens_per_second": 128.0, "consumed_samples": 60}
        lines = [{"step": 20} | line | held_out, {"step": 30} | line | rest]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    token = [f"input={tmp_path}/raw/a/*.tar", f"target={tmp_path}/tokens/one"]
    packs = {name: [f"target={tmp_path}/packed/{name}"] for name in ("one", "two")}
    entries = {
        "tokenize_all": EntryConfig(command="tokenize", overrides=token, outputs=["tokens/one"]),
        "pack": EntryConfig(command="pack", each=packs, outputs=["packed"]),
        "pack_one": EntryConfig(command="pack", overrides=packs["one"], outputs=["packed/one"]),
        "model": EntryConfig(command="train", outputs=["models/deep"]),
        "rewarded": EntryConfig(command="train", outputs=["rl/summary.json"]),
        "evaluate": EntryConfig(command="evaluate", outputs=["final.json"]),
        "later": EntryConfig(command="train", outputs=["nothing"]),
    }
    answer = summary(Curriculum(CurriculumConfig(run_folder=str(tmp_path), entries=entries)))
    found = {entry["name"]: entry for entry in answer["entries"]}
    expected = {
        "tokenize_all": {"step": 2, "total": 3, "unit": "shards", "rate": 60.0, "eta_seconds": 60.0},
        "pack": {"step": 80, "total": None, "unit": "rows"},
        "pack_one": {"step": 50, "total": 50, "unit": "rows", "tokens": 3200},
        "model": {"step": 30, "total": 40, "tokens": 3840, "eta_seconds": 20.0, "loss": 2.5, "rate": 128.0}
        | {"figures": {"loss": 2.5, "held-out photos": 1.25}},
        "rewarded": {"step": 30, "figures": {"reward": 0.5, "held-out photos": 1.25}},
        "evaluate": {"figures": {"t2i_accuracy": 0.75}},
    }
    for name, values in expected.items():
        assert {key: found[name].get(key) for key in values} == values, name
    assert "step" not in found["later"]
    shown = command.render(answer)
    for part in ("2/3 shards", "80 rows", "30/40 steps", "128 tokens/s", "reward 0.5, held-out photos 1.25"):
        assert part in shown
    assert "restarts" not in shown  # no entry is a job


def test_an_entry_that_writes_nothing_is_a_failure(make, capsys):
    config = make()
    config.entries["b"] = EntryConfig(module="this", needs=["a"], outputs=["b"])
    assert run_curriculum(config)["exit_code"] == 1
    assert "did not write b" in capsys.readouterr().err


def test_needs_decide_the_order_and_circles_are_refused():
    entries = {name: EntryConfig(module="m", needs=needs) for name, needs in {"c": ["b"], "a": [], "b": ["a"]}.items()}
    assert ordered(entries) == ["a", "b", "c"]
    entries["a"].needs = ["c"]
    with pytest.raises(UserError, match="circle"):
        ordered(entries)


def test_validation_lists_all_problems():
    entries = {"x": EntryConfig(), "y": EntryConfig(command="pack", outputs=["../up"], needs=["z"])}
    with pytest.raises(UserError, match="5 problems"):
        CurriculumConfig(entries=entries, until="w").validate()


def test_unreadable_state_is_one_message(make):
    config = make()
    Path(config.run_folder).mkdir()
    (Path(config.run_folder) / "curriculum.json").write_text("{")
    with pytest.raises(UserError, match="state cannot be read"):
        run_curriculum(config)


def test_an_interrupted_entry_is_continued_not_started_anew(make, tmp_path):
    """The record of a killed run says `running` with a dead process: the same configuration keeps its outputs."""
    config = make()
    run_curriculum(config)
    path = Path(config.run_folder) / "curriculum.json"
    state = json.loads(path.read_text())
    state["entries"]["c"] |= {"state": "running", "process": [2**22 + 1, 0.0]}
    path.write_text(json.dumps(state))
    assert run_states(config)[2]["state"] == "interrupted"
    assert run_curriculum(config)["ran"] == ["c"]
    assert not (Path(config.run_folder) / "superseded").exists()


def test_a_conversion_that_was_cut_off_behind_its_end_is_done(tmp_path):
    """It publishes a whole folder at once, and refuses one that is there: what would refuse it for ever is told and taken."""
    target = tmp_path / "run" / "fresh"
    entry = EntryConfig(command="convert", overrides=["action=nothing", f"target={target}"], outputs=["fresh"])
    config = CurriculumConfig(name="test", run_folder=str(tmp_path / "run"), entries={"fresh": entry})
    assert run_curriculum(config)["entries"][0]["state"] == "failed"
    path = tmp_path / "run" / "curriculum.json"
    state = json.loads(path.read_text())
    state["entries"]["fresh"] |= {"state": "running", "process": [2**22 + 1, 0.0]}
    path.write_text(json.dumps(state))
    assert run_curriculum(config)["entries"][0]["state"] == "failed"  # nothing was published: it ran again
    target.mkdir()
    (target / "manifest.json").write_text("{}")
    for cut_off in ({}, {"state": "failed", "exit_code": 137, "process": []}):
        state["entries"]["fresh"] |= cut_off
        path.write_text(json.dumps(state))
        assert run_curriculum(config)["entries"][0]["state"] == "done"
    state["entries"]["fresh"] |= {"exit_code": 2}  # of its own accord
    path.write_text(json.dumps(state))
    assert run_curriculum(config)["entries"][0]["state"] == "failed"


SLEEPER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


@pytest.fixture
def sleeping(tmp_path):
    """A curriculum in a process of its own, whose only entry sleeps until SIGUSR1 and then exits with 3."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    started, run = tmp_path / "run" / "started", tmp_path / "run"
    run.mkdir()
    entry = {"module": "sleeper", "overrides": [str(started)], "outputs": ["started"]}
    script = (
        "import sys; from launch.curriculum.running import *; from launch.curriculum.entries import *; "
        f"c = CurriculumConfig(run_folder={str(run)!r}, entries={{'sleep': EntryConfig(**{entry!r})}});"
        "sys.exit(run_curriculum(c).get('exit_code', 0))"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: started.exists() and (run / "curriculum.json").exists())  # which records the process
    yield process, run
    if process.poll() is None:
        process.kill()
    process.wait()


def wait_for(condition) -> None:
    while not condition():
        time.sleep(0.02)


def test_signals_reach_the_entry_and_exit_code_3_comes_back(sleeping):
    process, run = sleeping
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 3
    assert json.loads((run / "curriculum.json").read_text())["entries"]["sleep"]["state"] == "stopped"


def test_cancel_ends_the_running_entry_and_logs_show_its_end(sleeping):
    process, run = sleeping
    entry = EntryConfig(module="sleeper", outputs=["started"])
    config = CurriculumConfig(run_folder=str(run), entries={"sleep": entry}, action="cancel")
    config.cluster.kind = "local"
    command.run(config)
    assert process.wait() == 143
    config.action = "logs"
    assert "sleep.log" in command.render(command.run(config))


@pytest.mark.parametrize("action", ["status", "logs", "cancel", "resume"])
def test_a_curriculum_that_never_ran_is_refused_with_those_that_did(action, make, tmp_path):
    config = make()
    run_curriculum(config)
    (tmp_path / "empty").mkdir()
    for name in ("misspelt", "empty"):
        unknown = CurriculumConfig(run_folder=str(tmp_path / name), entries=config.entries, action=action)
        with pytest.raises(UserError, match="there is no curriculum to") as refused:
            command.run(unknown)
        assert f"run_folder={config.run_folder}" in refused.value.expected


def test_kill_9_of_the_curriculum_ends_its_entry_and_frees_the_lock(sleeping):
    process, run = sleeping
    with pytest.raises(UserError, match="another curriculum is running"), locked(run):
        pass
    child = int(json.loads((run / "curriculum.json").read_text())["entries"]["sleep"]["process"][0])
    process.kill()
    process.wait()
    wait_for(lambda: not is_running(child))
    with locked(run):
        pass


def is_running(pid: int) -> bool:
    """False for a zombie too: nobody may be there to collect it."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


GRANDCHILD = """
import pathlib, sys, time
block = bytearray(120 * 2**20)
for _ in range(3000):
    if pathlib.Path(sys.argv[1]).exists():
        break
    time.sleep(0.02)
"""


def test_peak_memory_counts_the_whole_tree(tmp_path, monkeypatch):
    seen, measured = tmp_path / "seen", subprocesses.tree_memory_bytes

    def measured_until_seen(root):
        found = measured(root)
        if found > 120 * 2**20:
            seen.touch()  # the grandchild may go
        return found

    monkeypatch.setattr(subprocesses, "tree_memory_bytes", measured_until_seen)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GRANDCHILD!r}, {str(seen)!r}])"
    outcome = run_supervised([sys.executable, "-c", child], tmp_path / "log", sample_seconds=0.1)
    assert outcome.exit_code == 0
    assert outcome.peak_memory_bytes > 120 * 2**20


def test_a_child_killed_by_a_signal_gives_a_shells_exit_code(tmp_path):
    code = "import os; os.kill(os.getpid(), 9)"
    assert run_supervised([sys.executable, "-c", code], tmp_path / "log").exit_code == 137


def test_an_entry_with_each_is_several_calls_in_one_process(tmp_path, capsys):
    each = {name: [f"run_folder={tmp_path / name}"] for name in ("one", "two")}
    for name in each:
        (tmp_path / name).mkdir()
    entry = EntryConfig(command="report", each=each, outputs=["one/report.json", "two/report.json"])
    line = command_line(entry)
    assert line[2:] == ["launch.command_line.calls", "report", "--call", *each["one"], "--call", *each["two"]]
    config = CurriculumConfig(run_folder=str(tmp_path), entries={"reports": entry})
    assert run_curriculum(config)["ran"] == ["reports"]
    assert run_curriculum(config)["ran"] == []
    assert split_calls(["a=1", "--call", "b=2", "--call", "c=3"]) == [["a=1", "b=2"], ["a=1", "c=3"]]
    assert split_calls(["a=1"]) == [["a=1"]]


def test_measure_counts_files_and_bytes(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "one").write_bytes(b"123")
    (tmp_path / "x" / "two").write_bytes(b"4")
    assert measure(tmp_path / "x") == (2, 4)
    assert measure(tmp_path / "nothing") == (0, 0)


TALKER = "for number in range(20_000): print('a line of a talkative entry', number, flush=True)"


def test_a_full_disk_never_blocks_an_entry_on_its_pipe(tmp_path, capfd):
    with small_disk(tmp_path / "small", 64) as folder:
        outcome = run_supervised([sys.executable, "-c", TALKER], folder / "log", prefix="entry | ")
        assert outcome.exit_code == 0
    told = capfd.readouterr().err
    assert told.count("log can no longer be written") == 1
    assert "entry | a line of a talkative entry 19999" in told


def test_a_closed_stderr_never_blocks_an_entry_on_its_pipe(tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)  # as of a terminal that is gone: every write fails
    with open(write_end, "wb", buffering=0) as nobody:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(nobody, write_through=True))
        outcome = run_supervised([sys.executable, "-c", TALKER], tmp_path / "log")
    assert outcome.exit_code == 0
    assert (tmp_path / "log").read_text().count("\n") == 20_000


def test_a_zombie_is_not_running(make):
    """Under a first process that does not reap, an entry that was killed stays in the table for ever."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(process.pid).create_time()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not alive([process.pid, created])
    process.wait()
    assert alive([os.getpid(), psutil.Process().create_time()])


MEETING = """
import pathlib, sys, time
folder, name, other = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(folder / name).write_text("here")
deadline = time.time() + 60
while not (folder / other).exists():  # ends well only when the other one runs too, or has run
    assert time.time() < deadline
    time.sleep(0.02)
"""


@pytest.fixture
def meeting(tmp_path, monkeypatch):
    """Two entries that end only side by side, a third that needs both, and a stage of two ranks after that."""
    (tmp_path / "meeting_module.py").write_text(MEETING)
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def build(needs, **options):
        entries = {}
        for name, other in (("a", "b"), ("b", "a"), ("c", "a")):
            overrides = [str(tmp_path / "run"), name, other]
            entries[name] = EntryConfig(module="meeting_module", overrides=overrides, needs=needs[name], outputs=[name])
        config = CurriculumConfig(run_folder=str(tmp_path / "run"), entries=entries, **options)
        config.validate()
        return config

    return build


def test_entries_that_do_not_need_one_another_run_side_by_side(meeting):
    config = meeting({"a": [], "b": [], "c": ["a", "b"]}, local_processes=2)
    started = time.perf_counter()
    assert run_curriculum(config)["ran"] == ["a", "b", "c"]
    passed = time.perf_counter() - started
    state = json.loads((Path(config.run_folder) / "curriculum.json").read_text())
    seconds = {name: entry["wall_seconds"] for name, entry in state["entries"].items()}
    # What passes while both run is counted once.
    assert 0 < state["wall_seconds"] <= passed
    assert state["wall_seconds"] < sum(seconds.values())
    both = sum(state["entries"][name]["peak_memory_bytes"] for name in "ab")
    assert max(state["entries"][name]["peak_memory_bytes"] for name in "abc") < state["peak_memory_bytes"] <= both
    assert run_curriculum(config)["ran"] == []


def test_nothing_starts_behind_a_failure_and_what_runs_comes_to_its_end(meeting, tmp_path):
    config = meeting({"a": [], "b": [], "c": []}, local_processes=2)
    config.entries["a"] = EntryConfig(command="report", overrides=["run_folder=no/such"], outputs=["no"])

    def let_b_end() -> None:
        wait_for(lambda: (tmp_path / "run" / "curriculum.json").exists() and run_states(config)[0]["state"] == "failed")
        (tmp_path / "run" / "a").write_text("")

    watcher = threading.Thread(target=let_b_end, daemon=True)
    watcher.start()
    answer = run_curriculum(config)
    watcher.join()
    assert (answer["stopped_at"], answer["exit_code"], answer["ran"]) == ("a", 2, ["a", "b"])
    assert [one["state"] for one in run_states(config)] == ["failed", "done", "pending"]


def test_an_entry_waits_for_room_for_all_of_its_ranks(meeting, monkeypatch):
    """And none overtakes it."""
    run = LocalRun(Curriculum(meeting({"a": [], "b": [], "c": []}, local_processes=3)))
    monkeypatch.setattr(run, "num_processes", {"a": 2, "b": 2, "c": 1}.__getitem__)
    started = []
    monkeypatch.setattr(run, "start", lambda name: (started.append(name), run.running.update({name: None})))
    run.start_ready()
    assert started == ["a"]
    run.running.clear()
    run.start_ready()
    assert started == ["a", "b", "c"]
    sft = EntryConfig(command="train", overrides=["stage=toy_sft"], outputs=["sft"])
    alone = LocalRun(Curriculum(CurriculumConfig(entries={"sft": sft, "other": EntryConfig(module="m")})))
    assert [alone.num_processes(name) for name in ("sft", "other")] == [2, 1]
