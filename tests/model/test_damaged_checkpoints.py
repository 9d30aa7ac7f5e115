"""One flipped byte anywhere in what a reader reads: every reader finds it, and nothing is published from it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from handmade_checkpoints import publish_manifest

from benchmarks.damage import CONFIG, READERS, data_positions, flip, read_all
from model.conversion import actions, vision
from model.conversion.actions import Options
from model.conversion.compare import compare
from model.conversion.record import PADDING_NAME, RECORD_NAME
from model.conversion.safetensors_file import SafetensorsFile
from model.conversion.surgery import SurgeryOptions, read_codebook
from model.errors import UserError
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from training.reliability.checkpoint import find_damage

NUM_FLIPS = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Cut into two tensor-parallel ranks: pieces are rows of some tensors and columns of others."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoint"
    actions.initialize(folder, CONFIG, Options(tensor=2))
    return folder


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "export"
    actions.to_published(checkpoint, folder, "emu35", Options())
    return folder


@pytest.mark.parametrize("by_piece", [True, False], ids=["pieces", "files"])
@pytest.mark.parametrize("reader", READERS, ids=lambda one: one.__name__)
def test_every_reader_finds_every_flipped_byte(checkpoint, tmp_path, reader, by_piece):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    publish_manifest(folder, json.loads((folder / "manifest.json").read_text()), by_piece=by_piece)
    reader(folder, tmp_path / "sound")
    files = sorted(folder.glob("*.safetensors"))
    draw, missed = random.Random(0), []
    for number in range(NUM_FLIPS):
        path = draw.choice(files)
        content = path.read_bytes()
        # The last ten anywhere in the file: its header too.
        positions = data_positions(path) if number < NUM_FLIPS - 10 else range(min(data_positions(path)))
        position, bit = draw.choice(positions), draw.randrange(8)
        flip(path, position, bit)
        try:
            reader(folder, tmp_path / "out")
            missed.append((path.name, position, bit))
        except UserError:
            pass
        assert not (tmp_path / "out").exists()
        path.write_bytes(content)
    assert not missed, f"{len(missed)} of {NUM_FLIPS}"


def test_a_comparison_finds_damage_on_our_side(checkpoint, export, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    assert compare(folder, export, "emu35")["passed"]
    path = folder / "rank_00001.safetensors"
    flip(path, max(data_positions(path)), 0)
    with pytest.raises(UserError, match="do not have their checksums"):
        compare(folder, export, "emu35")


@pytest.mark.parametrize("name", ["manifest.json", RECORD_NAME])
def test_flipped_bytes_of_the_tables_are_found(checkpoint, export, tmp_path, name):
    source = checkpoint if name == "manifest.json" else export
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    content = (folder / name).read_bytes()
    draw = random.Random(1)
    for _ in range(NUM_FLIPS):
        flip(folder / name, draw.randrange(len(content)), draw.randrange(8))
        with pytest.raises(UserError):  # noqa: PT012
            if name == "manifest.json":
                read_all(folder, tmp_path)
            else:
                actions.from_published(folder, tmp_path / "out", None, "emu35", Options())
            if json.loads((folder / name).read_bytes()) == json.loads(content):  # a space for a line's end
                raise UserError("the same values")
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", PADDING_NAME])
def test_from_hf_believes_its_own_record(export, tmp_path, name):
    folder = tmp_path / "damaged"
    shutil.copytree(export, folder)
    draw, path = random.Random(2), folder / name
    content = path.read_bytes()
    for _ in range(NUM_FLIPS // 2):
        flip(path, draw.choice(data_positions(path)), draw.randrange(8))
        with pytest.raises(UserError, match="do not have their checksums"):
            actions.from_published(folder, tmp_path / "out", None, "emu35", Options())
        path.write_bytes(content)
    # Weights that were changed on purpose: without the record they are another tool's.
    flip(path, max(data_positions(path)), 0)
    shutil.rmtree(folder / "nextstate")
    actions.from_published(folder, tmp_path / "out", CONFIG, "emu35", Options())


def test_a_damaged_vision_tokenizer_is_found(tmp_path):
    sizes = VisionTokenizerConfig(
        ch=32,
        ch_mult=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[8],
        resolution=16,
        z_channels=8,
        embed_dim=8,
        n_embed=9,
    )
    from safetensors.torch import save_file

    (tmp_path / "published").mkdir()
    save_file(IBQ(sizes).state_dict(), tmp_path / "published" / "model.safetensors")
    vision.from_published(tmp_path / "published", tmp_path / "ours", sizes, Options())
    path = tmp_path / "ours" / "rank_00000.safetensors"
    file = SafetensorsFile(path)
    place = next(stored for name, stored in file.tensors.items() if "quantize.embedding" in name)
    file.close()
    flip(path, place.position + 5, 3)
    assert "checksum" in find_damage(tmp_path / "ours")
    with pytest.raises(UserError, match="damaged"):
        read_all(tmp_path / "ours", tmp_path)
    with pytest.raises(UserError, match="do not have their checksums"):
        vision.to_published(tmp_path / "ours", tmp_path / "out", Options())
    with pytest.raises(UserError, match="do not have their checksums"):
        read_codebook(SurgeryOptions(rows="codebook", codebook=str(tmp_path / "ours")), CONFIG)
