"""The world itself: scenes, laws of motion, edits, and the judge that reads them back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from examples.shapes_world.edits import random_edit, random_held_out_edit
from examples.shapes_world.judge import read_scene, shows
from examples.shapes_world.media import mp4_bytes, mp4_frames
from examples.shapes_world.motion import (
    FRAMES_PER_SECOND,
    NUM_RESTS,
    STEPS,
    Track,
    clip_frames,
    is_clear,
    law_text,
    random_clip,
    random_held_out_clip,
    rest_scene,
    transcript,
)
from examples.shapes_world.world import (
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    Item,
    all_items,
    caption,
    draw,
    draw_array,
    held_out_items,
    is_held_out,
    make_scene,
    random_held_out_scene,
    random_scene,
    recolor,
)

seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 2)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def test_every_shape_color_row_and_column_is_seen_in_training():
    """Held-out combinations are to be composed of known parts."""
    seen = [item for item in all_items() if not is_held_out(item)]
    assert len(seen) + len(held_out_items()) == 216
    pairs = {(item.shape, item.color) for item in seen}
    assert len(pairs) == len(SHAPES) * len(COLORS)
    assert len({(item.shape, item.row, item.column) for item in seen}) == len(SHAPES) * 9
    assert len({(item.color, item.row, item.column) for item in seen}) == len(COLORS) * 9


@pytest.mark.parametrize("size", [24, 48, 96])
def test_the_judge_reads_every_single_item(size: int):
    for item in all_items():
        assert read_scene(resized(draw_array((item,)), size)) == (item,), item


@settings(max_examples=40, deadline=None)
@given(seed=seeds, count=counts, size=st.sampled_from([48, 96]))
def test_the_judge_accepts_the_scene_and_nothing_else(seed: int, count: int, size: int):
    rng = np.random.default_rng(seed)
    scene, other = random_held_out_scene(rng, count), random_scene(rng, 3 - count)
    pixels = resized(draw_array(scene), size)
    assert shows(pixels, scene)
    assert not shows(pixels, other)
    item = scene[0]
    for color in COLORS:
        if color != item.color:
            assert not shows(pixels, make_scene([recolor(item, color), *scene[1:]]))
    assert not shows(pixels, scene[1:]), "a shape too many"
    assert not shows(resized(draw_array(scene[1:]), size), scene), "a shape is missing"


@pytest.mark.parametrize(("radius", "accepted"), [(0.5, True), (1.0, True), (3.0, False), (5.0, False)])
def test_the_judge_forgives_a_little_blur_only(radius: float, accepted: bool):
    for shape in SHAPES:
        scene = (Item(shape, "blue", 1, 1), Item(shape, "yellow", 2, 0))
        blurred = Image.fromarray(resized(draw_array(scene), 48)).filter(ImageFilter.GaussianBlur(radius))
        assert shows(np.asarray(blurred), scene) == accepted, shape


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pixels", [2, 4, 8, -3])
def test_the_judge_refuses_shifted_shapes(axis: int, pixels: int):
    for shape in SHAPES:
        scene = (Item(shape, "red", 1, 1),)
        moved = np.roll(resized(draw_array(scene), 48), pixels, axis)
        assert not shows(moved, scene), shape


def test_the_judge_refuses_strange_pictures():
    scene = (Item("circle", "red", 0, 0),)
    grey = np.full((48, 48, 3), 128, np.uint8)
    assert read_scene(grey) is None
    assert not shows(grey, scene)
    assert not shows(draw_array(scene, 48)[:, :32], scene), "not square"
    assert not shows(draw_array(scene, 48)[:47, :47], scene), "does not divide into cells"
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert not shows(noise, scene)
    mixed = draw_array(scene, 48).copy()
    mixed[:8, :16] = draw_array((Item("circle", "blue", 0, 0),), 48)[:8, :16]
    assert not shows(mixed, scene), "half red, half blue"


def test_drawing_is_the_same_as_picture_and_as_array():
    scene = random_scene(np.random.default_rng(3), 2)
    assert np.array_equal(np.asarray(draw(scene)), draw_array(scene))


def test_captions_name_every_item_once():
    scene = make_scene([Item("square", "blue", 2, 2), Item("circle", "red", 0, 0)])
    assert caption(scene) == "a red circle at top left and a blue square at bottom right"
    assert caption(scene, 1) == f"there is {caption(scene)}"


@settings(max_examples=40, deadline=None)
@given(seed=seeds, count=counts)
def test_clips_keep_to_their_law(seed: int, count: int):
    clip = random_clip(np.random.default_rng(seed), count)
    assert len({track.start for track in clip}) == count
    for rest in range(NUM_RESTS):
        scene = rest_scene(clip, rest)
        assert not any(is_held_out(item) for item in scene)
        for track in clip:
            rows, columns = STEPS[track.law]
            assert (track.at(rest).row, track.at(rest).column) == (
                track.start.row + rest * rows,
                track.start.column + rest * columns,
            )
            assert track.at(rest) in scene


@settings(max_examples=15, deadline=None)
@given(seed=seeds, count=counts, rest=st.integers(1, NUM_RESTS - 1))
def test_decoded_clips_rest_where_the_law_says(seed: int, count: int, rest: int):
    clip = random_held_out_clip(np.random.default_rng(seed), count, rest)
    assert any(is_held_out(track.at(rest)) and track.law != "stay" for track in clip)
    data = mp4_bytes(clip_frames(clip), FRAMES_PER_SECOND)
    times = [second + part for second in range(NUM_RESTS) for part in (0.25, 0.5, 0.7)]
    for time, frame in zip(times, mp4_frames(data, times), strict=True):
        assert shows(resized(frame, 48), rest_scene(clip, int(time))), time
    gliding = mp4_frames(data, [0.875])[0]
    assert not shows(gliding, rest_scene(clip, 0)), "something moves between the rests"


def test_shapes_never_follow_into_a_cell_just_left_or_meet():
    red, blue = Item("circle", "red", 0, 0), Item("square", "blue", 0, 1)
    assert not is_clear((Track(red, "right"), Track(blue, "stay"))), "runs into it"
    assert not is_clear((Track(red, "right"), Track(blue, "down"))), "enters a cell just left"
    assert not is_clear((Track(red, "stay"), Track(blue, "stay"))), "nothing moves"
    assert is_clear((Track(red, "down"), Track(blue, "down")))
    same_name = Item("circle", "red", 0, 1)
    assert not is_clear((Track(red, "down"), Track(same_name, "down"))), "no telling apart"


@settings(max_examples=30, deadline=None)
@given(seed=seeds, count=counts)
def test_transcripts_name_laws_not_places_and_come_before_the_frame(seed: int, count: int):
    clip = random_clip(np.random.default_rng(seed), count)
    words = transcript(law_text(clip))
    spoken = [str(word["word"]) for word in words]
    assert spoken == law_text(clip).split() * (NUM_RESTS - 1)
    places = {"top", "middle", "bottom", "center", *ROWS, *COLUMNS} - {"left", "right"}
    assert not places & set(spoken)
    half = len(words) // 2
    for number, word in enumerate(words):
        frame = number // half  # the frame in the middle of this second has been seen
        assert frame + 0.5 < word["start"] < word["end"] < frame + 1.5


@settings(max_examples=40, deadline=None)
@given(seed=seeds, count=counts)
def test_edits_change_one_color_and_name_one_shape(seed: int, count: int):
    rng = np.random.default_rng(seed)
    seen, unseen = random_edit(rng, count), random_held_out_edit(rng, count)
    assert not any(is_held_out(item) for item in (*seen.source, *seen.target, *unseen.source))
    for edit in (seen, unseen):
        changed = [(old, new) for old, new in zip(edit.source, edit.target, strict=True) if old != new]
        assert len(changed) == 1
        old, new = changed[0]
        assert recolor(old, new.color) == new
        assert edit.instruction == f"make the {old.color} {old.shape} at {old.place} {new.color}"
    old, new = next((a, b) for a, b in zip(unseen.source, unseen.target, strict=True) if a != b)
    assert is_held_out(new)
