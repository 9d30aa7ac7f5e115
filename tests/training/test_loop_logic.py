"""The loop around a fake engine: resume, bad steps, refusals, full disks, what is written down."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fake_objective
import pytest
import torch
from fake_objective import FakeEngine, fake_config
from PIL import Image
from small_disk import small_disk

from model.checkpoint.reader import CheckpointReader, latest_checkpoint, list_checkpoints
from model.errors import UserError
from training import stage
from training.callbacks.metrics_file import MetricsFile
from training.metrics import MACHINE_KEYS, PICTURES_NAME, first_and_last_loss
from training.reliability.events import EventLog
from training.reliability.json_lines import read_json_lines
from training.schedule import learning_rate
from training.stage import StoppedEarly, run_stage


@pytest.fixture(autouse=True)
def made():
    """The engines that runs of this test have made."""
    fake_objective.made.clear()
    return fake_objective.made


def final_tensors(config) -> dict[str, torch.Tensor]:
    with CheckpointReader(latest_checkpoint(config.stage_folder)) as reader:
        return {key: reader.read_full(key) for key in reader.keys()}  # noqa: SIM118


def assert_same_weights(one, other) -> None:
    left, right = final_tensors(one), final_tensors(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def metric_lines(config) -> list[dict]:
    return read_json_lines(config.stage_folder / "metrics.jsonl")


def events(config, *names) -> list[dict]:
    found = read_json_lines(config.stage_folder / "events.jsonl")
    return [event for event in found if not names or event["event"] in names]


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a real signal in the forward pass of `step`, once."""
    original = FakeEngine.forward_backward
    calls = []

    def forward_backward(engine, batches, objective):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(engine, batches, objective)

    monkeypatch.setattr(FakeEngine, "forward_backward", forward_backward)


def interrupt_at(monkeypatch, config, step) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(StoppedEarly) as stopped:
            run_stage(config)
    assert stopped.value.code == 3


def test_summary_and_files(tmp_path):
    config = fake_config(tmp_path)
    summary = run_stage(config)
    lines = metric_lines(config)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["consumed_samples"] == 80
    assert summary["loss_first"] == lines[0]["loss"]
    assert summary["loss_last"] == pytest.approx(sum(line["loss"] for line in lines[-10:]) / 10)
    assert summary["loss_last"] < summary["loss_first"]
    assert (summary["steps"], summary["tokens"]) == (20, 20 * 4 * 8)
    assert summary["peak_memory_bytes"] > 1 << 20
    assert Path(summary["checkpoint"]) == latest_checkpoint(config.stage_folder)
    assert json.loads((config.stage_folder / "summary.json").read_text()) == summary
    assert "versions" in (config.stage_folder / "config.yaml").read_text()
    assert [event["event"] for event in events(config)] == ["start"] + ["checkpoint"] * 4 + ["finished"]
    rates = [line["learning_rate"] for line in lines]
    assert rates == [learning_rate(config.stage.optimizer, step, 20) for step in range(1, 21)]


def test_a_finished_stage_is_left_alone(tmp_path, made):
    config = fake_config(tmp_path)
    summary = run_stage(config)
    config.parallel.sequence = False  # the layout and the logging do not count
    config.logging.every_steps = 3
    assert run_stage(config) == summary
    assert len(made) == 1


@pytest.mark.parametrize("step", [1, 3, 5, 7, 19, 20])
def test_signal_then_resume_is_bitwise(tmp_path, monkeypatch, step):
    unbroken, broken = fake_config(tmp_path / "one"), fake_config(tmp_path / "two")
    run_stage(unbroken)
    if step < 20:
        interrupt_at(monkeypatch, broken, step)
        assert latest_checkpoint(broken.stage_folder).name == f"step_{step:08d}"
    run_stage(broken)
    assert_same_weights(unbroken, broken)
    strip = lambda lines: [line | dict.fromkeys(MACHINE_KEYS) for line in lines]  # noqa: E731
    assert strip(metric_lines(broken)) == strip(metric_lines(unbroken))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_every_stop_signal(tmp_path, monkeypatch, number):
    config = fake_config(tmp_path)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who started the tests may have it ignored
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        with pytest.raises(StoppedEarly):
            run_stage(config)
    assert events(config, "stopped")[0]["signal"] == signal.Signals(number).name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signal.signal(signal.SIGHUP, hang_up)


