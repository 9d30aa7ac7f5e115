"""The checkpoint reader against brute force: any rectangle out of any tiling."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from handmade_checkpoints import publish_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint.reader import CheckpointReader, latest_checkpoint, list_checkpoints, manifest_checksum
from model.errors import UserError

PIECE = {"name": "a", "offset": [0], "shape": [2]}


def write_tiled(folder, name, tensor, row_cuts, column_cuts, num_files=2, by_piece=True):
    """Write a 2-d tensor as a grid of pieces spread over files."""
    folder.mkdir(parents=True, exist_ok=True)
    files, pieces = {}, []
    rows = [0, *sorted(set(row_cuts)), tensor.shape[0]]
    columns = [0, *sorted(set(column_cuts)), tensor.shape[1]]
    for row, row_end in itertools.pairwise(rows):
        for column, column_end in itertools.pairwise(columns):
            file = f"rank_{len(pieces) % num_files:05d}.safetensors"
            piece_name = f"{name}@{row},{column}"
            piece = tensor[row:row_end, column:column_end].contiguous()
            files.setdefault(file, {})[piece_name] = piece
            pieces.append({"file": file, "name": piece_name, "offset": [row, column], "shape": list(piece.shape)})
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    entry = {"global_shape": list(tensor.shape), "dtype": "float32", "pieces": pieces}
    publish_manifest(folder, {"format_version": 1, "step": 7, "keys": {name: entry}}, by_piece=by_piece)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_rectangle_out_of_any_tiling(tmp_path_factory, data):
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    tensor = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    cuts = [data.draw(st.lists(st.integers(1, size - 1), max_size=3)) if size > 1 else [] for size in (rows, columns)]
    folder = tmp_path_factory.mktemp("tiled")
    write_tiled(folder, "model/weight", tensor, *cuts)
    row, column = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    height, width = (data.draw(st.integers(0, rows - row)), data.draw(st.integers(0, columns - column)))
    with CheckpointReader(folder) as reader:
        part = reader.read("model/weight", (row, column), (height, width))
        assert torch.equal(part, tensor[row : row + height, column : column + width])
        assert torch.equal(reader.read_full("model/weight"), tensor)
        assert reader.metadata["step"] == 7


def test_scalar_and_missing_key(tmp_path):
    save_file({"step": torch.tensor(3)}, tmp_path / "a.safetensors")
    piece = {"file": "a.safetensors", "name": "step", "offset": [], "shape": []}
    keys = {"optimizer/step": {"global_shape": [], "dtype": "int64", "pieces": [piece]}}
    publish_manifest(tmp_path, {"format_version": 1, "keys": keys})
    reader = CheckpointReader(tmp_path)
    assert reader.read_full("optimizer/step").item() == 3
    with pytest.raises(UserError, match="no such tensor"):
        reader.global_shape("model/other")


def test_incomplete_tensor_is_refused(tmp_path):
    tensor = torch.ones(4, 4)
    write_tiled(tmp_path, "model/weight", tensor, [2], [])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["keys"]["model/weight"]["pieces"].pop()
    publish_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match="does not hold the whole"):
        CheckpointReader(tmp_path).read_full("model/weight")


def test_damaged_files_are_refused(tmp_path):
    write_tiled(tmp_path, "model/weight", torch.ones(4, 4), [], [])
    file = tmp_path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match="is damaged"):
        CheckpointReader(tmp_path).read_full("model/weight")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        CheckpointReader(tmp_path)


def test_latest_checkpoint_ignores_unpublished_folders(tmp_path):
    for step in (5, 12):
        write_tiled(tmp_path / "checkpoints" / f"step_{step:08d}", "w", torch.ones(2, 2), [], [])
    (tmp_path / "checkpoints" / "step_00000020").mkdir()
    assert latest_checkpoint(tmp_path).name == "step_00000012"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000012", "step_00000005"]
    assert latest_checkpoint(tmp_path / "checkpoints" / "step_00000005").name == "step_00000005"
    with pytest.raises(UserError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"keys": {"a": 5}},
        {"keys": {"a": {"global_shape": [2, "x"], "dtype": "float32", "pieces": []}}},
        {"keys": {"a": {"global_shape": [2], "dtype": "float99", "pieces": []}}},
        {"keys": {"a": {"global_shape": [2], "dtype": "float32", "pieces": [{"file": "x", "name": "a"}]}}},
        *(
            {"keys": {"a": {"global_shape": [2], "dtype": "float32", "pieces": [PIECE | {"file": file}]}}}
            for file in ("../x", "/etc/passwd", "", 5)
        ),
        {"files": {"x": "y"}},
        {"files": {"../x": {"bytes": 3, "crc32": "0"}}},
    ],
)
def test_a_hostile_manifest_with_a_right_checksum_is_one_message(tmp_path, change):
    manifest = {"format_version": 1, "keys": {}, "files": {}} | change
    text = json.dumps(manifest | {"manifest_crc32": manifest_checksum(manifest)})
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged|dtype"):
        CheckpointReader(tmp_path).read_full("a")


def test_a_published_folder_is_told_to_be_converted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="nextstate convert from_hf source="):
        latest_checkpoint(tmp_path)
