"""`nextstate convert`: the text tokenizer that goes along, options of groups, and what it says of its certificate."""

import base64
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.documents.tokenizers import load_text_tokenizer
from launch.command_line import cli
from launch.composition.compose import compose_config
from model.checkpoint.manifest import CheckpointManifest, read_manifest
from model.errors import UserError
from training.inference.choice import tokenizer_folder

WORDS = [bytes([byte]) for byte in range(256)] + b" the|th|he|in|ing".split(b"|")
TOY = ["model=toy", "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48"]
TOY += [f"model.vocabulary.text_size={len(WORDS)}"]


def answer(capsys, *arguments: str) -> dict:
    assert cli.main([*arguments, "json=true"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def released(tmp_path, capsys):
    """Weights, and a tokenizer's folder as it is released: ranks, settings, and a program beside them."""
    answer(capsys, "convert", "init", *TOY, f"target={tmp_path / 'fresh'}")
    answer(capsys, "convert", "to_hf", f"source={tmp_path / 'fresh'}", f"target={tmp_path / 'hf'}", "layout=emu35")
    shutil.rmtree(tmp_path / "hf" / "nextstate")
    folder = tmp_path / "released"
    folder.mkdir()
    lines = [base64.b64encode(word) + f" {rank}".encode() for rank, word in enumerate(WORDS)]
    (folder / "emu3.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "emu3_vision_tokens.txt").write_text("<|image token|>\n")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenization_emu3.py").write_text("print('a program')")
    return tmp_path


@pytest.mark.parametrize("given", ["released", "released/emu3.tiktoken"])
def test_the_released_tokenizer_is_bound_to_a_converted_checkpoint(released, capsys, given):
    place = released / given
    back = released / "back"
    arguments = [f"source={released / 'hf'}", f"target={back}", "layout=emu35", *TOY, "verify=none"]
    answer(capsys, "convert", "from_hf", *arguments, f"text_tokenizer={place}")
    assert not list(back.rglob("*.py"))
    ours, manifest = load_text_tokenizer(place), read_manifest(back)
    assert manifest["text_tokenizer"] == {"path": "text_tokenizer", "fingerprint": ours.fingerprint}
    found = tokenizer_folder(
        CheckpointManifest.of(manifest, back), back, "text_tokenizer", None
    )  # as `score` and `generate` look for it
    assert found == back / "text_tokenizer"
    assert load_text_tokenizer(found).fingerprint == ours.fingerprint
    answer(capsys, "convert", "reshard", f"source={back}", f"target={released / 'again'}")
    assert load_text_tokenizer(released / "again" / "text_tokenizer").fingerprint == ours.fingerprint
    answer(capsys, "score", f"checkpoint={back}", "text=the thing", f"out={released / 'scores.npy'}")
    assert np.isfinite(np.load(released / "scores.npy")).all()


def test_a_tokenizer_of_another_vocabulary_is_refused(released, capsys):
    ranks = released / "released" / "emu3.tiktoken"
    ranks.write_bytes(b"\n".join(ranks.read_bytes().splitlines()[:-1]))
    arguments = [f"source={released / 'hf'}", f"target={released / 'x'}", "layout=emu35", *TOY]
    text = refusal(capsys, "convert", "from_hf", *arguments, f"text_tokenizer={ranks}")
    assert "not of this vocabulary" in text
    assert not (released / "x").exists()


@pytest.mark.parametrize("linked", ["folder", "file"])
def test_links_in_an_exports_tokenizer_are_refused(released, capsys, linked):
    """What they lead to may be any file of this machine."""
    back = released / "hf" / "nextstate" / "text_tokenizer"
    answer(
        capsys,
        "convert",
        "to_hf",
        f"source={released / 'fresh'}",
        f"target={released / 'export'}",
        "layout=emu35",
        f"text_tokenizer={released / 'released'}",
    )
    back = released / "export" / "nextstate" / "text_tokenizer"
    if linked == "folder":
        shutil.rmtree(back)
        back.symlink_to(released / "released")
    else:
        (back / "emu3.tiktoken").unlink()
        (back / "emu3.tiktoken").symlink_to(released / "released" / "emu3.tiktoken")
    text = refusal(capsys, "convert", "from_hf", f"source={released / 'export'}", f"target={released / 'x'}")
    assert "symbolic link" in text
    assert not (released / "x").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.rope_theta=5", "add model="),
        ("model={num_layers: 2}", "add model="),
        ("vision_tokenizer.ch=32", "add vision_tokenizer="),
        ("vision_tokenizer={ch: 32}", "add vision_tokenizer="),
        ("vision_tokenizer=ibq_nothing", "ibq_emu35"),
    ],
)
def test_keys_of_a_group_without_an_option_are_one_message(override, expected, capsys):
    assert expected in refusal(capsys, "convert", "from_hf", "source=a", "target=b", override)


