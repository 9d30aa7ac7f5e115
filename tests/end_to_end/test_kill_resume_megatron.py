"""`nextstate train` with the real engine on two processes: interrupted runs end bitwise as an unbroken one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.pack import PackConfig, pack
from data_pipeline.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.store import TokenFileWriter
from model.vocabulary import Vocabulary
from training.config import DatasetEntry, TrainConfig, save_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys
from launch.commands.train import run
from training.config import load_yaml
print(json.dumps(run(load_yaml(sys.argv[1]))))
"""
STEPS = 12


def make_config(folder: Path, packed: Path) -> TrainConfig:
    """Data parallel 2 with the distributed optimizer; dropout, so that random streams matter."""
    config = TrainConfig(run_folder=str(folder))
    config.stage.name, config.stage.steps, config.stage.sequence_length = "tiny", STEPS, 64
    config.stage.global_batch_size, config.stage.micro_batch_size = 4, 1
    config.stage.data.datasets = {"text": DatasetEntry(path=str(packed))}
    config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size = 2, 32, 64
    config.model.num_attention_heads = config.model.num_query_groups = 2
    config.model.head_dim, config.model.dropout = 16, 0.1
    config.model.vocabulary.text_size, config.model.vocabulary.visual_size = 64, 64
    config.parallel.data = 2
    config.checkpoint.every_steps = 3
    config.logging.wandb_mode = "disabled"
    return config


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    vocabulary = Vocabulary.from_config(make_config(folder, folder).model.vocabulary)
    generator = np.random.default_rng(5)
    manifest = {
        "kind": "tokens", "num_documents": 60, "vocabulary": vocabulary.describe(), "sources": ["text"],
        "text_tokenizer": "text-1", "vision_tokenizer": None, "inputs": [], "quarantined": {},
    }  # fmt: skip
    with TokenFileWriter(folder / "tokens" / "000000") as writer:
        for _ in range(60):
            segments = np.zeros(1, SEGMENT_DTYPE)
            segments["kind"], segments["length"] = Kind.TEXT, 40
            segments["flags"] = Flag.DOCUMENT_START | Flag.SPLITTABLE
            writer.add(generator.integers(0, 64, 40).astype(np.int32), segments)
        writer.finish(manifest)
    pack({"text": folder / "tokens"}, folder / "packed", PackConfig(sequence_length=64))
    return folder / "packed"


def start(config: TrainConfig) -> subprocess.Popen:
    folder = Path(config.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_yaml(config, folder / "train.yaml")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "train.yaml")], env=environment, cwd=folder,
        stdout=subprocess.PIPE, stderr=open(folder / "stderr.txt", "ab"), text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, config: TrainConfig) -> dict:
    answer, _ = process.communicate(timeout=200)
    messages = (Path(config.run_folder) / "stderr.txt").read_text()
    assert process.returncode == 0, messages[-3000:]
    return json.loads(answer)


def wait_for_step(process: subprocess.Popen, config: TrainConfig, step: int) -> None:
    """Until the metrics say that `step` is done."""
    path = config.stage_folder / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None, (Path(config.run_folder) / "stderr.txt").read_text()[-3000:]
        time.sleep(0.005)


def test_killed_and_stopped_run_ends_bitwise_equal(tmp_path, packed):
    unbroken = make_config(tmp_path / "one", packed)
    summary = finish(start(unbroken), unbroken)
    assert (summary["steps"], summary["data"]) == (STEPS, 2)

    broken, draw = make_config(tmp_path / "two", packed), random.Random(3)
    process = start(broken)
    wait_for_step(process, broken, draw.randint(3, 6))
    worker = draw.choice(psutil.Process(process.pid).children())
    worker.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in (tmp_path / "two/stderr.txt").read_text()

    process = start(broken)
    wait_for_step(process, broken, draw.randint(7, 9))
    process.send_signal(signal.SIGTERM)
    answer, _ = process.communicate(timeout=60)
    assert (process.returncode, answer) == (3, "")

    assert finish(start(broken), broken)["loss_last"] == summary["loss_last"]
    for name in ("rank_00000.safetensors", "rank_00001.safetensors"):
        path = f"tiny/checkpoints/step_{STEPS:08d}/{name}"
        left, right = load_file(tmp_path / "one" / path), load_file(tmp_path / "two" / path)
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), key
