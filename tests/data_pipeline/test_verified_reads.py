"""Whoever reads a token file, a packed shard or dataset.json notices what is not as it was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage.format import TOKENIZER_PATHS, check_seal, read_manifest, seal
from data_pipeline.storage.packed_files import PackedDataset, read_dataset_manifest
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader, TokenFileWriter
from launch.inspection.contents import inspect_tokens
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=1024, visual_size=64))
NUM_DOCUMENTS = 12
SUFFIXES = (".bin", ".idx", ".seg.npy", ".crc.npy", ".json")


def write_tokens(prefix: Path, seed: int = 0, *, with_crc: bool = True) -> None:
    rng = np.random.default_rng(seed)
    with TokenFileWriter(prefix, with_crc=with_crc) as writer:
        for number in range(NUM_DOCUMENTS):
            tokens = rng.integers(0, VOCABULARY.text_size, 10 + number)
            segments = np.zeros(1, SEGMENT_DTYPE)
            segments["length"], segments["kind"], segments["document"] = len(tokens), Kind.TEXT, number
            segments["flags"] = Flag.DOCUMENT_START | Flag.SPLITTABLE
            writer.add(tokens, segments)
        entries = {"kind": "tokens", "num_documents": len(writer), "counts_by_class": {"text": 1}, "quarantined": {}}
        writer.finish(entries | {"vocabulary": VOCABULARY.describe(), "sources": ["a"], "inputs": []})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Token files, and rows packed of them."""
    base = tmp_path_factory.mktemp("verified")
    write_tokens(base / "tokens" / "000000")
    pack({"a": base / "tokens"}, base / "packed", PackConfig(sequence_length=32, rows_per_shard=3, window_rows=2))
    return base / "tokens", base / "packed"


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def prefixes_of(folder: Path) -> list[Path]:
    return [path.with_suffix("") for path in sorted(folder.glob("*.idx"))]


def read_all(folder: Path) -> list:
    """Everything that a reader of token files or packed rows gives."""
    if (folder / "dataset.json").exists():
        dataset = PackedDataset(folder)
        rows = [tuple(array.tolist() for array in dataset.row(row)) for row in range(len(dataset))]
        return [rows, dataset.manifest, inspect_tokens(folder, prefixes_of(folder), 1, None)["kind"]]
    reader = TokenFileReader(folder / "000000")
    documents = [(reader.tokens(index).tolist(), reader.segments(index).tolist()) for index in range(len(reader))]
    return [documents, reader.manifest]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("which", [0, 1])
def test_flips_are_told_or_change_nothing(folders: tuple[Path, Path], tmp_path: Path, which: int, suffix: str) -> None:
    folder = Path(shutil.copytree(folders[which], tmp_path / "copy"))
    expected = without_path(read_all(folder))
    path = folder / f"000000{suffix}"
    intact = path.read_bytes()
    num_told = 0
    for bit in np.random.default_rng(which).permutation(len(intact) * 8)[:60].tolist():
        flipped(path, bit)
        answer, message = answer_or_message(lambda: without_path(read_all(folder)))
        assert answer == expected or "000000" in message, f"bit {bit}"
        num_told += bool(message)
        path.write_bytes(intact)
    assert num_told > 40


def answer_or_message(read: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


def without_path(answer: list) -> list:
    return json.loads(json.dumps(answer, default=str))


def test_flips_of_dataset_json_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    intact = (folders[1] / "dataset.json").read_bytes()
    expected = json.loads(intact)
    key = intact.index(b'"checksum": ') * 8
    bits = [*range(key, key + 96), *np.random.default_rng(0).permutation(len(intact) * 8)[:400].tolist()]
    for bit in bits:
        path.write_bytes(intact)
        flipped(path, bit)
        answer, message = answer_or_message(lambda: read_dataset_manifest(tmp_path))
        assert answer == expected or str(path) in message, f"bit {bit}"


def test_manifests_of_older_versions_are_taken_and_damaged_new_ones_are_not(folders: tuple[Path, Path]) -> None:
    for manifest in (read_manifest(folders[0] / "000000"), read_dataset_manifest(folders[1])):
        assert seal(manifest) == manifest
        old = {key: value for key, value in manifest.items() if key not in ("checksum", "tasks", TOKENIZER_PATHS)}
        check_seal(folders[0] / "x.json", old)
        for broken in (old | {"checksun": manifest["checksum"]}, manifest | {"kind": "other"}, [manifest], "text"):
            with pytest.raises(UserError, match=r"damaged[\s\S]*x\.json"):
                check_seal(folders[0] / "x.json", broken)


def test_a_replaced_shard_is_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens" / "000000", seed=1)
    config = PackConfig(sequence_length=32, rows_per_shard=3, window_rows=2)
    pack({"a": tmp_path / "tokens"}, tmp_path / "other", config)
    everything = Path(shutil.copytree(folders[1], tmp_path / "everything"))
    without_manifest = Path(shutil.copytree(folders[1], tmp_path / "without_manifest"))
    for suffix in SUFFIXES:
        shutil.copy(tmp_path / "other" / f"000001{suffix}", everything)
        if suffix != ".json":
            shutil.copy(tmp_path / "other" / f"000001{suffix}", without_manifest)
    for folder, message in ((everything, "replaced"), (without_manifest, "checksum is not the manifest's")):
        dataset = PackedDataset(folder)
        dataset.row(0)
        with pytest.raises(UserError, match=message):
            dataset.row(3)
    with pytest.raises(UserError, match="replaced"):
        inspect_tokens(everything, prefixes_of(everything), 0, None)


def test_token_files_without_crcs_are_checked_whole(tmp_path: Path) -> None:
    write_tokens(tmp_path / "000000", with_crc=False)
    assert len(TokenFileReader(tmp_path / "000000").tokens(3)) == 13
    flipped(tmp_path / "000000.bin", 5)
    with pytest.raises(UserError, match=r"damaged[\s\S]*000000\.bin"):
        TokenFileReader(tmp_path / "000000").tokens(3)
