"""Held-out loss against brute force; a real run of one process: what it shows, writes and sums up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_stage import make_config, write_packed

from data_pipeline.loading.batch import MicroBatch
from training.callbacks.progress import ProgressLine, format_seconds
from training.contracts.results import StepResult
from training.metrics import StepRecord
from training.objectives.held_out import CLASS_NAMES, PackedRows, loss_of, rows_at_once
from training.objectives.token_options import NextTokenOptions
from training.reliability.signals import COMMAND_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
ROW, NUM_ROWS, SOURCES = 16, 7, ["a", "b", "c"]


def row(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "labels": rng.integers(0, 50, ROW),
        "loss_weights": rng.choice([0.0, 0.5, 1.0], ROW).astype(np.float32),
        "loss_classes": rng.integers(0, 3, ROW).astype(np.uint8),
        "sources": rng.integers(0, 2, ROW).astype(np.uint16),  # nothing is of the third source
    }


class Rows:
    num_rows, micro_batch_size, source_names = NUM_ROWS, 2, SOURCES

    def batch(self, first_row: int) -> MicroBatch:
        rows = [row(first_row + number) for number in range(self.micro_batch_size)]
        arrays = {name: np.stack([one[name] for one in rows]) for name in rows[0]}
        plain = np.zeros((len(rows), ROW), np.int64)
        return MicroBatch(tokens=plain, position_ids=plain, cu_seqlens=np.array([0, 2 * ROW], np.int32), **arrays)


class Policy:
    """The loss of a label is the label."""

    def log_probs(self, batches: Any, objective: Any) -> list[torch.Tensor]:
        return [-torch.from_numpy(batch.labels.reshape(-1)).float() for batch in batches]


class OneOf:
    """One of `size` data-parallel replicas of two ranks each; sums are left to the test."""

    def __init__(self, rank: int, size: int):
        self.data_parallel_rank, self.data_parallel_size = rank, size
        self.world_size = 2 * size
        self.seen: np.ndarray | None = None

    def sum(self, values: np.ndarray) -> np.ndarray:
        self.seen = values
        return values


def by_hand() -> tuple[dict[str, float], dict[str, float]]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for number in range(NUM_ROWS):
        one = row(number)
        for position in range(ROW):
            weight = float(one["loss_weights"][position])
            if weight > 0:
                loss = float(one["labels"][position])
                names = CLASS_NAMES[one["loss_classes"][position]], SOURCES[one["sources"][position]]
                for name, amount in (("all", weight), (names[0], 1.0), (names[1], 1.0)):
                    sums[name][0] += amount * loss
                    sums[name][1] += amount
    means = {name: total / weight for name, (total, weight) in sums.items()}
    return {name: means[name] for name in ("all", *CLASS_NAMES)}, {name: means[name] for name in ("a", "b")}


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_row_counts_once_whatever_the_replicas(size):
    total = np.zeros(())
    for rank in range(size):  # both ranks of a replica say the same
        one = OneOf(rank, size)
        loss_of(Policy(), None, one, Rows())  # type: ignore[arg-type]
        total = total + 2 * one.seen
    everyone = OneOf(0, size)
    everyone.sum = lambda values: total  # type: ignore[method-assign]
    found, expected = loss_of(Policy(), None, everyone, Rows()), by_hand()  # type: ignore[arg-type]
    assert found[0] == pytest.approx(expected[0])
    assert found[1] == pytest.approx(expected[1])


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


def test_the_rows_are_the_same_for_every_stage_and_batch(packed):
    def rows_of(stage: str, micro_batch_size: int, seed: int, num_replicas: int) -> np.ndarray:
        config = make_config(packed, packed)
        config.seed, config.stage.name, config.stage.micro_batch_size = seed, stage, micro_batch_size
        config.validation.num_rows = 12
        rows = PackedRows(config, str(packed), NextTokenOptions(), num_replicas)
        found = [rows.batch(first).tokens for first in range(0, rows.num_rows, rows.micro_batch_size)]
        rows.close()
        assert rows.micro_batch_size == max(micro_batch_size, -(-12 // num_replicas))
        return np.concatenate(found)[:12]

    expected = rows_of("one", 1, 1, num_replicas=1)
    assert len(expected) == 12
    assert len(np.unique(expected, axis=0)) == 12
    assert np.array_equal(rows_of("two", 4, 2, num_replicas=6), expected)
    assert np.array_equal(rows_of("two", 1, 2, num_replicas=5), expected)
    assert [rows_at_once(n, 576, 2, replicas) for n, replicas in ((24, 1), (32, 1), (32, 4), (24, 12), (3, 1))] == [
        6,
        7,
        4,
        2,
        3,
    ]
    assert rows_at_once(24, 32_768, 1, 1) == 1


def overrides(packed: Path, run: Path) -> list[str]:
    """The tiny stage of `tiny_stage`, in one process."""
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "head_dim": 16}
    model |= {"num_query_groups": 2, "vocabulary.text_size": 64, "vocabulary.visual_size": 64}
    stage = {"name": "tiny", "steps": 6, "sequence_length": 64, "global_batch_size": 4, "optimizer.warmup_steps": 0}
    stage |= {"validation.held_out": packed, "data.datasets.mine.path": packed, "data.datasets.text.weight": 0}
    stage |= {"data.datasets.interleaved.weight": 0}
    found = [f"model.{key}={value}" for key, value in model.items()]
    found += [f"stage.{key}={value}" for key, value in stage.items()]
    # The same rows serve for both: without preflight that is taken.
    found += ["preflight=false", "parallel.tensor=1", "model.vocabulary.reserved_size=32"]
    return [*found, f"run_folder={run}"]


def test_a_run_shows_what_it_does_and_writes_every_figure(packed, tmp_path):
    arguments = [*overrides(packed, tmp_path), "validation.every_steps=4", "logging.tensorboard=true"]
    command = [sys.executable, "-m", "launch.command_line.cli", "train", "stage=toy_pretrain_1", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stderr.splitlines()
    first_step = next(number for number, text in enumerate(shown) if "step 1/6" in text)
    assert first_step <= 12, done.stderr
    assert all(text.startswith(("tiny: ", "  ")) for text in shown), done.stderr
    banner = "\n".join(shown[:first_step])
    for part in ("mine 100%", "fresh weights", "CPU", "1 rank (", "metrics.jsonl", "offline-run"):
        assert part in banner
    assert any("held-out loss  held_out all " in text for text in shown)
    assert shown[-1].startswith("tiny: done, step 6")
    folder = tmp_path / "tiny"
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes", "data_seconds"}
    assert all(line.keys() >= figures | {"tflops_per_second", "mfu"} for line in lines)
    assert all(0 < line["mfu"] < 1.5 and line["tflops_per_second"] > 0 for line in lines)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [4, 6]
    assert lines[-1]["held_out_loss"]["held_out"].keys() == {"all", "text"}
    assert lines[-1]["held_out_seconds"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["held_out_loss"] == lines[-1]["held_out_loss"]
    assert summary["held_out_loss_by_source"]["held_out"].keys() == {"text"}
    events = [path for path in (folder / "tensorboard").iterdir() if path.name.startswith("events.")]
    assert b"held_out_loss/held_out/all" in events[0].read_bytes()


def test_a_stopped_run_says_how_to_go_on(monkeypatch, capsys, packed):
    monkeypatch.setenv(COMMAND_VARIABLE, "nextstate train stage=sft 'a=b c'")

    class View:
        config, state = make_config(packed, packed), type("State", (), {"step": 3, "wall_seconds": 1.0})

    ProgressLine().on_end(View(), "stopped")  # type: ignore[arg-type]
    assert "stopped at step 3, saved. Go on with:\n  nextstate train stage=sft 'a=b c'" in capsys.readouterr().err
    assert format_seconds(3725) == "1:02:05"


def test_a_terminals_line_is_rewritten_and_kept_now_and_then(monkeypatch, capsys, packed):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    class View:
        config, state = make_config(packed, packed), None

    progress = ProgressLine()
    for step in (1, 2, 3, 12):
        progress.on_step(View(), StepRecord(step, StepResult(1.0, 2.0, 256), 1e-3, 4 * step, 0.5))  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert [text.count("\r") for text in shown.split("\n")] == [0, 2, 0]
    assert "grad 2.00  512 tokens/s" in shown
    assert shown.endswith("0:00:00 left\n")
