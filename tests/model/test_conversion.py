"""Conversion: the tables, bitwise round trips, every refusal."""

import dataclasses
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from handmade_checkpoints import publish_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.checkpoint.checksums import join_crc32
from model.checkpoint.reader import CheckpointReader
from model.config import ModelConfig
from model.conversion import actions, vision
from model.conversion.actions import Options
from model.conversion.compare import compare
from model.conversion.mappings import LAYOUTS, OUR_RULES, mapped_tensors
from model.conversion.tensors import cast_rows
from model.errors import UserError
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vocabulary import Vocabulary, VocabularyConfig
from training.reliability.checkpoint import find_damage

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,
    vocabulary=VocabularyConfig(text_size=60, visual_size=9, pad_multiple=16),
)
IBQ_SMALL = VisionTokenizerConfig(
    ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[8], resolution=16, z_channels=8, embed_dim=8, n_embed=32
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "checkpoint"
    actions.initialize(folder, SMALL, Options(seed=3))
    return folder


@pytest.fixture(scope="module")
def export(fresh, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "emu35"
    actions.to_published(fresh, folder, "emu35", Options())
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.read_full(name) for name in reader.keys()}  # noqa: SIM118


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def qwen3(path: Path, **changes) -> transformers.Qwen3ForCausalLM:
    """Random weights of transformers' own model, saved by it."""
    torch.manual_seed(0)
    sizes = Vocabulary.from_config(SMALL.vocabulary)
    config = transformers.Qwen3Config(
        **{
            "vocab_size": sizes.size,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": False,
        }
        | changes
    )
    model = transformers.Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # norms too: ones would hide a swap
        torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return model


def test_the_tables_name_the_parameters_of_the_model():
    from model.backbone.transformer import build_model
    from model.parallel import groups
    from model.parallel.sharding import logical_parameters

    groups.initialize(rank=0, world_size=1)
    try:
        built = logical_parameters(build_model(SMALL, device="meta"))
        expected = {one.name: one.global_shape for one in built.values()}
    finally:
        groups.destroy()
    assert {one.ours: one.our_shape for one in mapped_tensors(OUR_RULES, SMALL)} == expected


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_row_of_a_table_moves_once_in_both_directions(name):
    for one in mapped_tensors(LAYOUTS[name].rules, SMALL):
        taken = [(index, start + i) for index, start, count in one.runs for i in range(count)]
        there = [(i, row) for i, (_, shape) in enumerate(one.theirs) for row in range(shape[0])]
        assert sorted(taken) == there
        for index in range(len(one.theirs)):
            back = [taken[start + i] for start, count in one.inverse(index) for i in range(count)]
            assert back == [(index, row) for row in range(one.theirs[index][1][0])]


def test_fresh_weights_are_those_that_training_starts_from(fresh):
    from model.backbone.transformer import build_model
    from model.parallel import groups
    from model.parallel.sharding import load_weights, logical_parameters

    assert find_damage(fresh) == ""
    groups.initialize(rank=0, world_size=1)
    try:
        drawn, loaded = build_model(SMALL, seed=3), build_model(SMALL)
        with CheckpointReader(fresh) as reader:
            load_weights(loaded, reader)
        others = dict(loaded.named_parameters())
        assert logical_parameters(drawn).keys() == others.keys()
        for name, parameter in drawn.named_parameters():
            assert torch.equal(parameter, others[name]), name
    finally:
        groups.destroy()


@pytest.mark.parametrize(
    ("tensor", "pipeline"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)]
)
def test_every_layout_gives_the_same_bits_back(fresh, tmp_path, tensor, pipeline):
    split, one_file = Options(tensor=tensor, pipeline=pipeline), Options()
    actions.reshard(fresh, tmp_path / "split", split)
    assert len(list((tmp_path / "split").glob("rank_*"))) == tensor * pipeline
    actions.to_published(tmp_path / "split", tmp_path / "emu35", "emu35", Options(shard_bytes=20_000))
    actions.from_published(tmp_path / "emu35", tmp_path / "back", None, None, split)
    actions.reshard(tmp_path / "back", tmp_path / "whole", one_file)
    for name in ("split", "back", "whole"):
        assert find_damage(tmp_path / name) == ""
        assert_same(weights(fresh), weights(tmp_path / name))
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (fresh, tmp_path / "whole"))
    assert first["files"] == second["files"]