def test_nohup_is_respected(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 2, signal.SIGHUP)
        assert run_stage(config)["steps"] == 20
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_stops_nothing(tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    nobody = open(write_end, "wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(nobody, write_through=True))
    assert run_stage(fake_config(tmp_path, bad_samples=[28]))["skipped_steps"] == 1


def test_heartbeats_that_cannot_be_written_fail_nothing(tmp_path, capsys):
    config = fake_config(tmp_path)
    config.stage_folder.mkdir(parents=True)
    (config.stage_folder / "heartbeats").write_text("a file is in the way, as a folder without permission would be")
    assert run_stage(config)["peak_memory_bytes"] > 1 << 20
    assert capsys.readouterr().err.count("the heartbeat of rank 0 cannot be written") == 1


def test_signal_while_waiting_for_data(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    original = fake_objective.FakeData.batch

    def batch(data, first_sample):
        if first_sample == 12:
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Event().wait()  # never answers
        return original(data, first_sample)

    with monkeypatch.context() as patch:
        patch.setattr(fake_objective.FakeData, "batch", batch)
        with pytest.raises(StoppedEarly):
            run_stage(config)
    assert latest_checkpoint(config.stage_folder).name == "step_00000003"
    run_stage(config)


def test_signal_while_building_saves_the_beginning(tmp_path, monkeypatch, made):
    config, original = fake_config(tmp_path), FakeEngine.of.__func__

    def of(cls, config, objective):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(cls, config, objective)

    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "of", classmethod(of))
        with pytest.raises(StoppedEarly):
            run_stage(config)
    assert latest_checkpoint(config.stage_folder).name == "step_00000000"
    run_stage(config)


def test_a_batch_without_labels_moves_nothing(tmp_path, made):
    """It is skipped, counted and told, and however many there are, the run neither goes back nor ends."""
    config = fake_config(tmp_path, empty_samples=[8, 12, 16, 20, 24, 28])
    summary = run_stage(config)
    assert summary["skipped_steps"] == 6
    assert int(made[0].num_updates) == 14
    assert "no label" in events(config, "skip")[0]["reason"]
    assert not events(config, "roll_back")
    assert [line["step"] for line in metric_lines(config) if "skipped" in line] == [3, 4, 5, 6, 7, 8]


def test_errors_of_the_data_reach_the_caller(tmp_path, monkeypatch):
    def batch(data, first_sample):
        raise UserError("broken row")

    monkeypatch.setattr(fake_objective.FakeData, "batch", batch)
    with pytest.raises(UserError, match="broken row"):
        run_stage(fake_config(tmp_path))


# --- bad steps ------------------------------------------------------------------------------------------------------


def test_a_bad_step_is_not_applied(tmp_path, made):
    config = fake_config(tmp_path, bad_samples=[28])
    summary = run_stage(config)
    engine = made[0]
    assert int(engine.num_updates) == 19
    assert engine.num_discarded == 1
    assert torch.isfinite(engine.weight).all()
    assert [event["step"] for event in events(config, "skip")] == [8]
    assert "nan" in events(config, "skip")[0]["reason"]
    assert metric_lines(config)[7]["loss"] is None
    assert "skipped" in metric_lines(config)[7]
    assert summary["skipped_steps"] == 1


def test_spikes_are_skipped(tmp_path, made):
    config = fake_config(tmp_path, spiking_samples=[72])
    config.reliability.spike_factor = 1000.0
    run_stage(config)
    assert [event["step"] for event in events(config, "skip")] == [19]


def test_roll_back_leaves_out_the_data_since_the_checkpoint(tmp_path, made):
    bad = [28, 32, 36, 40]  # steps 8 to 11; the checkpoint before them is that of step 5 (samples < 20)
    config = fake_config(tmp_path, bad_samples=bad)
    config.checkpoint.every_steps = 7
    summary = run_stage(config)
    rollback = events(config, "roll_back")[0]
    assert (rollback["failed_step"], rollback["checkpoint"]) == (11, "step_00000007")
    assert rollback["window"] == [28, 44]
    assert summary["skipped_windows"] == [[28, 44]]
    requested = made[0].objective.data.requested
    assert requested == list(range(0, 44, 4)) + list(range(44, 44 + 13 * 4, 4))
    assert [line["step"] for line in metric_lines(config)] == list(range(1, 21))
    assert all(line["loss"] is not None for line in metric_lines(config))
    assert int(made[0].num_updates) == 20


def test_rollbacks_are_bounded(tmp_path, made):
    config = fake_config(tmp_path, bad_samples=list(range(28, 400, 4)))
    with pytest.raises(UserError, match="does not recover"):
        run_stage(config)
    assert len(events(config, "roll_back")) == config.reliability.max_rollbacks
    assert len(events(config, "stop")) == 1
    assert torch.isfinite(made[0].weight).all()


def test_no_checkpoint_to_go_back_to(tmp_path):
    config = fake_config(tmp_path, bad_samples=[0, 4, 8, 12])
    with pytest.raises(UserError, match="no checkpoint"):
        run_stage(config)


@pytest.mark.parametrize("step", [8, 10, 13, 16])
def test_resume_around_a_roll_back_is_bitwise(tmp_path, monkeypatch, step):
    options = {"bad_samples": [32, 36, 40, 44]}
    unbroken, broken = (fake_config(tmp_path / "one", **options), fake_config(tmp_path / "two", **options))
    run_stage(unbroken)
    assert len(events(unbroken, "roll_back")) == 1
    interrupt_at(monkeypatch, broken, step)
    run_stage(broken)
    assert_same_weights(unbroken, broken)


def all_finite(folder: Path) -> bool:
    with CheckpointReader(folder) as reader:
        return all(bool(torch.isfinite(reader.read_full(key).float()).all()) for key in reader.keys())  # noqa: SIM118


@pytest.mark.parametrize("sample", [36, 40, 76])  # the update of step 10 (saved at once), 11 and 20 (the last)
def test_weights_that_are_not_finite_are_never_published(tmp_path, capsys, sample):
    config = fake_config(tmp_path, poisoning_samples=[sample])
    summary = run_stage(config)
    assert summary["steps"] == 20
    assert len(events(config, "roll_back")) == 1
    assert "weights are not finite (model/weight" in events(config, "roll_back")[0]["reason"]
    assert "weights are not finite (model/weight" in capsys.readouterr().err
    found = list_checkpoints(config.stage_folder)
    assert len(found) == 2
    assert all(all_finite(folder) for folder in found)
    assert [line["step"] for line in metric_lines(config)] == list(range(1, 21))
    if sample != 40:  # no save fell into the three steps that were skipped
        aside = list((config.stage_folder / "checkpoints").glob("non_finite_*"))
        assert [folder.name for folder in aside] == [f"non_finite_step_{sample // 4 + 1:08d}"]
        assert not all_finite(aside[0])


def test_weights_that_stay_not_finite_end_the_run_with_the_reason(tmp_path):
    config = fake_config(tmp_path, poisoning_samples=list(range(36, 400, 4)))
    with pytest.raises(UserError, match="weights are not finite"):
        run_stage(config)
    assert len(events(config, "roll_back")) == config.reliability.max_rollbacks
    assert all(all_finite(folder) for folder in list_checkpoints(config.stage_folder))


def test_a_stop_with_weights_that_are_not_finite_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = fake_config(tmp_path, poisoning_samples=[28])
    interrupt_at(monkeypatch, config, 9)
    assert latest_checkpoint(config.stage_folder).name == "step_00000005"
    assert all_finite(latest_checkpoint(config.stage_folder))


def test_skipped_steps_push_no_good_checkpoint_out(tmp_path, monkeypatch):
    """A checkpoint at every step, two kept, three skipped: the two of before the first skip are still there."""
    config = fake_config(tmp_path, bad_samples=[28, 32, 36])
    config.checkpoint.every_steps = 1
    original, seen = FakeEngine.forward_backward, {}

    def forward_backward(engine, batches, objective):
        seen[objective.data.requested[-1]] = {path.name for path in list_checkpoints(config.stage_folder)}
        return original(engine, batches, objective)

    monkeypatch.setattr(FakeEngine, "forward_backward", forward_backward)
    run_stage(config)
    assert len(events(config, "skip")) == 3
    assert seen[40] >= {"step_00000006", "step_00000007"}
    assert seen[44] == {"step_00000011", "step_00000010"}  # after a good step two are kept again


# --- refusals -------------------------------------------------------------------------------------------------------


def test_another_configuration_is_refused(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    interrupt_at(monkeypatch, config, 6)
    config.seed += 1
    config.model.hidden_size = 256
    with pytest.raises(UserError, match=r"model.hidden_size: 128 -> 256; seed: 1234 -> 1235"):
        run_stage(config)


def test_changed_data_are_refused_unless_allowed(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    interrupt_at(monkeypatch, config, 6)
    config.stage.objective["changed_data"] = True
    with pytest.raises(UserError, match="allow_data_change=true"):
        run_stage(config)
    config.checkpoint.allow_data_change = True
    run_stage(config)
    assert events(config, "data_changed")


def test_more_steps_continue_and_fewer_are_refused(tmp_path):
    config = fake_config(tmp_path)
    run_stage(config)
    config.stage.steps = 25
    assert run_stage(config)["steps"] == 25
    assert events(config, "config_changed")[0]["changes"] == ["stage.steps: 20 -> 25"]
    config.stage.steps = 10
    with pytest.raises(UserError, match="already trained to step 25"):
        run_stage(config)
    config.stage.steps, config.stage.optimizer.learning_rate = 25, 0.5
    with pytest.raises(UserError, match="learning_rate"):
        run_stage(config)


def test_damaged_newest_checkpoint(tmp_path, monkeypatch, capsys):
    unbroken, config = fake_config(tmp_path / "one"), fake_config(tmp_path / "two")
    run_stage(unbroken)
    interrupt_at(monkeypatch, config, 8)
    os.truncate(latest_checkpoint(config.stage_folder) / "rank_00000.safetensors", 50)
    run_stage(config)
    assert "step_00000008 is damaged" in capsys.readouterr().err
    assert events(config, "damaged_checkpoint")[0]["checkpoint"] == "step_00000008"
    assert events(config, "resume")[0]["step"] == 5
    assert [line["step"] for line in metric_lines(config)] == list(range(1, 21))
    assert_same_weights(unbroken, config)


def test_initialize_from_takes_weights_only(tmp_path, made):
    first = fake_config(tmp_path)
    run_stage(first)
    second = fake_config(tmp_path)
    second.stage.name, second.stage.steps = "second", 1
    second.stage.initialize_from = str(first.stage_folder)
    run_stage(second)
    engine = made[1]
    assert int(engine.num_updates) == 1
    start = final_tensors(first)["model/weight"]
    expected = start - learning_rate(second.stage.optimizer, 1, 1) * engine.momentum
    assert torch.equal(engine.weight, expected)
    third = fake_config(tmp_path)
    third.stage.name, third.stage.initialize_from = "third", str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="fake, second"):
        run_stage(third)


def test_two_runs_of_one_stage(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    config.stage_folder.mkdir(parents=True)
    with stage.lock_stage(config.stage_folder):
        monkeypatch.setattr(stage, "LOCK_PATIENCE_SECONDS", 0.2)
        with pytest.raises(UserError, match=f"another run(.|\n)*process {os.getpid()} on"):
            run_stage(config)
    run_stage(config)  # the lock file that is left is no obstacle


# --- disks and loggers ----------------------------------------------------------------------------------------------


def test_full_disk_goes_on_until_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "small", 256) as folder:
        config = fake_config(folder)
        original = FakeEngine.random_state
        grown = {"large": torch.zeros(400_000, dtype=torch.uint8)}
        with monkeypatch.context() as patch:
            patch.setattr(
                FakeEngine,
                "random_state",
                lambda engine: original(engine) | (grown if int(engine.num_updates) > 5 else {}),
            )
            with pytest.raises(UserError, match="step 20 cannot be written"):
                run_stage(config)
        assert [event["step"] for event in events(config, "checkpoint_failed")] == [10, 15, 20]
        assert "training goes on" in capsys.readouterr().err
        assert [path.name for path in list_checkpoints(config.stage_folder)] == ["step_00000005"]
        run_stage(config)  # space was made
        assert latest_checkpoint(config.stage_folder).name == "step_00000020"


def test_disk_that_is_full_from_the_start(tmp_path):
    with small_disk(tmp_path / "small", 4) as folder:
        (folder / "filler").write_bytes(b"0" * 2048)
        with pytest.raises(UserError, match="cannot be written"):
            run_stage(fake_config(folder))


def test_metrics_that_cannot_be_written_do_not_stop(tmp_path, monkeypatch, capsys):
    from training.reliability.json_lines import JsonLines

    config, original = fake_config(tmp_path), JsonLines.append

    def append(lines, record):
        if record.get("step") == 3 and "loss" in record:
            raise OSError(28, "No space left on device")
        original(lines, record)

    monkeypatch.setattr(JsonLines, "append", append)
    run_stage(config)
    assert [line["step"] for line in metric_lines(config)] == [1, 2, *range(4, 21)]
    assert events(config, "metrics_failed")[0]["step"] == 3
    assert "metrics can no longer be written" in capsys.readouterr().err


def test_metrics_file_that_was_cut_or_removed(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    interrupt_at(monkeypatch, config, 8)
    path = config.stage_folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:300])
    run_stage(config)
    steps = [line["step"] for line in metric_lines(config)]
    assert steps == sorted(set(steps))
    assert steps[-12:] == list(range(9, 21))


def test_a_damaged_line_of_metrics_blocks_nothing(tmp_path, monkeypatch, capsys):
    config = fake_config(tmp_path)
    interrupt_at(monkeypatch, config, 8)
    path = config.stage_folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[7] = lines[7].replace(b'"step"', b'"st\xffp"')  # the last one, where a resume looks
    lines[2] = lines[2].replace(b'"loss"', b'"lpss"')
    path.write_bytes(b"".join(lines))
    summary = run_stage(config)
    assert (summary["steps"], summary["loss_first"]) == (20, json.loads(lines[0])["loss"])
    assert [line["step"] for line in metric_lines(config)] == [1, 2, 3, 4, 5, 6, 7, *range(9, 21)]
    assert "1 lines of" in capsys.readouterr().err
    assert events(config, "metrics_damaged")[0]["num_lines"] == 1


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80])
def test_any_flipped_byte_of_metrics_is_survived(tmp_path, mask):
    """Every byte of the file: it is cut and read, and no more than two lines are lost (where two became one)."""
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 8)]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    noted = len(content) - len(content.splitlines(keepends=True)[-1])  # the checkpoint is that of step 6
    run = SimpleNamespace(state=SimpleNamespace(step=6))
    path = tmp_path / "metrics.jsonl"
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= mask
        path.write_bytes(flipped)
        callback = MetricsFile(tmp_path, EventLog(tmp_path, 0), 1)
        callback.load_state({"num_bytes": noted})
        callback.on_start(run)
        callback.on_end(run, "stopped")
        first_and_last_loss(tmp_path)
        left = read_json_lines(path)
        assert len(left) >= 4, (place, bytes(flipped))
        assert sum(line in lines[:6] for line in left) >= 4
        assert lines[6] not in left
    path.write_bytes(b"\x00" * 100)
    MetricsFile(tmp_path, EventLog(tmp_path, 0), 1).on_start(run)


