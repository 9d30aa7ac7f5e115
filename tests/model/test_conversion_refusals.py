"""Conversion refuses what it cannot do exactly, before a byte is written, and survives being killed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_checkpoints import publish_manifest
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.conversion import actions, surgery, vision, writer
from model.conversion.actions import Options
from model.conversion.surgery import SurgeryOptions
from model.errors import UserError
from model.vocabulary import VocabularyConfig

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocabulary=VocabularyConfig(text_size=40, visual_size=9, pad_multiple=16),
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "checkpoint"
    actions.initialize(folder, CONFIG, Options())
    return folder


@pytest.fixture
def export(fresh, tmp_path) -> Path:
    actions.to_published(fresh, tmp_path / "export", "qwen3", Options())
    shutil.rmtree(tmp_path / "export" / "nextstate")
    return tmp_path / "export"


def change(export: Path, **fields) -> None:
    values = json.loads((export / "config.json").read_text()) | fields
    (export / "config.json").write_text(json.dumps(values))


def refused(export: Path, target: Path, options: Options | None = None, config: ModelConfig | None = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        actions.from_published(export, target, config, "qwen3", options or Options())
    assert not target.exists()
    assert not list(target.parent.glob(".*converting"))
    return str(caught.value)


def test_missing_extra_misshaped_and_wrong_dtypes_are_listed_at_once(export, tmp_path):
    tensors = load_file(export / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 15)
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(24)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, export / "model.safetensors")
    message = refused(export, tmp_path / "ours")
    assert "1 missing: model.norm.weight" in message
    assert "1 not known: model.layers.1.mlp.up_proj.bias" in message
    assert "1 misshaped: model.layers.0.mlp.up_proj.weight: [24, 15] instead of [24, 16]" in message
    assert f"1 wrong dtype: {name} int8" in message


def test_extra_keys_can_be_left_out_by_name(export, tmp_path):
    tensors = load_file(export / "model.safetensors")
    save_file(tensors | {"rotary.inv_freq": torch.ones(2)}, export / "model.safetensors")
    assert "ignore=" in refused(export, tmp_path / "ours")
    actions.from_published(export, tmp_path / "ours", CONFIG, None, Options(ignore=("rotary.*",)))


def test_float16_needs_an_explicit_cast(export, tmp_path):
    tensors = load_file(export / "model.safetensors")
    save_file({name: one.half() for name, one in tensors.items()}, export / "model.safetensors")
    assert "dtype=" in refused(export, tmp_path / "ours")
    outcome = actions.from_published(export, tmp_path / "ours", CONFIG, None, Options(dtype="float32"))
    assert outcome.config.dtype == "float32"


@pytest.mark.parametrize("num_bytes", [0, 4, 60, -1, -1000])
def test_a_truncated_file_is_refused(export, tmp_path, num_bytes):
    path = export / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, num_bytes if num_bytes >= 0 else size + num_bytes)
    assert "damaged or truncated" in refused(export, tmp_path / "ours")


def test_a_lying_header_is_refused(export, tmp_path):
    path = export / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[24,16]", b"[24,17]", 1))
    assert "damaged or truncated" in refused(export, tmp_path / "ours")


def test_a_missing_shard_and_a_wrong_index_are_refused(fresh, tmp_path):
    actions.to_published(fresh, tmp_path / "shards", "qwen3", Options(shard_bytes=5_000))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first, second = sorted(set(values["weight_map"].values()))[:2]
    assert values["metadata"]["total_size"] > 5_000
    moved = dict(values["weight_map"]) | {next(iter(values["weight_map"])): second}
    index.write_text(json.dumps({"weight_map": moved | {"ghost": first}}))
    assert "ghost is not in" in refused(tmp_path / "shards", tmp_path / "ours")
    index.write_text(json.dumps(values))
    (tmp_path / "shards" / first).unlink()
    assert first in refused(tmp_path / "shards", tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "cannot be converted"),
        ({"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"]}, "layout=emu35"),
        ({"tie_word_embeddings": True}, "untie=true"),
        ({"vocab_size": 500}, "vocab_size 500"),
        ({"rms_norm_eps": 1e-5, "hidden_act": "gelu"}, "model.rms_norm_eps=1e-05"),
        ({"rms_norm_eps": 1e-5, "hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_theta": 5e5}, "model.rope_theta=500000.0"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 4}, "model.num_query_groups=4"),
    ],
)
def test_a_config_of_another_model_is_refused(export, tmp_path, fields, expected):
    change(export, **fields)
    assert expected in refused(export, tmp_path / "ours")


def test_without_a_model_the_vocabulary_must_be_known(export, tmp_path):
    assert "model=NAME" in refused(export, tmp_path / "ours", config=None)


def test_a_tied_head_is_copied_on_request(export, tmp_path):
    change(export, tie_word_embeddings=True)
    tensors = load_file(export / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, export / "model.safetensors")
    assert "tied" in refused(export, tmp_path / "ours")
    actions.from_published(export, tmp_path / "ours", CONFIG, None, Options(untie=True))
    written = load_file(tmp_path / "ours" / "rank_00000.safetensors")
    embedding = written["model/embedding.word_embeddings.weight@0,0"]
    assert torch.equal(written["model/output_layer.weight@0,0"][:81], embedding[:81])
    change(export, tie_word_embeddings=False)
    assert "1 missing: lm_head.weight" in refused(export, tmp_path / "other")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, how):
    folder = tmp_path / "foreign"
    folder.mkdir()
    how({"weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    message = refused(folder, tmp_path / "ours")
    assert "was not run" in message
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="was not run"):
        vision.from_published(folder / "pytorch_model.bin", tmp_path / "ours", None, Options())
    assert not (tmp_path / "ran").exists()


def test_a_torch_file_of_tensors_is_read(export, fresh, tmp_path):
    torch.save(load_file(export / "model.safetensors"), export / "pytorch_model.bin")
    (export / "model.safetensors").unlink()
    actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())
    first, second = (load_file(one / "rank_00000.safetensors") for one in (fresh, tmp_path / "ours"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_destination_that_exists_is_left_alone(export, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("x")
    with pytest.raises(UserError, match="destination exists"):
        actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())
    assert (tmp_path / "ours" / "precious").read_text() == "x"


def test_a_newer_checkpoint_and_one_of_another_kind_are_refused(fresh, tmp_path):
    shutil.copytree(fresh, tmp_path / "newer")
    manifest = json.loads((fresh / "manifest.json").read_text())
    for fields, expected in (({"format_version": 2}, "format_version 2"), ({"kind": "vision_tokenizer"}, "layout=ibq")):
        publish_manifest(tmp_path / "newer", manifest | fields)
        with pytest.raises(UserError, match=expected):
            actions.to_published(tmp_path / "newer", tmp_path / "out", "emu35", Options())
    (tmp_path / "newer" / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(tmp_path / "newer" / "rank_00000.safetensors", 5_000)
    with pytest.raises(UserError, match="truncated"):
        actions.to_published(tmp_path / "newer", tmp_path / "out", "emu35", Options())
    assert not (tmp_path / "out").exists()


def test_a_layout_that_does_not_divide_the_model_is_refused(fresh, tmp_path):
    with pytest.raises(UserError, match="3 does not divide"):
        actions.reshard(fresh, tmp_path / "out", Options(tensor=3, pipeline=3))


def test_a_full_disk_is_told_and_the_rest_is_kept(export, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(descriptor, data, position):
        calls.append(position)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        actions.from_published(export, tmp_path / "ours", CONFIG, None, Options(threads=1))
    assert not (tmp_path / "ours").exists()
    monkeypatch.setattr(os, "pwrite", real)
    outcome = actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())
    assert outcome.result.resumed_bytes > 0


def test_a_disk_without_room_is_told_before_anything_is_written(export, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match="no room"):
        actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())


def test_bytes_that_read_back_differently_are_not_published(export, tmp_path, monkeypatch):
    real = os.preadv

    def flipped(descriptor, buffers, position):
        count = real(descriptor, buffers, position)
        if ".converting" in os.readlink(f"/proc/self/fd/{descriptor}") and position > 2_000:
            buffers[0][0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", flipped)
    with pytest.raises(UserError, match="reads back differently"):
        actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())
    assert not (tmp_path / "ours").exists()


def test_two_conversions_of_one_target_do_not_mix(export, tmp_path):
    with writer._locked(tmp_path / ".ours.converting"), pytest.raises(UserError, match="another process"):
        actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())


SLOW = """
import os, sys, time
from pathlib import Path
from model.conversion import actions, writer
real = os.pwrite
def slow(*arguments):
    time.sleep(0.004)
    return real(*arguments)
