"""The IBQ tokenizer: published structure, index backpropagation against the formula, numpy wrapper."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from handmade_vision import save_vision_tokenizer

from model.errors import Problems, UserError
from model.vision_tokenizer import load_vision_tokenizer
from model.vision_tokenizer.config import VisionTokenizerConfig, ibq_emu35
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import codes_from_latents, codes_restarted, initialize_weights
from model.vision_tokenizer.losses import LossWeightsConfig, entropy_terms, pixel_weights, tokenizer_loss
from model.vision_tokenizer.quantizer import IndexBackpropagationQuantizer
from model.vision_tokenizer.wrapper import VisionTokenizer, fingerprint_of, to_model_range


def tiny_config(**changes):
    values = {
        "ch": 8,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [6],
        "resolution": 48,
        "z_channels": 8,
        "embed_dim": 8,
        "n_embed": 32,
        "norm_groups": 4,
    }
    return VisionTokenizerConfig(**(values | changes))


def tiny_model(seed=0, **changes):
    model = IBQ(tiny_config(**changes))
    initialize_weights(model, seed)
    return model


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return IBQ(ibq_emu35())


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_count(published):
    assert count(published) == 455_336_963
    assert count(published.encoder) == 184_533_760
    assert count(published.decoder) == 237_117_187
    assert count(published.quantize) == 131_072 * 256
    assert ibq_emu35().factor == 16


def test_published_keys_and_shapes(published):
    shapes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    expected = {
        "encoder.conv_in.weight": (256, 3, 3, 3),
        "encoder.down.0.block.3.conv2.bias": (256,),
        "encoder.down.0.downsample.conv.weight": (256, 256, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "encoder.down.4.attn.3.proj_out.weight": (1024, 1024, 1, 1),
        "encoder.mid.block_1.norm1.weight": (1024,),
        "encoder.mid.attn_1.q.weight": (1024, 1024, 1, 1),
        "encoder.mid.block_2.conv1.weight": (1024, 1024, 3, 3),
        "encoder.norm_out.weight": (1024,),
        "encoder.conv_out.weight": (256, 1024, 3, 3),
        "decoder.conv_in.weight": (1024, 256, 3, 3),
        "decoder.up.4.block.4.conv1.weight": (1024, 1024, 3, 3),
        "decoder.up.4.attn.4.norm.weight": (1024,),
        "decoder.up.4.upsample.conv.weight": (1024, 1024, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (512, 1024, 1, 1),
        "decoder.up.0.block.4.conv2.weight": (256, 256, 3, 3),
        "decoder.conv_out.weight": (3, 256, 3, 3),
        "quantize.embedding.weight": (131_072, 256),
        "quant_conv.weight": (256, 256, 1, 1),
        "post_quant_conv.bias": (256,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = (
        "encoder.down.4.downsample.conv.weight",
        "decoder.up.0.upsample.conv.weight",
        "encoder.down.3.attn.0.q.weight",
        "encoder.down.0.block.0.nin_shortcut.weight",
    )
    assert not set(absent) & shapes.keys()
    assert all(
        name.split(".")[0] in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv") for name in shapes
    )


@pytest.mark.parametrize("cosine", [False, True])
def test_every_code_gets_the_softmax_gradient(cosine):
    torch.manual_seed(0)
    config = tiny_config(n_embed=7, embed_dim=3, cosine_similarity=cosine, logit_scale=1.5)
    quantizer = IndexBackpropagationQuantizer(config).double()
    latents = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    incoming = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    quantized = quantizer(latents)
    (quantized.values * incoming).sum().backward()
    got = quantizer.embedding.weight.grad

    table = quantizer.embedding.weight.detach().clone()
    norms = table.norm(dim=1, keepdim=True) if cosine else torch.ones(7, 1, dtype=torch.float64)
    unit = table / norms
    expected = torch.zeros_like(table)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    flat = flat / flat.norm(dim=1, keepdim=True) if cosine else flat
    for z, g in zip(flat, incoming.permute(0, 2, 3, 1).reshape(-1, 3), strict=True):
        logits = torch.stack([1.5 * torch.dot(z, code) for code in unit])
        soft = logits.exp() / logits.exp().sum()
        inner = unit @ g
        expected[int(logits.argmax())] += g  # the value is the chosen code
        for k in range(7):  # and the gradient is the softmax's
            expected[k] += 1.5 * soft[k] * (inner[k] - (soft * inner).sum()) * z
    if cosine:  # through the projection on the unit sphere
        expected = (expected - unit * (unit * expected).sum(dim=1, keepdim=True)) / norms
    torch.testing.assert_close(got, expected)
    assert (got.abs().sum(dim=1) > 0).all()


def test_quantization_loss_and_value():
    torch.manual_seed(1)
    quantizer = IndexBackpropagationQuantizer(tiny_config(n_embed=5, embed_dim=4))
    latents = torch.randn(1, 4, 3, 2)
    quantized = quantizer(latents)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    codes = (flat @ quantizer.embedding.weight.t()).argmax(dim=1)
    chosen = quantizer.embedding.weight[codes]
    assert torch.equal(quantized.codes.flatten(), codes)
    assert torch.equal(quantizer.encode(latents), quantized.codes)
    torch.testing.assert_close(quantized.values, quantizer.lookup(quantized.codes))
    torch.testing.assert_close(quantized.loss, (2 + 0.25) * (chosen - flat).square().mean())


def test_entropy_terms_of_known_distributions():
    certain_and_even = 50.0 * torch.eye(4)
    loss, of_choice, of_batch = entropy_terms(certain_and_even, LossWeightsConfig())
    assert of_choice < 1e-6
    assert of_batch.item() == pytest.approx(np.log(4), rel=1e-5)
    assert loss.item() == pytest.approx(-np.log(4), rel=1e-5)


def test_loss_weights_contrast_and_takes_further_terms():
    images = torch.full((1, 3, 4, 4), 0.9)
    images[:, :, 0, 0] = -0.9
    weights = pixel_weights(images, contrast=3.0)
    assert (weights[0, 0, 0, 0].item(), weights[0, 0, 3, 3].item()) == pytest.approx((4.0, 1.0))
    config = LossWeightsConfig(l1=1.0, l2=0.0)
    extra = {"perceptual": (0.5, lambda a, b: (a - b).abs().max())}
    total, terms = tokenizer_loss(images, torch.zeros_like(images), None, config, extra)
    assert terms["perceptual"].item() == pytest.approx(0.9)
    assert total.item() == pytest.approx(0.9 + 0.45)


def test_the_weighted_mean_of_a_batch_is_that_of_its_parts():
    images, config = torch.rand(6, 3, 8, 8) * 2 - 1, LossWeightsConfig(contrast=3.0)
    images[:2] = 0.5  # flat pictures: their part of the batch weighs less
    rebuilt = torch.rand_like(images)
    whole, _ = tokenizer_loss(images, rebuilt, None, config)
    mean_weight = pixel_weights(images, config.contrast).mean().item()
    parts = [
        tokenizer_loss(images[i : i + 2], rebuilt[i : i + 2], None, config, None, mean_weight)[0] for i in (0, 2, 4)
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)
    assert tokenizer_loss(images[:2], rebuilt[:2], None, config)[0].item() > 1.5 * parts[0].item()


@pytest.mark.parametrize("sides", [(48, 48), (24, 24), (16, 40)])
def test_wrapper_round_trip_shapes(sides):
    model = tiny_model()
    tokenizer = VisionTokenizer(model, fingerprint_of(model))
    images = np.random.default_rng(0).integers(0, 256, (3, *sides, 3), dtype=np.uint8)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, sides[0] // 8, sides[1] // 8)
    assert codes.dtype == np.int64
    assert codes.max() < tokenizer.codebook_size
    pixels = tokenizer.decode(codes)
    assert pixels.shape == images.shape
    assert pixels.dtype == np.uint8
    assert tokenizer.encode(images[:0]).shape == (0, sides[0] // 8, sides[1] // 8)


def test_local_configuration_sees_only_nearby_pixels():
    model = tiny_model(
        norm_scope="pixel",
        padding_mode="replicate",
        mid_attention=False,
        attn_resolutions=[],
        encoder_kernel_sizes=[3, 3, 1, 1],
    )
    images = torch.randn(1, 3, 48, 48)
    changed = images.clone()
    changed[:, :, 32:, 32:] = 0.0
    before, after = model.latents(images), model.latents(changed)
    assert torch.equal(before[:, :, :2, :2], after[:, :, :2, :2])
    assert not torch.equal(before[:, :, 4:, 4:], after[:, :, 4:, 4:])


def test_codes_from_latents_find_rare_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(6, 4, generator=generator)
    sizes = torch.tensor([500, 3, 3, 3, 3, 3])
    latents = centers.repeat_interleave(sizes, dim=0)
    latents = latents + 0.01 * torch.randn(latents.shape, generator=generator)
    codes = codes_from_latents(latents, 12, 3, seed=1)
    assert torch.cdist(centers, codes).min(dim=1).values.max() < 0.1
    few = codes_from_latents(latents[:1], 4, 2, seed=1)
    assert few.unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_that_no_latent_takes_move_to_latents_that_have_none(cosine):
    generator = torch.Generator().manual_seed(0)
    latents = torch.eye(6).repeat_interleave(torch.tensor([5000, 3000, 3, 3, 3, 3]), dim=0)
    latents = torch.nn.functional.normalize(latents + 0.01 * torch.randn(latents.shape, generator=generator), dim=1)
    quantizer = tiny_model(n_embed=12, embed_dim=6, cosine_similarity=cosine).quantize
    with torch.no_grad():
        quantizer.embedding.weight.fill_(-1.0)  # behind all of them
        quantizer.embedding.weight[4], quantizer.embedding.weight[9] = 3 * torch.eye(6)[0], 3 * torch.eye(6)[1]
    before = quantizer.embedding.weight.detach().clone()
    codes = codes_restarted(latents, quantizer, seed=1)
    taken = [4, 9]
    assert torch.equal(codes[taken], before[taken])
    moved = [index for index in range(12) if index not in taken]
    assert torch.cdist(codes[moved], latents).min(dim=1).values.max() == 0
    assert torch.cdist(torch.eye(6)[2:], codes).min(dim=1).values.max() < 0.1
    assert torch.equal(codes_restarted(latents, quantizer, seed=1), codes)
    assert not torch.equal(codes_restarted(latents, quantizer, seed=2), codes)
    assert torch.equal(quantizer.embedding.weight, before)
    few = latents[:1].repeat(5, 1)  # fewer latents than free codes
    assert torch.equal(codes_restarted(few, quantizer, seed=1)[[0, 1, 2]], few[:3])
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.cat((torch.eye(6), latents[:6])))
    every = torch.cat((torch.eye(6), latents[:6]))
    assert torch.equal(codes_restarted(every, quantizer, seed=1), quantizer.embedding.weight)


def test_initial_weights_are_a_function_of_the_seed():
    assert fingerprint_of(tiny_model(3)) == fingerprint_of(tiny_model(3))
    assert fingerprint_of(tiny_model(3)) != fingerprint_of(tiny_model(4))


def test_loads_from_a_checkpoint(tmp_path):
    model = tiny_model()
    save_vision_tokenizer(tmp_path, model)
    tokenizer = load_vision_tokenizer(tmp_path)
    assert tokenizer.fingerprint == fingerprint_of(model)
    images = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    direct = VisionTokenizer(model.channels_last(), "").encode(images)
    assert np.array_equal(tokenizer.encode(images), direct)


def test_foreign_checkpoints_are_refused(tmp_path):
    model = tiny_model()
    save_vision_tokenizer(tmp_path, model, kind="transformer")
    with pytest.raises(UserError, match="not a vision tokenizer"):
        load_vision_tokenizer(tmp_path)
    save_vision_tokenizer(tmp_path, model, model=dataclasses.asdict(tiny_config(n_embed=33, num_res_blocks=2)))
    with pytest.raises(UserError) as caught:
        load_vision_tokenizer(tmp_path)
    assert "quantize.embedding.weight: (32, 8) instead of (33, 8)" in str(caught.value)
    assert "missing: encoder.down.0.block.1.norm1.weight" in str(caught.value)


def test_validation_collects_all_problems():
    problems = Problems()
    tiny_config(ch=6, beta=0.25, norm_scope="row", encoder_kernel_sizes=[3, 5]).validate(problems)
    text = "\n".join(problems.found)
    for key in ("model.norm_groups", "model.norm_scope", "model.encoder_kernel_sizes"):
        assert key in text


def test_a_patch_local_code_depends_on_its_own_patch_only():
    config = VisionTokenizerConfig(
        ch=8,
        ch_mult=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[],
        resolution=8,
        z_channels=4,
        embed_dim=4,
        n_embed=16,
        norm_groups=2,
        norm_scope="pixel",
        mid_attention=False,
        patch_local_encoder=True,
    )
    torch.manual_seed(0)
    model = IBQ(config)
    images = torch.rand(2, 3, 6, 8) * 2 - 1
    before = model.latents(images)
    assert before.shape == (2, 4, 3, 4)
    changed = images.clone()
    changed[1, :, 2:4, 4:6] = 0.0
    differs = (model.latents(changed) != before).any(dim=1)
    assert differs.nonzero().tolist() == [[1, 1, 2]]
    moved = torch.roll(images, (2, 4), dims=(2, 3))
    torch.testing.assert_close(model.latents(moved), torch.roll(before, (1, 2), dims=(2, 3)))


def test_equal_patches_are_encoded_once(monkeypatch):
    model = tiny_model(
        norm_scope="pixel", padding_mode="replicate", mid_attention=False, attn_resolutions=[], patch_local_encoder=True
    ).channels_last()
    tokenizer, side = VisionTokenizer(model, ""), model.config.factor
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    kinds[1] = kinds[0]
    kinds[1, 0, 0, 0] ^= 1  # one bit apart
    chosen = rng.integers(0, len(kinds), (3, 4, 6))
    images = kinds[chosen].transpose(0, 1, 3, 2, 4, 5).reshape(3, 4 * side, 6 * side, 3)
    direct = model.encode(to_model_range(images)).numpy()
    encoded = []
    monkeypatch.setattr(model, "encode", lambda pixels: encoded.append(len(pixels)) or IBQ.encode(model, pixels))
    assert np.array_equal(tokenizer.encode(images), direct)
    assert encoded == [len(np.unique(chosen))]
    assert tokenizer.encode(images[:0]).shape == (0, 4, 6)
