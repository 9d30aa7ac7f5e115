"""Tiles: exactly the whole where the network sees no farther than their margin, no edges where it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vision_tokenizer.config import VisionTokenizerConfig, ibq_emu35
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import initialize_weights
from model.vision_tokenizer.tiling import decode_tiled, encode_tiled, exact_margin, spans
from model.vision_tokenizer.wrapper import VisionTokenizer

LOCAL = {"norm_scope": "pixel", "mid_attention": False, "attn_resolutions": []}


def make(**changes) -> IBQ:
    values = {
        "ch": 8,
        "ch_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 64,
        "z_channels": 8,
        "embed_dim": 8,
        "n_embed": 64,
        "norm_groups": 4,
    }
    model = IBQ(VisionTokenizerConfig(**(values | changes)))
    initialize_weights(model, 3)
    return model.double().eval()


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_spans_cover_a_side_once(length: int, tile: int, margin: int) -> None:
    found = spans(length, tile, margin)
    assert [i for span in found for i in range(span.start, span.stop)] == list(range(length))
    for span in found:
        assert span.stop - span.start <= tile
        assert span.outer_start == max(0, span.start - margin)
        assert span.outer_stop == min(length, span.stop + margin)


@pytest.mark.parametrize(
    "changes", [{}, {"padding_mode": "replicate"}, {"encoder_kernel_sizes": [3, 3, 1]}, {"num_res_blocks": 2}]
)
def test_tiles_of_a_local_network_are_exactly_the_whole(changes: dict) -> None:
    torch.manual_seed(0)
    model = make(**LOCAL, **changes)
    margin = exact_margin(model.config)
    assert margin is not None
    images = torch.rand(1, 3, 4 * (3 * margin + 3), 4 * (2 * margin + 9), dtype=torch.float64) * 2 - 1
    whole = model.encode(images)
    assert torch.equal(encode_tiled(model, images, tile=margin), whole)
    torch.testing.assert_close(decode_tiled(model, whole, tile=margin), model.decode(whole))
    # A margin that is too small shows: the borders of a tile are not borders of the image.
    narrow = decode_tiled(model, whole, tile=margin, margin=1)
    assert (narrow - model.decode(whole)).abs().max() > 1e-3
    assert not torch.equal(encode_tiled(model, images, tile=4, margin=0), whole)


def test_no_margin_is_exact_for_the_published_structure() -> None:
    assert exact_margin(ibq_emu35()) is None
    assert exact_margin(make(**{**LOCAL, "norm_scope": "image"}).config) is None
    assert exact_margin(make(**{**LOCAL, "mid_attention": True}).config) is None
    assert exact_margin(make(**{**LOCAL, "attn_resolutions": [16]}).config) is None


def edge(found: torch.Tensor, whole: torch.Tensor, columns: list[int]) -> float:
    """How much the deviation from the whole jumps across the given columns."""
    deviation = found - whole
    return max(float((deviation[..., c] - deviation[..., c - 1]).abs().mean()) for c in columns)


def test_blended_tiles_leave_no_edges_with_attention_and_image_norms() -> None:
    torch.manual_seed(0)
    model = make(mid_attention=True, norm_scope="image")
    codes = torch.randint(0, 64, (2, 24, 64))
    whole = model.decode(codes)
    blended = decode_tiled(model, codes, tile=32, margin=8)
    left, right = model.decode(codes[..., :32]), model.decode(codes[..., 32:])
    side_by_side = torch.cat((left, right), dim=-1)
    border = 32 * 4
    elsewhere = edge(blended, whole, list(range(border - 60, border - 40)))
    assert edge(side_by_side, whole, [border]) > 10 * edge(blended, whole, [border])
    # Neither there nor where the margins end, on both sides.
    assert edge(blended, whole, [border - 32, border, border + 32]) < 2 * elsewhere + 1e-3
    # Where neither ramp nor border is, tone differs by little.
    scale = whole.std()
    assert (blended - whole).abs().mean() < 0.2 * scale


def test_the_tokenizer_tiles_large_images_by_itself() -> None:
    model = make(**LOCAL).float()
    margin = exact_margin(model.config)
    assert margin is not None
    images = np.random.default_rng(0).integers(0, 256, (2, 4 * 3 * margin, 4 * 24, 3), dtype=np.uint8)
    whole = VisionTokenizer(model, "x")
    tiled = VisionTokenizer(model, "x", whole_side=4 * margin)
    codes = whole.encode(images)
    assert np.mean(codes == tiled.encode(images)) > 0.999  # float32: a tie may fall otherwise
    difference = whole.decode(codes).astype(int) - tiled.decode(codes).astype(int)
    assert np.abs(difference).max() <= 1
