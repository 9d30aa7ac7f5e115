"""The adversary, the perceptual distance and the distillation: each against its formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.errors import UserError
from model.vision_tokenizer.discriminator import (
    AdversarialConfig,
    PatchDiscriminator,
    adaptive_weight,
    hinge_generator_loss,
    hinge_loss,
    initialize_discriminator,
    lecam_regularisation,
    non_saturating_generator_loss,
)
from model.vision_tokenizer.perceptual import (
    Distillation,
    PerceptualConfig,
    PerceptualLoss,
    VGG16Features,
    load_network,
)


def test_hinge_losses_of_known_logits() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert hinge_generator_loss(fake).item() == pytest.approx(1.0)


def test_non_saturating_and_lecam_of_known_logits() -> None:
    fake = torch.tensor([[[[2.0, 0.0]]], [[[-3.0, 1.0]]]])  # means of the images: 1 and -1
    expected = 0.5 * (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(1.0)))
    assert non_saturating_generator_loss(fake).item() == pytest.approx(expected, rel=1e-6)
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    # Real logits above the average of fakes, fake logits below the average of reals.
    assert lecam_regularisation(real, fake, 0.5, -1.0).item() == pytest.approx((9.0 + 1.0) / 2 + (3.5**2 + 0.0) / 2)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = torch.tensor([3.0, -1.0], requires_grad=True)
    first, second = (2 * layer).sum(), (layer * torch.tensor([3.0, 4.0])).sum()
    got = adaptive_weight(first, second, layer)
    assert got.item() == pytest.approx(8**0.5 / (5 + 1e-4))
    assert not got.requires_grad
    assert adaptive_weight(1e9 * first, 1e-9 * second, layer).item() == 1e4
    first.backward()  # the graph is still there


def test_the_discriminator_has_the_published_structure_and_patch() -> None:
    model = PatchDiscriminator(AdversarialConfig(weight=1.0))
    # 64, 128, 256, 512 channels of 4 x 4 and one logit: 2,768,705 with two numbers a channel of three norms.
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
    assert sum(p.numel() for p in model.parameters()) == convolutions + 2 * (128 + 256 + 512)
    initialize_discriminator(model, 0)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    for layer in model.main:
        if isinstance(layer, nn.BatchNorm2d):  # over the whole image: it would widen the patch
            layer.forward = lambda x: x  # type: ignore[method-assign]
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    model(images)[0, 0, 7, 7].backward()
    seen = images.grad.abs().sum((0, 1)).nonzero()  # type: ignore[union-attr]
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]  # the 70 x 70 PatchGAN


class SmallFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        first = torch.relu(self.first(images))
        return [first, torch.relu(self.second(first))]


def write_weights(path: Path) -> None:
    torch.manual_seed(0)
    linear = {"lin0.weight": torch.rand(1, 4, 1, 1), "lin1.weight": torch.rand(1, 6, 1, 1)}
    save_file(SmallFeatures().state_dict() | linear, path)


def small_config(path: Path) -> PerceptualConfig:
    return PerceptualConfig(1.0, f"{__name__}.SmallFeatures", str(path))


def test_the_perceptual_distance_is_that_of_lpips(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    loss = PerceptualLoss.load(small_config(tmp_path / "w.safetensors"), "key")
    a, b = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12, requires_grad=True)
    expected = torch.zeros(())
    for index, (fa, fb) in enumerate(zip(loss.backbone(a), loss.backbone(b), strict=True)):
        na, nb = (f / (f.pow(2).sum(1, keepdim=True) + 1e-10).sqrt() for f in (fa, fb))
        channel = loss.channel_weights[index]
        assert (channel >= 0).all()
        per_pixel = torch.einsum("bchw,c->bhw", (na - nb) ** 2, channel)
        expected = expected + per_pixel.mean()
    got = loss(a, b)
    torch.testing.assert_close(got, expected)
    assert loss(a, a).item() == 0
    got.backward()
    assert b.grad is not None
    assert b.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_vgg16_has_torchvisions_keys_and_five_maps() -> None:
    with torch.device("meta"):
        network = VGG16Features()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # Sum of 9 * in * out + out over the 13 convolutions of configuration D (arXiv 1409.1556, Table 1).
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 14_714_688
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    with torch.device("meta"):
        maps = network(torch.zeros(1, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [
        (64, 64, 64),
        (128, 32, 32),
        (256, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
    ]


class Teacher(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images, 8)


def test_distillation_trains_the_decoders_features_towards_the_teacher() -> None:
    torch.manual_seed(0)
    distillation = Distillation(Teacher(), 5, 3, seed=0)
    images, features = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 8, 8, requires_grad=True)
    first = distillation(images, features)
    assert 0 < first.item() < 2
    first.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    assert distillation.projection.weight.grad is not None
    optimizer = torch.optim.Adam([*distillation.projection.parameters(), features], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = distillation(images, features)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first.item()
    same = Distillation(Teacher(), 3, 3, seed=0)
    with torch.no_grad():
        same.projection.weight.copy_(torch.eye(3)[:, :, None, None])
    assert same(images, 7 * Teacher()(images)).item() == pytest.approx(0, abs=1e-6)


def test_networks_that_cannot_be_loaded_are_the_users(tmp_path: Path) -> None:
    for path in ("nothing", "no.such.module.f", "model.errors.nothing"):
        with pytest.raises(UserError, match="no such network"):
            load_network(path, None, "key")
    with pytest.raises(UserError, match="cannot be read"):
        load_network(f"{__name__}.SmallFeatures", str(tmp_path / "absent"), "key")
    (tmp_path / "pickle").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_network(f"{__name__}.SmallFeatures", str(tmp_path / "pickle"), "key")
    save_file({"first.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other")
    with pytest.raises(UserError, match=r"first\.bias: missing"):
        load_network(f"{__name__}.SmallFeatures", str(tmp_path / "other"), "key")
