"""The parity certificate: passes for equal models, fails for any difference, and says what it could not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen3_checkpoints import config_of, transformers_model, write_checkpoint
from safetensors.torch import load_file, save_file

from model.conversion import hugging_face, parity
from model.conversion.parity import certify
from model.errors import Problems, UserError

CONFIG = config_of(48, 4, 2, 32)


def write_pair(folder: Path, model_type: str = "qwen3", **changes: Any) -> tuple[Path, Path]:
    model = transformers_model(CONFIG)
    ours = write_checkpoint(folder / "ours", model.state_dict(), CONFIG)
    theirs = folder / "theirs"
    model.save_pretrained(theirs, max_shard_size="40KB")
    values = json.loads((theirs / "config.json").read_text())
    values |= {"model_type": model_type} | changes
    (theirs / "config.json").write_text(json.dumps(values))
    return ours, theirs


def change_tensor(theirs: Path, name: str, change: Any) -> None:
    for path in theirs.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("model_type", "layout"), [("qwen3", "qwen3"), ("Emu3", "emu35")])
def test_equal_models_get_a_certificate(model_type: str, layout: str, tmp_path: Path) -> None:
    ours, theirs = write_pair(tmp_path, model_type)
    certificate = certify(ours, theirs, layout, num_tokens=100)
    assert certificate["passed"]
    assert certificate == json.loads((ours / "parity.json").read_text())
    assert certificate["num_tensors"] == 3 + 2 * 11
    logits = certificate["logits"]
    assert 0 < logits["max_difference"] <= 1e-4
    assert logits["argmax_agreement"] == 1.0
    assert logits["standard_deviation"] > 0.5
    used = "transformers" if layout == "qwen3" else "model.reference"
    assert logits["against"].startswith(used)
    assert not list(ours.glob(".*"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.self_attn.k_proj.weight", lambda t: t.flip(0)),
        ("model.layers.0.self_attn.q_norm.weight", lambda t: torch.ones_like(t)),
        ("lm_head.weight", lambda t: t * 1.001),
    ],
)
def test_any_difference_is_named(name: str, change: Any, tmp_path: Path) -> None:
    ours, theirs = write_pair(tmp_path)
    change_tensor(theirs, name, change)
    certificate = certify(ours, theirs, "qwen3", num_tokens=50)
    assert not certificate["passed"]
    assert [key for key, one in certificate["tensors"].items() if not one["equal"]] == [name]
    assert certificate["logits"]["max_difference"] > 1e-4


def test_the_same_weights_in_another_function_are_noticed(tmp_path: Path) -> None:
    for model_type in ("qwen3", "Emu3"):
        ours, theirs = write_pair(tmp_path / model_type, model_type, rms_norm_eps=1e-2)
        certificate = certify(ours, theirs, "qwen3", num_tokens=50)
        assert certificate["num_different"] == 0
        assert not certificate["passed"]


def test_a_model_too_large_is_compared_by_tensors(tmp_path: Path, monkeypatch: Any) -> None:
    ours, theirs = write_pair(tmp_path)
    monkeypatch.setattr(parity, "WORKING_BYTES", 1 << 60)
    certificate = certify(ours, theirs, "qwen3")
    assert (certificate["passed"], certificate["mode"], certificate["logits"]) == (True, "keys", None)
    assert "only the tensors were compared" in certificate["message"]
    assert certify(ours, theirs, "qwen3", mode="keys")["message"] == ""
    assert "another function" in certify(ours, theirs, "emu3")["message"]


def test_what_cannot_be_read_is_the_users(tmp_path: Path) -> None:
    ours, theirs = write_pair(tmp_path)
    change_tensor(theirs, "model.norm.weight", lambda t: t)
    with pytest.raises(UserError, match=r"no config\.json"):
        certify(ours, ours, "qwen3")
    for path in theirs.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="missing"):
        certify(ours, theirs, "qwen3")


CONFLICTS = [
    {"rope_theta": 10_000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 10_000.0}}},
    {"rope_parameters": [10_000.0]},
    {"rope_theta": "10000"},
    {"partial_rotary_factor": 0.5},
    {"rope_local_base_freq": 10_000.0},
]


@pytest.mark.parametrize("fields", CONFLICTS, ids=lambda fields: ",".join(fields))
def test_positions_that_contradict_or_are_unknown_are_refused_by_reading(fields: dict, tmp_path: Path) -> None:
    """Without running anything: transformers may not be there, and has opinions of its own."""
    ours, theirs = write_pair(tmp_path, "Emu3", **fields)
    with pytest.raises(UserError, match="positions"):
        certify(ours, theirs, "emu35", mode="keys")
    problems = Problems()
    hugging_face.check_config(hugging_face.read_config(theirs), CONFIG, problems, untie=False)
    assert any("rope" in one or "rotary" in one for one in problems.found)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"type": "default"}, "partial_rotary_factor": 1.0},
    ],
)
def test_positions_that_are_ours_pass(fields: dict, tmp_path: Path) -> None:
    _, theirs = write_pair(tmp_path, "Emu3", **fields)
    assert hugging_face.rope_problems(hugging_face.read_config(theirs) or {}) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    model = transformers_model(CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.state_dict()[name][3, 2] = value
    ours = write_checkpoint(tmp_path / "ours", model.state_dict(), CONFIG)
    model.save_pretrained(tmp_path / "theirs")
    certificate = certify(ours, tmp_path / "theirs", "qwen3")
    assert (certificate["passed"], certificate["non_finite"], certificate["num_different"]) == (False, [name], 0)


def test_a_cast_on_request_passes_on_either_side(tmp_path: Path) -> None:
    ours, theirs = write_pair(tmp_path)
    for path in theirs.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    assert not certify(ours, theirs, "qwen3", mode="keys")["passed"]
    certificate = certify(ours, theirs, "qwen3", num_tokens=40, cast="bfloat16")
    assert certificate["passed"]
    assert certificate["logits"]["max_difference"] <= 1e-4
