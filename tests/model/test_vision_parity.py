"""The certificate of vision tokenizers: the plain reference against ours, and whatever the layout cannot say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.conversion import vision
from model.conversion.actions import Options
from model.conversion.vision_parity import certify
from model.errors import UserError
from model.vision_tokenizer import plain_reference
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.plain_reference import VisionSizes

SIZES = VisionTokenizerConfig(
    ch=32,
    ch_mult=[1, 1, 2],
    num_res_blocks=1,
    attn_resolutions=[8],
    resolution=32,
    z_channels=16,
    embed_dim=16,
    n_embed=64,
)
# Every field of ours that changes the function, with a value that the released code does not know.
OWN = {
    "patch_local_encoder": True,
    "cosine_similarity": True,
    "norm_groups": 16,
    "norm_scope": "pixel",
    "mid_attention": False,
    "padding_mode": "replicate",
    "encoder_kernel_sizes": [1, 3, 3],
}


def random_model(config: VisionTokenizerConfig, seed: int = 0) -> IBQ:
    torch.manual_seed(seed)
    model = IBQ(config).eval()
    for parameter in model.parameters():  # norms and biases too: ones and zeros would hide a swap
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_ours(folder: Path, model: IBQ) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    vision.from_published(folder, folder / "ours", model.config, Options())
    return folder / "ours"


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    ours = write_ours(tmp_path / "made", random_model(SIZES))
    vision.to_published(ours, tmp_path / "released", Options())
    return ours, tmp_path / "released"


def test_the_reference_gives_the_codes_and_pixels_of_the_model():
    model = random_model(SIZES).double()
    weights = dict(model.state_dict())
    sizes = VisionSizes.from_released(vision.class_config(SIZES)["ddconfig"])
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
    latents = plain_reference.latents(weights, sizes, images)
    assert torch.allclose(latents, model.latents(images).flatten(2).transpose(1, 2), atol=1e-9, rtol=1e-9)
    codes = plain_reference.code_scores(weights, latents).argmax(-1).view(2, 4, 6)
    assert torch.equal(codes, model.encode(images))
    expected = model.decode(codes)
    assert torch.allclose(
        plain_reference.decode(weights, sizes, codes), expected, atol=1e-9 * float(expected.abs().max())
    )


def test_equal_tokenizers_get_a_certificate(pair):
    certificate = certify(*pair, sizes=SIZES)
    assert certificate["passed"]
    assert certificate["functions"]["code_agreement"] == 1.0
    assert certificate["num_tensors"] == len(vision.expected_shapes(SIZES))


def test_every_field_of_ours_is_known_here():
    fields = {field.name for field in dataclasses.fields(VisionTokenizerConfig)}
    assert fields == {*OWN, *vision.NETWORK_FIELDS, *vision.CLASS_FIELDS, *vision.TRAINING_FIELDS}


@pytest.mark.parametrize("name", sorted(OWN))
def test_what_the_layout_cannot_say_is_refused_by_name_and_by_function(tmp_path, monkeypatch, name):
    """The list of fields refuses it; were the list wrong, the codes would."""
    config = dataclasses.replace(SIZES, **{name: OWN[name]})
    ours = write_ours(tmp_path / "made", random_model(config))
    with pytest.raises(UserError, match=f"structure of our own(.|\n)*{name}="):
        vision.to_published(ours, tmp_path / "released", Options())
    assert not (tmp_path / "released").exists()
    if name in ("mid_attention", "encoder_kernel_sizes"):  # other tensors: no released file can hold them
        return
    monkeypatch.setattr(vision, "check_released", lambda config, place: None)
    vision.to_published(ours, tmp_path / "released", Options())
    certificate = certify(ours, tmp_path / "released", sizes=config)
    assert certificate["num_different"] == 0
    assert not certificate["passed"]
    assert not certificate["functions"]["agree"]


def test_cosine_similarity_of_a_released_file_means_nothing(pair, tmp_path):
    """The released quantizer never looks at it: neither may we."""
    _, released = pair
    text = (released / "config.yaml").read_text()
    (released / "config.yaml").write_text(text.replace("cosine_similarity: false", "cosine_similarity: true"))
    (released / "nextstate" / "record.json").unlink()
    assert vision.find_config(released) == SIZES
    vision.from_published(released, tmp_path / "back", None, Options())
    assert certify(tmp_path / "back", released, sizes=SIZES)["passed"]


@pytest.mark.parametrize("change", ["double_z: true", "resamp_with_conv: false", "give_pre_end: true"])
def test_another_released_network_is_refused(pair, change):
    _, released = pair
    path = released / "config.yaml"
    (released / "nextstate" / "record.json").unlink()
    lines = [line for line in path.read_text().splitlines() if change.split(":")[0] not in line]
    path.write_text("\n".join(lines).replace("ddconfig:", f"ddconfig:\n  {change}"))
    with pytest.raises(UserError, match="no place"):
        vision.find_config(released)


def test_differences_and_nan_are_named(pair):
    ours, released = pair
    tensors = load_file(released / "model.safetensors")
    tensors["decoder.conv_out.bias"][1] += 1
    tensors["encoder.conv_in.bias"][0] = torch.nan
    save_file(tensors, released / "model.safetensors")
    certificate = certify(ours, released, sizes=SIZES)
    different = [name for name, one in certificate["tensors"].items() if not one["equal"]]
    assert sorted(different) == ["decoder.conv_out.bias", "encoder.conv_in.bias"]
    assert not certificate["passed"]


def test_a_cast_on_request_passes(pair, tmp_path):
    ours, _ = pair
    vision.to_published(ours, tmp_path / "cast", Options(dtype="bfloat16"))
    assert not certify(ours, tmp_path / "cast", sizes=SIZES)["passed"]
    assert certify(ours, tmp_path / "cast", sizes=SIZES, cast="bfloat16")["passed"]