os.pwrite = slow
writer.BLOCK_BYTES = 512
source, target, layout = sys.argv[1:]
print("ready", flush=True)
actions.to_published(Path(source), Path(target), layout, actions.Options(shard_bytes=9_000, threads=2))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_killed_at_any_moment_it_goes_on_to_identical_output(fresh, tmp_path):
    code = [sys.executable, "-c", SLOW, str(fresh)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([*code, str(tmp_path / "whole"), "emu35"], check=True, env=environment, stdout=subprocess.DEVNULL)
    expected = contents(tmp_path / "whole")
    generator, target, num_killed = np.random.default_rng(0), tmp_path / "killed", 0
    for _ in range(10):
        process = subprocess.Popen([*code, str(target), "emu35"], env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(float(generator.uniform(0.0, 0.12)))
        process.send_signal(signal.SIGKILL)
        num_killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if target.exists():  # whole, or not there at all
            assert contents(target) == expected
            shutil.rmtree(target)
    assert num_killed >= 5
    journal = tmp_path / ".killed.converting" / "progress.jsonl"
    if journal.exists():
        with open(journal, "ab") as file:
            file.write(b"[99, [1")  # half a line
    shutil.rmtree(target, ignore_errors=True)
    actions_done = subprocess.run([*code, str(target), "emu35"], env=environment, capture_output=True, text=True)
    assert actions_done.returncode == 0, actions_done.stderr
    assert contents(target) == expected
    assert not list(tmp_path.glob(".*converting"))


def test_killed_after_publication_the_same_command_is_done(export, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_remove_work", lambda work: None)
    actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())
    monkeypatch.undo()
    assert (tmp_path / ".ours.converting").exists()
    # The command's own check comes first, as after a kill it must let the writer decide.
    actions.from_published(export, tmp_path / "ours", CONFIG, None, Options())
    assert not (tmp_path / ".ours.converting").exists()


@pytest.fixture
def codebook(tmp_path) -> Path:
    torch.manual_seed(1)
    save_file({"quantize.embedding.weight": torch.randn(9, 6)}, tmp_path / "codebook.safetensors")
    return tmp_path / "codebook.safetensors"


@pytest.mark.parametrize("rows", ["normal", "mean", "codebook"])
def test_surgery_copies_text_rows_and_makes_the_rest(tmp_path, codebook, rows):
    """A text model of 60 ids; ours has 40 text ids, then special, visual and padding rows."""
    text = ModelConfig(**{**vars(CONFIG), "vocabulary": VocabularyConfig(text_size=20, visual_size=8, pad_multiple=4)})
    actions.initialize(tmp_path / "text", text, Options(seed=5))
    actions.to_published(tmp_path / "text", tmp_path / "qwen3", "qwen3", Options())
    before = load_file(tmp_path / "qwen3" / "model.safetensors")
    chosen = SurgeryOptions(rows=rows, codebook=str(codebook), noise=0.25)
    for name in ("a", "b"):
        surgery.operate(tmp_path / "qwen3", tmp_path / name, CONFIG, "qwen3", Options(seed=7), chosen)
    after, again = (load_file(tmp_path / name / "rank_00000.safetensors") for name in ("a", "b"))
    assert all(torch.equal(after[name], again[name]) for name in after)
    for theirs, ours in (
        ("model.embed_tokens.weight", "model/embedding.word_embeddings.weight@0,0"),
        ("lm_head.weight", "model/output_layer.weight@0,0"),
    ):
        assert torch.equal(before[theirs][:40], after[ours][:40])
        assert after[ours].shape == (96, 16)
        assert torch.isfinite(after[ours]).all()
        new = after[ours][72:81]
        assert 0.2 < float(new.std() / before[theirs][:40].std()) < 2.5
        assert len(torch.unique(after[ours], dim=0)) == 96
    record = json.loads((tmp_path / "a" / "manifest.json").read_text())["conversion"]
    assert (record["copied_rows"], record["new_special_rows"], record["new_visual_rows"]) == (40, 32, 9)
    assert (record["padding_rows"], record["rows"], record["seed"]) == (15, rows, 7)


def test_new_rows_have_mean_and_covariance_of_the_text_rows():
    rows = 4000
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).numpy()
    values = (np.random.default_rng(0).normal(size=(rows, 6)) @ mixing + 3).astype(np.float32)

    from model.conversion.generated_tensors import rows_from
    from model.conversion.tensors import TensorInfo

    info = TensorInfo((rows, 6), "float32")
    source = rows_from("text", "table", info, lambda start, stop: values[start:stop], rows)
    target = TensorInfo((40_000, 6), "float32")
    make = surgery.new_rows("table", target, source, "table", rows, CONFIG, 0, SurgeryOptions(), None)
    new = rows_from("new", "table", target, make, surgery.NEW_ROWS)
    made = surgery.read_floats(new, "table", 0, 40_000)
    np.testing.assert_allclose(made.mean(0), values.mean(0), atol=0.15)
    np.testing.assert_allclose(np.cov(made.T), np.cov(values.T), atol=0.6)
    np.testing.assert_array_equal(surgery.read_floats(new, "table", 5_000, 7_010), made[5_000:7_010])


def test_surgery_refuses_a_codebook_of_another_size(tmp_path, export):
    save_file({"quantize.embedding.weight": torch.zeros(8, 6)}, tmp_path / "other.safetensors")
    chosen = SurgeryOptions(rows="codebook", codebook=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="with 9 rows"):
        surgery.operate(export, tmp_path / "out", CONFIG, "qwen3", Options(), chosen)


def test_what_a_killed_run_added_is_not_published(fresh, tmp_path, monkeypatch):
    """Killed while the certificate is flushed: its temporary is in the folder that becomes the target."""
    target = tmp_path / "out"

    def killed(folder, written):
        (folder / "parity.json.tmp-123").write_text("half")
        (folder / "text_tokenizer").mkdir()
        (folder / "text_tokenizer" / "stale.model").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actions.reshard(fresh, target, Options(extras=killed))
    assert (tmp_path / ".out.converting" / "output" / "parity.json.tmp-123").exists()
    result = actions.reshard(fresh, target, Options())
    assert result.result.resumed_bytes > 0
    assert sorted(path.name for path in target.rglob("*")) == ["manifest.json", "rank_00000.safetensors"]


def test_who_is_refused_removes_nothing_of_who_works(fresh, tmp_path):
    """The other one has the lock and has not written its plan yet."""
    target = tmp_path / "out"
    work = tmp_path / ".out.converting"
    with writer._locked(work):
        (work / "precious").write_text("x")
        with pytest.raises(UserError, match="another process"):
            actions.reshard(fresh, target, Options())
        assert (work / "precious").read_text() == "x"
    assert not work.exists()
    actions.reshard(fresh, target, Options())


def test_a_lock_whose_file_was_removed_locks_nothing(tmp_path, monkeypatch):
    """Between opening the file and locking it, its last holder removed it."""
    work, real = tmp_path / ".out.converting", writer.fcntl.flock
    removed = []

    def flock(descriptor, how):
        real(descriptor, how)
        if not removed:
            removed.append(shutil.rmtree(work))

    monkeypatch.setattr(writer.fcntl, "flock", flock)
    with writer._locked(work):
        monkeypatch.undo()
        assert (work / "lock").exists()
        with pytest.raises(UserError, match="another process"), writer._locked(work):
            pass


def test_many_converters_on_one_target(fresh, tmp_path):
    """One publishes, whoever is refused is told, nothing is left over."""
    code = (
        "import sys; from pathlib import Path; from model.conversion import actions; from model.errors import UserError\n"
        "try: actions.reshard(Path(sys.argv[1]), Path(sys.argv[2]), actions.Options())\n"
        "except UserError: sys.exit(2)"
    )
    call = [sys.executable, "-c", code, str(fresh), str(tmp_path / "out")]
    codes = [process.wait() for process in [subprocess.Popen(call) for _ in range(4)]]
    assert set(codes) <= {0, 2}
    assert 0 in codes
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
