"""`nextstate inspect` and `nextstate doctor`."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_inference import TEXT_SIZE, TEXTS

from data_pipeline.documents.tokenizers import train_sentencepiece
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from data_pipeline.storage.token_files import TokenFileWriter
from launch.command_line import cli
from launch.doctor import machine as doctor
from launch.inspection.contents import inspect_path
from model.checkpoint.manifest import manifest_checksum
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig


def inspect(capsys, *arguments: str, exit_code: int = 0) -> dict:
    assert cli.main(["inspect", *arguments, "json=true"]) == exit_code
    return json.loads(capsys.readouterr().out)


def test_the_published_model_is_counted_exactly(capsys):
    answer = inspect(capsys, "model=emu35_34b")
    assert answer["parameters"]["total"] == 34_103_460_864
    assert answer["parameters"]["layers"] == 31_206_298_624
    assert answer["parameters"]["embeddings"] == 2_897_162_240
    assert answer["vocabulary"]["size"] == 282_926


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_raw_shard_with_a_bad_sample(tmp_path, capsys):
    picture = io.BytesIO()
    Image.new("RGB", (8, 6)).save(picture, "PNG")
    members = {"a.png": picture.getvalue(), "a.txt": b"a red circle", "b.xyz": b"?"}
    write_tar(tmp_path / "000000.tar", members)
    answer = inspect(capsys, str(tmp_path / "000000.tar"))
    assert answer["by_kind"] == {"image_text": 1}
    assert answer["unreadable"] == {"unknown_kind": 1}
    assert answer["samples"][0]["parts"] == {"png": "PNG 8x6", "txt": "a red circle"}


def test_a_damaged_picture_is_described_and_a_folder_in_place_of_a_file_is_one_message(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", {"a.png": b"no picture", "a.txt": b"words"})
    answer = inspect(capsys, str(tmp_path / "0.tar"))
    assert answer["samples"][0]["parts"]["png"] == "10 bytes, corrupt_image"
    (tmp_path / "tokens/000000.json").mkdir(parents=True)
    (tmp_path / "tokens/000000.idx").touch()
    assert cli.main(["inspect", str(tmp_path / "tokens")]) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("num_bytes", "where"), [(2_600, "in the sample 'b'"), (700, "in the sample 'a'"), (100, "")])
def test_a_cut_shard_is_shown_as_far_as_it_goes_and_ends_with_2(tmp_path, capsys, num_bytes, where):
    shards = tmp_path / "shards"
    shards.mkdir()
    members = {f"{key}.txt": key.encode() * 700 for key in "abc"}
    whole = write_tar(shards / "000000.tar", members).read_bytes()
    (shards / "000001.tar").write_bytes(whole[:num_bytes])
    answer = inspect(capsys, str(shards), exit_code=2)
    assert answer["num_samples"] == 3 + (num_bytes > 2_000)
    (damaged,) = answer["damaged"]
    assert damaged.startswith("000001.tar")
    assert where in damaged
    assert cli.main(["inspect", str(shards)]) == 2
    assert f"damaged: {damaged}" in capsys.readouterr().out


def test_a_run_folder_says_what_there_is_to_inspect_below_it(tmp_path, capsys):
    for folder in ("corpora/one", "empty", "sft"):
        (tmp_path / folder).mkdir(parents=True)
    write_tar(tmp_path / "corpora/one/000000.tar", {"a.txt": b"words"})
    write_checkpoint(tmp_path / "sft/checkpoints/step_00000010", 10)
    train_sentencepiece(TEXTS, tmp_path / "text_tokenizer", TEXT_SIZE)
    expected = {
        "corpora/one": "raw shards: 1",
        "sft": "a stage, newest checkpoint step_00000010",
        "text_tokenizer": "a text tokenizer",
    }
    assert inspect(capsys, str(tmp_path))["inspect_one_of"] == expected
    for name in expected:
        assert inspect(capsys, str(tmp_path / name))["kind"] in ("raw", "checkpoint", "text_tokenizer")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert f"nextstate inspect {tmp_path}/sft " in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "empty")]) == 2
    assert "nothing here that can be inspected" in capsys.readouterr().err


@pytest.fixture
def token_file(tmp_path):
    """One document: BOS, four text tokens, an image of 1*1, two tokens of padding."""
    vocabulary = Vocabulary.from_config(VocabularyConfig())
    ids = vocabulary.structure
    image = [ids["boi"], 5, 6, 7, ids["img"], vocabulary.visual_start, ids["eoi"]]
    tokens = np.array([ids["bos"], 1, 2, 3, 4, *image, ids["pad"], ids["pad"]], np.int32)
    rows = [
        (0, 0, 5, Kind.TEXT, Flag.DOCUMENT_START, 0, 0, 0, 1, 0),
        (0, 5, 7, Kind.IMAGE, 0, 1, 1, 0, 1, 0),
        (0, 12, 2, Kind.PAD, 0, 0, 0, 0, 0, 0),
    ]
    with TokenFileWriter(tmp_path / "000000") as writer:
        writer.add(tokens, np.array(rows, SEGMENT_DTYPE))
        writer.finish(
            {
                "kind": "tokens",
                "num_documents": 1,
                "sources": ["s"],
                "vocabulary": vocabulary.describe(),
                "counts_by_class": {"text": 4},
                "quarantined": {"too_short": 2},
            }
        )
    return tmp_path


@pytest.mark.parametrize("name", ["", "000000", "000000.idx", "000000.seg.npy"])
def test_a_token_file_by_any_of_its_names(token_file, capsys, name):
    answer = inspect(capsys, str(token_file / name))
    assert (answer["kind"], answer["num_documents"], answer["num_tokens"]) == ("tokens", 1, 14)
    assert answer["quarantined"] == {"too_short": 2}
    assert answer["samples"] == ["<text 5> <image 1*1> [12 tokens, 2 of padding]"]


def write_checkpoint(path: Path, step: int) -> None:
    manifest = {
        "kind": "transformer",
        "step": step,
        "keys": {
            name: {"global_shape": shape, "dtype": "float32", "pieces": []}
            for name, shape in (("model/a", [3, 4]), ("model/b", []), ("optimizer/exp_avg/a", [3, 4]))
        },
        "files": {f"rank_{rank:05d}.safetensors": {"bytes": 50, "crc32": "x"} for rank in range(2)},
        "layout": {"tensor": 2},
    }
    path.mkdir(parents=True)
    for name in manifest["files"]:
        (path / name).write_bytes(bytes(50))
    manifest |= {"format_version": 1}
    manifest["manifest_crc32"] = manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_is_read_from_its_manifest(tmp_path, capsys):
    folder = tmp_path / "sft" / "checkpoints"
    for step in (10, 20):
        write_checkpoint(folder / f"step_{step:08d}", step)
    (folder / "step_00000030").mkdir()  # without a manifest it does not exist
    answer = inspect(capsys, str(tmp_path / "sft"))
    assert (answer["step"], answer["num_parameters"], answer["bytes"]) == (20, 13, 100)


def test_a_checkpoint_with_a_cut_and_a_lost_file_names_both_and_ends_with_2(tmp_path, capsys):
    write_checkpoint(tmp_path / "c", 10)
    (tmp_path / "c/rank_00000.safetensors").write_bytes(bytes(20))
    (tmp_path / "c/rank_00001.safetensors").unlink()
    answer = inspect(capsys, str(tmp_path / "c"), exit_code=2)
    assert answer["damaged"] == [
        "rank_00000.safetensors: 20 bytes instead of 50",
        "rank_00001.safetensors: it is missing",
    ]
    assert inspect(capsys, f"checkpoint={tmp_path / 'c'}", exit_code=2)["damaged"]


def test_something_else_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(UserError, match="nothing here that can be inspected"):
        inspect_path(tmp_path / "notes.md", 3, None)


def test_people_get_readable_lines(token_file, capsys):
    assert cli.main(["inspect", str(token_file)]) == 0
    text = capsys.readouterr().out
    assert "num_tokens:" in text
    assert "sample 0:" in text


def test_the_doctor_names_what_is_missing_and_its_cure(monkeypatch, tmp_path):
    package = doctor.package("no-such-distribution", "testing", True)
    assert not package.ok
    assert "pip install no-such-distribution" in package.cure
    broken = doctor.attempt("probe", lambda: 1 / 0, "mend it", True)  # type: ignore[return-value,arg-type]
    assert (broken.ok, broken.cure) == (False, "mend it")
    assert "ZeroDivisionError" in broken.detail
    assert not doctor.report([package])["ok"]
    assert doctor.report([doctor.Finding("x", False, "absent")])["ok"]


def test_the_doctor_finds_the_backends_of_this_machine(tmp_path):
    findings = {finding.name: finding for finding in doctor.examine(tmp_path / "runs" / "new")}
    assert findings["torch"].ok
    assert findings["gloo"].ok, findings["gloo"].detail
    assert findings["video"].ok, findings["video"].detail
    assert findings["disk"].detail.endswith(str(tmp_path))