def test_a_vision_tokenizer_is_chosen_and_changed_as_the_hints_say():
    arguments = ["action=from_hf", "source=a", "target=b", "vision_tokenizer=ibq_emu35", "vision_tokenizer.ch=32"]
    config = compose_config("convert", arguments)
    assert (config.vision_tokenizer.ch, config.vision_tokenizer.n_embed) == (32, 131_072)
    assert compose_config("convert", [*arguments[:3], "vision_tokenizer=null", "model=null"]).vision_tokenizer is None


def test_ibq_weights_without_their_config_are_converted(tmp_path, capsys):
    from model.vision_tokenizer.config import VisionTokenizerConfig
    from model.vision_tokenizer.ibq import IBQ

    sizes = {"ch": 32, "num_res_blocks": 1, "z_channels": 8, "embed_dim": 8, "n_embed": 32, "resolution": 16}
    config = VisionTokenizerConfig(**sizes, ch_mult=[1, 2], attn_resolutions=[8])
    torch.manual_seed(0)
    torch.save(IBQ(config).state_dict(), tmp_path / "model.ckpt")
    source, target = f"source={tmp_path / 'model.ckpt'}", f"target={tmp_path / 'ours'}"
    text = refusal(capsys, "convert", "from_hf", source, target)
    assert "ibq" in text
    assert "vision_tokenizer=ibq_emu35" in refusal(capsys, "convert", "from_hf", source, target, "layout=ibq")
    changes = [f"vision_tokenizer.{name}={value}" for name, value in sizes.items()]
    changes += ["vision_tokenizer.ch_mult=[1,2]", "vision_tokenizer.attn_resolutions=[8]"]
    found = answer(capsys, "convert", "from_hf", source, target, "vision_tokenizer=ibq_emu35", *changes)
    assert found["parity"]["passed"] is True
    assert found["parity"]["functions"]["code_agreement"] == 1.0
    out = answer(capsys, "convert", "to_hf", f"source={tmp_path / 'ours'}", f"target={tmp_path / 'out'}", "layout=ibq")
    assert out["parity"]["passed"] is True
    same = answer(
        capsys, "convert", "verify", f"source={tmp_path / 'ours'}", f"target={tmp_path / 'out'}", "layout=ibq"
    )
    assert same["parity"]["functions"]["agree"] is True


def test_weights_that_are_not_finite_are_named_before_they_are_published(released, capsys):
    path = released / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path)
    arguments = [f"source={released / 'hf'}", f"target={released / 'x'}", "layout=emu35", *TOY]
    for verify in ("auto", "keys"):
        text = refusal(capsys, "convert", "from_hf", *arguments, f"verify={verify}")
        assert "not finite" in text
        assert "decoder.final_layernorm.weight" in text
        assert not (released / "x").exists()
    found = answer(capsys, "convert", "from_hf", *arguments, "verify=none")
    assert "decoder.final_layernorm.weight" in str(found["notes"])


def test_a_cast_is_certified_with_both_sides_rounded(released, capsys):
    arguments = [f"source={released / 'hf'}", f"target={released / 'x'}", "layout=emu35", *TOY, "dtype=bfloat16"]
    found = answer(capsys, "convert", "from_hf", *arguments, "num_tokens=32")
    assert found["parity"]["passed"] is True
    assert found["parity"]["mode"] == "logits"
    assert "bfloat16" in found["parity"]["message"]


def test_the_default_verification_is_bounded_and_announced(released, capsys, monkeypatch):
    from launch.conversion import certificate

    monkeypatch.setattr(certificate, "AUTO_PARAMETERS", 10)
    call = ["convert", "to_hf", f"source={released / 'fresh'}", "layout=emu35"]
    found = answer(capsys, *call, f"target={released / 'a'}")
    assert found["parity"]["mode"] == "keys"
    assert "verify=logits runs them" in found["parity"]["message"]
    assert cli.main([*call, f"target={released / 'b'}", "verify=keys"]) == 0
    assert "verify: tensors by name" in capsys.readouterr().err


def test_a_killed_verification_leaves_nothing_beside_what_is_published(released, capsys):
    folder = released / "hf"
    (folder / "parity.json.tmp-77").write_text("half")
    call = ["convert", "verify", f"source={released / 'fresh'}", f"target={folder}", "layout=emu35", "verify=keys"]
    answer(capsys, *call)
    assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json", "model.safetensors", "parity.json"]


def test_a_copied_tokenizer_cannot_name_files_outside_its_folder(tmp_path):
    from launch.conversion.conversion import tokenizer_files

    folder = tmp_path / "kept"
    folder.mkdir()
    (tmp_path / "secret.model").write_bytes(b"x")
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "x", "file": "../secret.model", "sha256": "0"}))
    assert all(path.parent == folder for path in tokenizer_files(folder))
    with pytest.raises(UserError):
        load_text_tokenizer(folder)
