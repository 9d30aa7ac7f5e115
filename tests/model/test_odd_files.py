"""Files that are not what their name says: one message, whatever stands there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.command_line import cli
from model.checkpoint.reader import CheckpointReader
from model.conversion.safetensors_file import SafetensorsFile
from model.conversion.sources import open_foreign
from model.errors import UserError

DEEP = b'{"a":' * 200_000
HEADERS = {
    "deep": DEEP,
    "deep list": b"[" * 200_000,
    "list": b"[1,2]",
    "number": b"7777",
    "string entries": b'{"a":"b"}',
    "no offsets": b'{"a":{"dtype":"F32","shape":[1]}}',
    "three offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,2,4]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "negative product": b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    "fraction": b'{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}',
    "huge": b'{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}}',
    "many digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    "infinite": b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
    "true": b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "string shape": b'{"a":{"dtype":"F32","shape":"11","data_offsets":[0,4]}}',
    "unknown dtype": b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}',
    "list dtype": b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
    "no text": b"\xff\xfe\x00\x01",
    "overlap": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_odd_headers_of_safetensors(tmp_path, name):
    path = tmp_path / "model.safetensors"
    header = HEADERS[name]
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="damaged or truncated"):
        SafetensorsFile(path)


TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", sorted(TENSORS))
def test_tensors_without_rows_of_bytes_are_named(tmp_path, capsys, kind):
    torch.save({"good": torch.ones(2), "odd.weight": TENSORS[kind]()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"odd\.weight|cannot be read|more than tensors"):
        open_foreign(tmp_path / "model.ckpt")
    assert cli.main(["inspect", f"checkpoint={tmp_path / 'model.ckpt'}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def replace_by(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "self-link":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "deep":
        path.write_bytes(DEEP)
    else:
        path.write_bytes(b"\xff\xfe{")


@pytest.mark.parametrize("kind", ["folder", "self-link", "pipe", "deep", "no text"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "model.safetensors.index.json", "nextstate/record.json", "config.yaml"]
)
def test_anything_in_the_place_of_a_file_of_an_export(tmp_path, capsys, name, kind):
    folder = tmp_path / "export"
    (folder / "nextstate").mkdir(parents=True)
    save_file({"a": torch.ones(2), "quantize.embedding.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    if name != "config.yaml":
        (folder / "config.json").write_text(json.dumps({"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"]}))
    replace_by(folder / name, kind)
    layout = "ibq" if name == "config.yaml" else "emu35"
    command = ["convert", "from_hf", f"source={folder}", f"target={tmp_path / 'out'}", f"layout={layout}"]
    assert cli.main(command) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "self-link", "pipe", "deep", "no text"])
@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors"])
def test_anything_in_the_place_of_a_file_of_a_checkpoint(tmp_path, capsys, name, kind):
    assert cli.main(["convert", "init", "model=toy", "model.num_layers=1", f"target={tmp_path / 'ours'}"]) == 0
    capsys.readouterr()
    replace_by(tmp_path / "ours" / name, kind)
    assert (
        cli.main(["convert", "to_hf", f"source={tmp_path / 'ours'}", f"target={tmp_path / 'o'}", "layout=emu35"]) == 2
    )
    assert "Traceback" not in capsys.readouterr().err

    def read() -> None:
        with CheckpointReader(tmp_path / "ours") as reader:
            reader.read_full(next(iter(reader.keys())))

    with pytest.raises(UserError):
        read()