def test_resharded_files_hold_what_each_rank_of_training_holds(fresh, tmp_path):
    """Rank 1 of 2: the second half of each group's rows, of both halves of the MLP, and of the columns."""
    actions.reshard(fresh, tmp_path / "split", Options(tensor=2))
    whole, part = weights(fresh), load_file(tmp_path / "split" / "rank_00001.safetensors")
    layer = "model/decoder.layers.0."
    qkv = whole[layer + "self_attention.linear_qkv.weight"]
    assert torch.equal(part[f"{layer}self_attention.linear_qkv.weight@48,0"], qkv[48:])
    up = whole[layer + "mlp.linear_fc1.weight"]
    assert torch.equal(part[f"{layer}mlp.linear_fc1.weight@20,0"], up[20:40])
    assert torch.equal(part[f"{layer}mlp.linear_fc1.weight@60,0"], up[60:])
    down = whole[layer + "mlp.linear_fc2.weight"]
    assert torch.equal(part[f"{layer}mlp.linear_fc2.weight@0,20"], down[:, 20:])
    assert not any("norm" in name for name in part)


def test_optimizer_state_moves_with_its_weights(fresh, tmp_path):
    """Moments cut at odd elements, as the distributed optimizer writes them."""
    manifest = json.loads((fresh / "manifest.json").read_text())
    key = "model/decoder.layers.0.mlp.linear_fc2.weight"
    moment = torch.randn(24, 40)
    name = key.replace("model/", "optimizer/exp_avg/")
    parts = {
        "a": ((0, 0), moment[:7]),
        "b": ((7, 0), moment[7:8, :13]),
        "c": ((7, 13), moment[7:8, 13:]),
        "d": ((8, 0), moment[8:]),
    }
    folder = tmp_path / "trained"
    folder.mkdir()
    os.link(fresh / "rank_00000.safetensors", folder / "rank_00000.safetensors")
    tensors = {part: value.contiguous() for part, (_, value) in parts.items()}
    save_file(tensors | {"step": torch.tensor([5])}, folder / "optimizer.safetensors")
    pieces = [
        {"file": "optimizer.safetensors", "name": part, "offset": list(offset), "shape": list(value.shape)}
        for part, (offset, value) in parts.items()
    ]
    step = {"file": "optimizer.safetensors", "name": "step", "offset": [0], "shape": [1]}
    manifest["keys"][name] = {"global_shape": [24, 40], "dtype": "float32", "pieces": pieces}
    manifest["keys"]["optimizer/step"] = {"global_shape": [1], "dtype": "int64", "pieces": [step]}
    publish_manifest(folder, manifest)
    actions.reshard(folder, tmp_path / "split", Options(tensor=4, pipeline=2))
    found = weights(tmp_path / "split")
    assert torch.equal(found[name], moment)
    assert found["optimizer/step"].tolist() == [5]
    assert_same(weights(folder), found)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 8, "num_key_value_heads": 2}, {"num_key_value_heads": 8}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qwen3_comes_back_bit_by_bit(tmp_path, changes, dtype):
    model = qwen3(tmp_path / "qwen3", dtype=str(dtype).removeprefix("torch."), **changes)
    model.to(dtype).save_pretrained(tmp_path / "qwen3")
    config = dataclasses.replace(
        SMALL, head_dim=changes.get("head_dim", 6), num_query_groups=changes.get("num_key_value_heads", 4)
    )
    actions.from_published(tmp_path / "qwen3", tmp_path / "ours", config, "qwen3", Options(tensor=2))
    actions.to_published(tmp_path / "ours", tmp_path / "back", "qwen3", Options(shard_bytes=10_000))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is transformers.Qwen3ForCausalLM
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        # Loaded from the folder too: `to` casts the model's rotary table along with its weights.
        first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
        assert torch.equal(first(tokens).logits, again(tokens).logits)


