"""`nextstate convert` and `nextstate inspect checkpoint=` as people call them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.command_line import cli

TOY = ["model=toy", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48"]


def answer(capsys, *arguments: str) -> dict:
    assert cli.main([*arguments, "json=true"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def fresh(tmp_path, capsys) -> str:
    answer(capsys, "convert", "init", *TOY, "seed=11", f"target={tmp_path / 'fresh'}")
    return str(tmp_path / "fresh")


def test_there_and_back_with_certificates(fresh, tmp_path, capsys):
    out = answer(
        capsys, "convert", "to_hf", f"source={fresh}", f"target={tmp_path / 'hf'}", "layout=emu35", "num_tokens=32"
    )
    assert out["layout"] == "emu35"
    assert out["parity"]["passed"] is True
    assert out["parity"]["mode"] == "logits"
    assert out["parity"]["logits"]["argmax_agreement"] == 1.0
    assert out["parity"]["hugging_face"] == str(tmp_path / "hf")
    kept = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert kept["passed"] is True
    assert not (tmp_path / "fresh" / "parity.json").exists()
    answer(capsys, "convert", "from_hf", f"source={tmp_path / 'hf'}", f"target={tmp_path / 'back'}", "verify=none")
    first, second = (load_file(tmp_path / name / "rank_00000.safetensors") for name in ("fresh", "back"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = answer(
        capsys, "convert", "verify", f"source={fresh}", f"target={tmp_path / 'hf'}", "layout=emu35", "verify=keys"
    )
    assert found["parity"]["passed"] is True


def test_verify_names_what_differs(fresh, tmp_path, capsys):
    answer(capsys, "convert", "to_hf", f"source={fresh}", f"target={tmp_path / 'hf'}", "layout=qwen3", "verify=none")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 6] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    text = refusal(
        capsys, "convert", "verify", f"source={fresh}", f"target={tmp_path / 'hf'}", "layout=qwen3", "verify=keys"
    )
    assert "different: model.layers.1.mlp.down_proj.weight" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert"], "action: is required"),
        (["convert", "to_hff", "target=x"], "unknown action 'to_hff'"),
        (["convert", "to_hf", "layout=emu36"], "target: is required"),
        (["convert", "to_hf", "layout=emu36", "source=x", "target=y"], "unknown layout 'emu36'"),
        (["convert", "to_hf", "layout=emu35", "source=no/such", "target=y"], "no complete checkpoint"),
        (["convert", "from_hf", "layout=qwen3", "source=no/such", "target=y"], "no such file"),
        (["convert", "from_hf", "layout=ibq", "source=no/such", "target=y"], "no such file"),
        (["convert", "init", "target=y"], "model=toy"),
        (["convert", "reshard", "source=no/such", "target=y", "tensor=0"], "tensor: must be positive"),
        (["convert", "surgery", "source=no/such", "target=y", "model=toy", "surgery.rows=zeros"], "surgery.rows"),
        (["inspect", "checkpoint=no/such"], "no such file"),
    ],
)
def test_mistakes_are_refused(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_conversion_needs_neither_torch_nor_megatron(fresh, tmp_path):
    """Of a checkpoint that exists: reshard and to_hf are copies of bytes."""
    code = (
        "import sys; from launch.command_line import cli; cli.main(sys.argv[1:]);"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    for action in (["reshard", "tensor=2"], ["to_hf", "layout=emu35"]):
        call = ["convert", *action, f"source={fresh}", f"target={tmp_path / action[0]}", "verify=none"]
        subprocess.run([sys.executable, "-c", code, *call], check=True, capture_output=True)


def test_inspect_shows_a_published_checkpoint_and_its_mismatches(fresh, tmp_path, capsys):
    answer(capsys, "convert", "to_hf", f"source={fresh}", f"target={tmp_path / 'hf'}", "layout=qwen3", "verify=none")
    found = answer(capsys, "inspect", str(tmp_path / "hf"))
    assert (found["layout"], found["num_tensors"], found["dtypes"]) == ("qwen3", 25, {"float32": 25})
    assert found["tied"] is False
    same = answer(capsys, "inspect", f"checkpoint={tmp_path / 'hf'}", *TOY)
    assert same["mismatches"] == []
    other = answer(capsys, "inspect", f"checkpoint={tmp_path / 'hf'}", *TOY, "model.head_dim=64", "model.num_layers=3")
    text = "\n".join(other["mismatches"])
    assert "model.head_dim=32" in text
    assert "11 missing" in text
    assert "misshaped" in text
    ours = answer(capsys, "inspect", f"checkpoint={fresh}", *TOY, "model.rope_theta=5e5")
    assert ours["mismatches"] == ["model.rope_theta: 500000.0, but the checkpoint has 10000.0"]


def test_a_text_tokenizer_goes_along_and_comes_back(tmp_path, capsys):
    from transformers import AutoTokenizer

    from data_pipeline.documents.tokenizers import load_text_tokenizer, train_sentencepiece

    lines = [f"a {c} {s} at row {i} 中文 {i * 7}" for i in range(60) for c in ("red", "blue") for s in ("disc", "box")]
    ours = train_sentencepiece(lines, tmp_path / "text", 280)
    sizes = [*TOY, "model.vocabulary.text_size=280"]
    answer(capsys, "convert", "init", *sizes, f"target={tmp_path / 'fresh'}")
    answer(
        capsys,
        "convert",
        "to_hf",
        f"source={tmp_path / 'fresh'}",
        f"target={tmp_path / 'hf'}",
        "layout=emu35",
        f"text_tokenizer={tmp_path / 'text'}",
        "verify=none",
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    samples = [*lines[:20], "  two  spaces ", "é☃ 😀\n\ttab", "64*64", "", "中文字 row", "x" * 50]
    for text in samples:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text
    assert theirs.convert_tokens_to_ids("<|bos|>") == 281
    assert theirs.bos_token_id == 281
    assert theirs.convert_tokens_to_ids("<|visual token 000003|>") == 280 + 32 + 3
    assert len(theirs) == 280 + 32 + 512
    answer(capsys, "convert", "from_hf", f"source={tmp_path / 'hf'}", f"target={tmp_path / 'back'}", "verify=none")
    again = load_text_tokenizer(tmp_path / "back" / "text_tokenizer")
    assert again.fingerprint == ours.fingerprint
    assert "280 text ids" not in refusal(
        capsys,
        "convert",
        "to_hf",
        f"source={tmp_path / 'fresh'}",
        f"target={tmp_path / 'x'}",
        "layout=emu35",
        f"text_tokenizer={tmp_path / 'nothing'}",
    )


def test_tiktoken_ranks_become_a_tokenizer_with_the_same_ids(tmp_path):
    import base64

    from transformers import AutoTokenizer

    from data_pipeline.documents.tokenizer_export import export_text_tokenizer
    from data_pipeline.documents.tokenizers import load_text_tokenizer
    from model.vocabulary import Vocabulary, VocabularyConfig

    words = b" the|th|he| a|in|er|ing| re|red| red|blue| blue|bl|lu|ue|circle|ci|rc|le|cle|\xe4\xb8|\xad\xe6|cirzz|zz"
    tokens = [bytes([byte]) for byte in range(256)] + words.split(b"|")
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (tmp_path / "emu3.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=len(tokens)))
    (tmp_path / "hf").mkdir()
    export_text_tokenizer(tmp_path / "emu3.tiktoken", vocabulary, tmp_path / "hf")
    ours = load_text_tokenizer(tmp_path / "emu3.tiktoken")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    generator = np.random.default_rng(0)
    pieces = ["the", " red", "circle", " blue", "cirzz", "ing", " 64*64", "\n", "  ", "中文", "é", "e\u0301", "'s", "."]
    for _ in range(200):
        text = "".join(generator.choice(pieces, 6))
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
