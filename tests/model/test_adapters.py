"""Adapters on, merged, and exported to peft: the same logits; what other conversions say of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen3_checkpoints import NUM_IDS, config_of, transformers_model, write_checkpoint

from launch.command_line import cli
from model.backbone.attention_plan import packed_documents
from model.backbone.packed_attention import prepare_attention
from model.backbone.transformer import build_model
from model.checkpoint.reader import CheckpointReader
from model.config import ADAPTED, AdapterConfig, ModelConfig
from model.conversion.hugging_face import model_config
from model.errors import Problems
from model.parallel.sharding import load_weights
from training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("single_process")

BASE = config_of(48, 4, 2, 32)
TOKENS = torch.arange(40) * 7 % NUM_IDS


def adapter_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random A and B of every adapted layer, by logical name."""
    query, key_value = config.num_attention_heads * config.head_dim, config.num_query_groups * config.head_dim
    sizes = {
        "self_attention.linear_qkv": (query + 2 * key_value, config.hidden_size),
        "self_attention.linear_proj": (config.hidden_size, query),
        "mlp.linear_fc1": (2 * config.ffn_hidden_size, config.hidden_size),
        "mlp.linear_fc2": (config.hidden_size, config.ffn_hidden_size),
    }
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(config.num_layers):
        for name, (rows, columns) in sizes.items():
            if name.rpartition(".")[2] in config.adapter.modules:
                place = f"decoder.layers.{layer}.{name}.lora"
                tensors[f"{place}.a"] = 0.1 * torch.randn(config.adapter.rank, columns, generator=random)
                tensors[f"{place}.b"] = 0.1 * torch.randn(rows, config.adapter.rank, generator=random)
    return tensors


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers_model(BASE)


@pytest.fixture(params=[ADAPTED, ("linear_qkv", "linear_fc2")], ids=["all", "some"])
def adapted(request, tmp_path, theirs) -> Path:
    config = dataclasses.replace(BASE, adapter=AdapterConfig(rank=3, alpha=12.0, modules=list(request.param)))
    return write_checkpoint(tmp_path / "adapted", theirs.state_dict(), config, adapter_tensors(config))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Of a checkpoint of ours, in float32, real ids only."""
    with CheckpointReader(folder) as reader:
        config = model_config(reader.manifest["model"], str(folder))
        model = build_model(config).eval()
        load_weights(model, reader)
    attention = prepare_attention(
        packed_documents(np.array([0, len(TOKENS)])),
        torch.arange(len(TOKENS)),
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
    )
    return model(TOKENS[None], None, None, packed_seq_params=attention)[0, :, :NUM_IDS]


def test_merged_and_in_peft_they_say_the_same(adapted: Path, tmp_path: Path, theirs: Any, capsys: Any) -> None:
    from peft import PeftModel

    expected = logits(adapted)
    with torch.no_grad():
        assert (expected - theirs(TOKENS[None]).logits[0]).abs().max() > 0.1, "the adapters do something"
    assert cli.main(["convert", "merge", f"source={adapted}", f"target={tmp_path / 'merged'}"]) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    assert cli.main(["convert", "to_peft", f"source={adapted}", f"target={tmp_path / 'peft'}"]) == 0
    peft = PeftModel.from_pretrained(transformers_model(BASE), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(TOKENS[None]).logits[0], expected, rtol=0, atol=1e-5)
    call = ["convert", "to_hf", f"source={tmp_path / 'merged'}", f"target={tmp_path / 'hf'}", "layout=qwen3"]
    assert cli.main([*call, "verify=keys", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parity"]["passed"]


def test_other_conversions_ask_for_a_merge(adapted: Path, tmp_path: Path, theirs: Any, capsys: Any) -> None:
    assert cli.main(["convert", "to_hf", f"source={adapted}", f"target={tmp_path / 'x'}", "layout=qwen3"]) == 2
    assert "nextstate convert merge" in capsys.readouterr().err
    assert (
        cli.main(["convert", "reshard", f"source={adapted}", f"target={tmp_path / 'two'}", "tensor=2", "verify=none"])
        == 0
    )
    assert torch.equal(logits(tmp_path / "two"), logits(adapted))
    plain = write_checkpoint(tmp_path / "plain", theirs.state_dict(), BASE)
    for action in ("merge", "to_peft"):
        assert cli.main(["convert", action, f"source={plain}", f"target={tmp_path / 'x'}"]) == 2
        assert "has no adapters" in capsys.readouterr().err


def test_merged_rows_do_not_depend_on_how_they_are_read(adapted: Path) -> None:
    from model.conversion.actions import config_of as config_in
    from model.conversion.low_rank import MergedSource
    from model.conversion.sources import CheckpointSource

    source = CheckpointSource(adapted)
    merged = MergedSource(source, config_in(source))
    name = "model/decoder.layers.1.self_attention.linear_qkv.weight"
    info = merged.tensors[name]
    whole = np.empty((info.num_rows, info.row_bytes), np.uint8)
    merged.read_rows(name, 0, info.num_rows, whole)
    with CheckpointReader(adapted) as reader:
        stem = name.removesuffix(".weight")
        w, a, b = (reader.read_full(key) for key in (name, f"{stem}.lora.a", f"{stem}.lora.b"))
    expected = w.double() + 12.0 / 3 * b.double() @ a.double()
    np.testing.assert_allclose(whole.view(np.float32), expected.numpy(), rtol=0, atol=1e-6)
    part = np.empty((5, info.row_bytes), np.uint8)
    merged.read_rows(name, 7, 12, part)
    np.testing.assert_allclose(part.view(np.float32), whole[7:12].view(np.float32), rtol=0, atol=1e-6)
    source.close()


def test_options_of_adapters_are_checked() -> None:
    problems = Problems()
    AdapterConfig(rank=-1, alpha=0, modules=["linear_q"]).validate(problems, "model.adapter")
    AdapterConfig(rank=1, modules=[]).validate(problems, "model.adapter")
    assert [text.split(":")[0] for text in problems.found] == [
        "model.adapter.rank",
        "model.adapter.alpha",
        "model.adapter.modules",
        "model.adapter.modules",
    ]


def test_a_run_from_before_there_were_adapters_keeps_its_fingerprint() -> None:
    from training.config import results_of

    old = TrainConfig().to_dict()
    assert "adapter" not in results_of(old)["model"]
    del old["model"]["adapter"]
    assert results_of(old) == results_of(TrainConfig().to_dict())
    with_adapter = TrainConfig(model=ModelConfig(adapter=AdapterConfig(rank=2)))
    assert results_of(with_adapter.to_dict())["model"]["adapter"]["rank"] == 2