def test_the_released_layout_has_the_published_keys_and_fields(export):
    found = load_file(export / "model.safetensors")
    assert len(found) == 3 + 11 * SMALL.num_layers
    assert found["model.embed_tokens.weight"].shape == (101, 24)
    assert found["model.layers.3.self_attn.q_norm.weight"].shape == (6,)
    config = json.loads((export / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("Emu3", ["Emu3ForCausalLM"])
    fields = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "img_token_id",
        "boi_token_id",
        "eoi_token_id",
        "eol_token_id",
        "eof_token_id",
        "image_area",
        "pretraining_tp",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "attention_dropout",
    ]
    assert set(fields) <= config.keys()
    assert config["vocab_size"] == 101
    assert (export / "generation_config.json").is_file()


def test_the_published_vocabulary_is_padded_and_unpadded():
    published = VocabularyConfig(preset="emu35", pad_multiple=1024)
    config = dataclasses.replace(SMALL, vocabulary=published)
    one = next(mapped_tensors(LAYOUTS["emu35"].rules, config))
    assert one.theirs[0][1][0] == 282_926
    assert (one.our_shape[0], one.num_padding_rows) == (283_648, 722)


def test_padding_rows_are_deterministic_without_a_record(fresh, export, tmp_path):
    import shutil

    shutil.copytree(export, tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain" / "nextstate")
    actions.from_published(tmp_path / "plain", tmp_path / "a", SMALL, "emu35", Options(seed=3))
    assert_same(weights(fresh), weights(tmp_path / "a"))  # the seed of the fresh weights
    actions.from_published(tmp_path / "plain", tmp_path / "b", SMALL, "emu35", Options(seed=4))
    first, second = (weights(fresh)["model/output_layer.weight"], weights(tmp_path / "b")["model/output_layer.weight"])
    assert torch.equal(first[:101], second[:101])
    assert not torch.equal(first[101:], second[101:])


def test_emu3_has_no_head_norms(fresh, tmp_path):
    torch.manual_seed(0)
    config = transformers.Emu3TextConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = transformers.Emu3ForCausalLM(config)
    model.save_pretrained(tmp_path / "emu3")
    ours = dataclasses.replace(SMALL, hidden_size=48)
    outcome = actions.from_published(tmp_path / "emu3", tmp_path / "ours", ours, "emu3", Options())
    assert "another function" in outcome.notes[0]
    actions.to_published(tmp_path / "ours", tmp_path / "back", "emu3", Options())
    again = transformers.Emu3ForCausalLM.from_pretrained(tmp_path / "back")
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    actions.from_published(tmp_path / "back", tmp_path / "again", None, None, Options())
    assert_same(weights(tmp_path / "ours"), weights(tmp_path / "again"))


def test_emu3_refuses_to_drop_head_norms_that_do_something(tmp_path):
    qwen3(tmp_path / "qwen3")
    actions.from_published(tmp_path / "qwen3", tmp_path / "ours", SMALL, None, Options())
    with pytest.raises(UserError, match="no place for the norms"):
        actions.to_published(tmp_path / "ours", tmp_path / "emu3", "emu3", Options())


def test_a_cast_rounds_to_nearest_even_as_torch_does():
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3.4e38, 1e-40, 1.00390625, 1.01171875])
    values = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-30, 30, (5000,)), special])
    for source, target in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ):
        given_values = values.to(source)
        rows = given_values.view(torch.uint8).numpy().reshape(1, -1)
        found = cast_rows(rows, str(source)[6:], str(target)[6:])
        got = torch.from_numpy(np.ascontiguousarray(found).reshape(-1)).view(target)
        assert torch.equal(got, given_values.to(target)) or torch.allclose(
            got, given_values.to(target), rtol=0, atol=0, equal_nan=True
        )