def test_wandb_failure_is_told_once(tmp_path, monkeypatch, capsys):
    import wandb

    def init(**options):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", init)
    config = fake_config(tmp_path)
    config.logging.wandb_mode = "offline"
    run_stage(config)
    assert capsys.readouterr().err.count("no network") == 1
    assert "no network" in events(config, "wandb_failed")[0]["error"]


def test_pictures_that_an_objective_keeps_reach_wandb(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    config.logging.wandb_mode = "offline"
    folder, write = config.stage_folder / PICTURES_NAME / "step_000003", MetricsFile.on_step

    def keep(callback, run, record):
        write(callback, run, record)
        if record.step == 3:
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4), "red").save(folder / "best_0_0.png")

    monkeypatch.setattr(MetricsFile, "on_step", keep)
    run_stage(config)
    shown = list((config.stage_folder / "wandb").rglob("*.png"))
    assert [Image.open(path).getpixel((0, 0)) for path in shown] == [(255, 0, 0)]
    assert not events(config, "wandb_failed")


def test_wandb_offline_keeps_its_run_id(tmp_path, monkeypatch):
    config = fake_config(tmp_path)
    config.logging.wandb_mode = "offline"
    interrupt_at(monkeypatch, config, 6)
    run_stage(config)
    folders = sorted(
        (config.stage_folder / "wandb").glob("offline-run-*")
    )  # offline-run-TIME-ID, -1 in the same second
    manifest = json.loads((latest_checkpoint(config.stage_folder) / "manifest.json").read_text())
    assert {folder.name.split("-")[3] for folder in folders} == {manifest["wandb_run_id"]}
    assert not list((config.stage_folder / "wandb").rglob("*.png"))
    assert not events(config, "wandb_failed")
