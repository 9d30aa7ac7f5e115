"""Paths and the sampler against an exact denoiser: what is lost here is lost by the sampler alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from exact_denoiser import CODES, COLOURS, TEXTURES, Rows, clustered_codebook, likelihood

from model.errors import UserError
from model.generation.calibration import calibrate_path
from model.generation.decoding_config import DenoiseConfig
from model.generation.denoise import step_times
from model.generation.paths import DiscretePath, FromReferencePath, MaskPath, MetricPath, UniformPath, behind, make_path


@dataclass(frozen=True)
class EulerPath(UniformPath):
    """The uniform mixture with the step of its velocity, to compare the exact step with."""

    def step(self, state, drawn, time, next_time, uniforms):  # type: ignore[no-untyped-def]
        jumps = uniforms[0] < 1 - torch.exp(torch.tensor(-(next_time - time) / (1 - time)))
        return torch.where(jumps, drawn, state)


@dataclass(frozen=True)
class SpreadPath(MaskPath):
    """Column by column: no two cells of a row in one step while that is possible."""

    def step(self, state, drawn, time, next_time, uniforms):  # type: ignore[no-untyped-def]
        width = round(state.shape[1] ** 0.5)
        place = torch.arange(state.shape[1])
        order = (place % width * width + place // width).double() / state.shape[1]
        return super().step(state, drawn, time, next_time, order.expand(2, *state.shape))


def metric(c: float) -> MetricPath:
    return MetricPath(clustered_codebook(), c, 0.9)


def plain(steps: int, **options: object) -> DenoiseConfig:
    """Neither temperatures nor the corrector."""
    return DenoiseConfig(steps=steps, end_temperature=1.0, last_temperature=1.0, corrector=1.0, **options)  # type: ignore[arg-type]


# Share of consistent rows in rows of 4 and of 16 cells, by path and steps. From an independent program for numpy
# (40,000 and 16,000 rows); the exact step's from 20,000 rows of this one.
TABLE: dict[str, tuple[DiscretePath, dict[str, object], dict[int, dict[int, float]]]] = {
    "euler": (EulerPath(CODES), {}, {4: {2: 0.455, 4: 0.872, 8: 0.979, 16: 0.996}, 16: {4: 0.982}}),
    "uniform": (UniformPath(CODES), {}, {4: {2: 0.48, 4: 0.897, 8: 0.986, 16: 0.999}, 16: {8: 1.0}}),
    "euler_shift": (EulerPath(CODES), {"shift": 0.33}, {4: {2: 0.551, 4: 0.941, 8: 0.994}, 16: {4: 0.992}}),
    "metric_3": (metric(3), {}, {4: {2: 0.2485, 4: 0.675, 8: 0.960}, 16: {4: 0.878, 8: 0.999}}),
    "metric_10": (metric(10), {}, {4: {2: 0.672, 4: 0.974, 8: 0.999}, 16: {4: 1.0}}),
    "metric_30": (metric(30), {}, {4: {2: 0.877, 4: 0.997}, 16: {4: 1.0}}),
    "mask": (MaskPath(CODES), {}, {4: {2: 0.374, 4: 0.698, 8: 0.892, 16: 1.0}, 16: {4: 0.096, 8: 0.396}}),
    "mask_cosine": (MaskPath(CODES), {"schedule": "cosine"}, {4: {2: 0.531, 4: 0.742, 8: 0.905}, 16: {8: 0.703}}),
    "mask_spread": (SpreadPath(CODES), {}, {4: {2: 0.25, 4: 1.0}, 16: {8: 0.253, 16: 1.0}}),
}


@pytest.mark.parametrize("name", TABLE)
def test_rows_are_as_consistent_as_the_mathematics_allows(name: str) -> None:
    path, options, expected = TABLE[name]
    is_mask = path.name == "mask"  # its order is over whole images of width x width cells
    for width, by_steps in expected.items():
        num_rows = 8000 if width == 4 else 4800 if is_mask else 2400
        num_images, rows = (num_rows // width, width) if is_mask else (num_rows, 1)
        for steps, share in by_steps.items():
            found, entropy = Rows(width, num_images, rows, seed=1).sample(path, plain(steps, **options))
            assert found == pytest.approx(share, abs=0.01), (width, steps)
            assert entropy >= (0.85 if name.startswith("metric") and width == 16 else 0.975), (width, steps)


def test_the_first_step_of_the_metric_path_is_not_wasted() -> None:
    """Tokens move towards what is drawn. At a rate of 0 at time 0, as it was published, all would stay."""

    class Waiting(MetricPath):
        def speed(self, time: float) -> float:
            return 0.0 if time == 0 else super().speed(time)

    generator = torch.Generator().manual_seed(0)
    state, drawn = (torch.randint(CODES, (500, 4), generator=generator) for _ in range(2))
    uniforms = torch.rand((2, 500, 4), generator=generator, dtype=torch.float64)

    def mean_distance(path: MetricPath) -> float:
        moved = path.step(state, drawn, 0.0, 0.25, uniforms)
        return float(path.distances(drawn.reshape(-1)).gather(1, moved.reshape(-1, 1)).mean())

    start = float(metric(10).distances(drawn.reshape(-1)).gather(1, state.reshape(-1, 1)).mean())
    assert mean_distance(metric(10)) < 0.6 * start
    assert mean_distance(Waiting(clustered_codebook(), 10, 0.9)) == pytest.approx(start)
    assert step_times(plain(4)) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_one_step_the_mask_and_greedy_decoding_are_seen_to_fail() -> None:
    """What the measures of quality must catch: joint structure at one step, diversity of greedy decoding."""
    assert Rows(4, 4000).sample(metric(10), plain(1))[0] < 0.05
    assert Rows(16, 100, 16).sample(MaskPath(CODES), plain(4))[0] < 0.2
    consistency, entropy = Rows(4, 4000).sample(metric(10), plain(1), temperature=0.0)
    assert consistency == 1.0, "joint structure alone is fooled"
    assert entropy < 0.01


def test_the_corrector_and_the_last_temperature_keep_structure_and_diversity() -> None:
    for path in (UniformPath(CODES), metric(10)):
        consistency, entropy = Rows(4, 4000).sample(path, DenoiseConfig(steps=8))
        assert consistency > 0.98
        assert entropy > 0.98
    only_noise = DenoiseConfig(steps=8, corrector=0.0, corrector_share=1.0, end_temperature=1.0, last_temperature=1.0)
    consistency, entropy = Rows(4, 4000).sample(UniformPath(CODES), only_noise)
    assert consistency > 0.95, "drawn anew at every step, the marginals of the path stay"
    assert entropy > 0.98


@pytest.mark.parametrize("path", [UniformPath(CODES), MaskPath(CODES), metric(10)], ids=lambda path: path.name)
def test_noise_has_the_distribution_of_the_path(path: DiscretePath) -> None:
    clean = torch.arange(CODES).repeat(4000, 1)
    uniforms = torch.rand((2, *clean.shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for time in (0.0, 0.3, 0.9):
        expected = likelihood(path, time)
        noisy = path.corrupt(clean, torch.full((4000, 1), time, dtype=torch.float64), uniforms)
        counts = torch.stack([torch.bincount(noisy[:, code], minlength=len(expected)) for code in range(CODES)], 1)
        assert (counts / 4000 - expected).abs().max() < 0.04
        assert (noisy == path.corrupt(clean, time, uniforms)).all()


def test_the_exact_step_is_the_posterior() -> None:
    """Against Bayes' rule over all codes, for one state and one drawn code of five."""
    path, size = UniformPath(5), 5
    draws = 200_000
    uniforms = torch.rand((2, draws, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for state, drawn in ((0, 3), (4, 1), (2, 2)):
        moved = path.step(torch.full((draws, 1), state), torch.full((draws, 1), drawn), 0.3, 0.5, uniforms)
        at = torch.arange(size)
        forward = 0.5 * (at == drawn) + 0.5 / size  # q(x' | x1)
        back = 0.6 * (at == state) + 0.4 / size  # q(x | x'), 0.6 = 0.3 / 0.5
        expected = forward * back / (forward * back).sum()
        assert (torch.bincount(moved[:, 0], minlength=size) / draws - expected).abs().max() < 0.005


def some_references(shape: tuple[int, int]) -> torch.Tensor:
    """Any codes, and none for a third of the places."""
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(CODES, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 1 / 3, -1, codes)


@pytest.mark.parametrize("inner", [UniformPath(CODES), MaskPath(CODES), metric(10)], ids=lambda path: path.name)
def test_codes_with_a_reference_come_from_it_and_the_others_from_noise(inner: DiscretePath) -> None:
    shape = (3000, 8)
    references = some_references(shape)
    has_one = references >= 0
    path = behind(FromReferencePath(inner), references)
    generator = torch.Generator().manual_seed(9)
    uniforms = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
    clean, drawn = (torch.randint(CODES, shape, generator=generator) for _ in range(2))
    ways = [
        (path.start(uniforms), inner.start(uniforms), 0.0, clean),
        (path.corrupt(clean, 0.7, uniforms), inner.corrupt(clean, 0.7, uniforms), 0.7, clean),
        (path.step(clean, drawn, 0.2, 0.4, uniforms), inner.step(clean, drawn, 0.2, 0.4, uniforms), 0.4, drawn),
        (path.finish(clean, drawn), inner.finish(clean, drawn), 1.0, drawn),
    ]
    for found, from_noise, time, end in ways:
        assert torch.equal(found[~has_one], from_noise[~has_one])
        assert ((found == references) | (found == end))[has_one].all()
        differ = has_one & (references != end)
        assert float((found == end)[differ].double().mean()) == pytest.approx(time, abs=0.02)


@pytest.mark.parametrize(("steps", "least"), [(4, 0.91), (8, 0.98)])
def test_images_from_references_are_whole(steps: int, least: float) -> None:
    """The exact denoiser of the mixture: rows begin with any textures of their colours, and end with one."""

    class Rest(Rows):
        def denoiser(self, path):  # type: ignore[no-untyped-def]
            textures = torch.arange(TEXTURES)

            def logits(state: torch.Tensor, time: float) -> torch.Tensor:
                candidates = self.colours[..., None] * TEXTURES + textures
                likely = time * (state[..., None] == candidates) + (1 - time) * (state == path.references)[..., None]
                evidence = likely.double().clamp_min(1e-300).log().sum(1, keepdim=True)
                result = torch.full((*state.shape, CODES), -torch.inf, dtype=torch.float64)
                return result.scatter_(-1, candidates, evidence.expand(*state.shape, TEXTURES))

            return logits

    rows = Rest(4, 8000, seed=2)
    references = rows.colours * TEXTURES + torch.randint(TEXTURES, rows.colours.shape, generator=rows.generator)
    path = behind(FromReferencePath(UniformPath(CODES)), references)
    consistency, entropy = rows.sample(path, plain(steps))
    assert consistency > least
    assert entropy > 0.98
    assert rows.sample(path, plain(1))[0] < 0.05


def test_calibration_weighs_joint_structure_against_diversity() -> None:
    """A large c is consistent and narrows the codes: the largest that keeps their entropy is the one to take."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(COLOURS, (400, 1), generator=generator).expand(-1, 4)
    windows = colours * TEXTURES + torch.randint(TEXTURES, (400, 1), generator=generator)
    path, table = calibrate_path(windows, clustered_codebook(), steps=4)
    by_c = {one.c: one for one in table}
    consistencies = [by_c[c].consistency for c in (1.0, 3.0, 10.0, 30.0, 100.0)]
    assert consistencies == sorted(consistencies)
    assert consistencies[0] < 0.3
    assert by_c[100.0].entropy_ratio < 0.95
    fit = [one for one in table if one.entropy_ratio >= 0.98] or [max(table, key=lambda one: one.entropy_ratio)]
    assert path.c == max(fit, key=lambda one: one.consistency).c < 30


def test_a_path_is_remembered_with_its_codebook() -> None:
    codebook = clustered_codebook()
    path = metric(10)
    again = make_path(path.describe(), CODES, codebook * 3)  # lengths do not matter
    assert again.describe() == path.describe()
    with pytest.raises(UserError, match="another codebook"):
        make_path(path.describe(), CODES, codebook.flip(0))
    for other in (UniformPath(CODES), MaskPath(CODES)):
        assert make_path(other.describe(), CODES) == other
    from_reference = make_path(FromReferencePath(path).describe(), CODES, codebook)
    assert isinstance(from_reference, FromReferencePath)
    assert from_reference.path.describe() == path.describe()
    assert behind(path, torch.zeros(1, 1)) is path, "a path from noise reads no reference"


def test_codes_of_another_device_find_the_codebook_there() -> None:
    """As on a GPU, where noise is drawn on the host and images are decoded on the device; torch's meta device stands for it."""
    path = MetricPath(clustered_codebook(), 10.0, 0.9)
    here = path.distances(torch.arange(3))
    there = path.distances(torch.arange(3, device="meta"))
    assert (there.device.type, there.shape) == ("meta", here.shape)
    assert torch.equal(path.distances(torch.arange(3)), here)