def test_dtype_casts_on_request_only(fresh, tmp_path):
    actions.to_published(fresh, tmp_path / "cast", "qwen3", Options(dtype="bfloat16"))
    name = "model.layers.0.mlp.up_proj.weight"
    kept = weights(fresh)["model/decoder.layers.0.mlp.linear_fc1.weight"][40:]
    assert torch.equal(load_file(tmp_path / "cast" / "model.safetensors")[name], kept.bfloat16())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_join(first, second):
    joined = join_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


@pytest.mark.parametrize("config", [IBQ_SMALL, VisionTokenizerConfig()])
def test_the_ibq_table_is_that_of_the_module(config):
    with torch.device("meta"):
        expected = {name: tuple(one.shape) for name, one in IBQ(config).state_dict().items()}
    assert vision.expected_shapes(config) == expected


def test_ibq_goes_out_as_released_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = IBQ(IBQ_SMALL)
    from omegaconf import OmegaConf

    (tmp_path / "released").mkdir()
    vision.write_class_config(tmp_path / "released" / "config.yaml", IBQ_SMALL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "released" / "model.ckpt")
    vision.from_published(tmp_path / "released", tmp_path / "ours", None, Options())
    assert find_damage(tmp_path / "ours") == ""
    vision.to_published(tmp_path / "ours", tmp_path / "back", Options())
    state = torch.load(tmp_path / "back" / "model.ckpt", weights_only=True)
    assert_same(dict(model.state_dict()), state)
    model.load_state_dict(state, strict=True)
    released = OmegaConf.load(tmp_path / "back" / "config.yaml")
    assert set(released) == {"ddconfig", "n_embed", "embed_dim", "beta", "cosine_similarity", "use_entropy_loss"}
    assert released.ddconfig.double_z is False
    (tmp_path / "back" / "nextstate" / "record.json").unlink()
    vision.from_published(tmp_path / "back", tmp_path / "again", None, Options())
    assert_same(weights(tmp_path / "ours"), weights(tmp_path / "again"))
    assert compare(tmp_path / "ours", tmp_path / "back", "ibq")["passed"]
    from model.vision_tokenizer import load_vision_tokenizer

    pictures = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    codes = load_vision_tokenizer(tmp_path / "again").encode(pictures)
    plain = model.eval().encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    assert np.array_equal(codes, plain.numpy())


def test_ibq_with_structure_of_our_own_is_not_exported(tmp_path):
    config = dataclasses.replace(IBQ_SMALL, norm_scope="pixel")
    torch.save(IBQ(config).state_dict(), tmp_path / "model.ckpt")
    vision.from_published(tmp_path / "model.ckpt", tmp_path / "ours", config, Options())
    with pytest.raises(UserError, match="norm_scope=pixel"):
        vision.to_published(tmp_path / "ours", tmp_path / "out", Options())


def test_compare_names_the_tensor_that_differs(fresh, export, tmp_path):
    import shutil

    assert compare(fresh, export, "emu35")["passed"]
    shutil.copytree(export, tmp_path / "changed")
    tensors = load_file(export / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 4] += 1e-6
    del tensors["model.norm.weight"]
    save_file(tensors | {"extra": torch.ones(1)}, tmp_path / "changed" / "model.safetensors")
    found = compare(fresh, tmp_path / "changed", "emu35")
    assert not found["passed"]
    assert found["different"] == ["model.layers.2.self_attn.k_proj.weight"]
    assert (found["missing"], found["extra"]) == (["model.norm.weight"], ["extra"])
