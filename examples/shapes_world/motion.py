"""Clips of the shapes world: every shape keeps to one simple law, and rests once a second in a cell.

A shape that moves right goes one cell to the right each second, and so on; it never leaves the grid and never enters a
cell that another shape holds or has just left. Rests lie around the middle of each second, glides around its ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from examples.shapes_world.world import GRID, RAW_SIZE, Item, Scene, all_items, draw_array, is_held_out, make_scene

FRAMES_PER_SECOND = 8
GLIDE_FRAMES = 2  # frames between two rests: 6 of 8 frames rest (0.75 s), the glide takes the rest (0.25 s)
NUM_RESTS = 3  # seconds of a clip
STEPS = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0), "stay": (0, 0)}  # (rows, columns)
FIRST_WORD_SECONDS = 0.54  # in each second: after the frame in its middle, before that of the next
SPEECH_SECONDS = 0.88  # in which a sentence is spoken


@dataclass(frozen=True)
class Track:
    """One shape, where it starts and its law."""

    start: Item
    law: str

    def at(self, rest: int) -> Item:
        row_step, column_step = STEPS[self.law]
        start = self.start
        return replace(start, row=start.row + rest * row_step, column=start.column + rest * column_step)

    @property
    def rests(self) -> tuple[Item, ...]:
        return tuple(self.at(rest) for rest in range(NUM_RESTS))

    def text(self) -> str:
        law = "stays still" if self.law == "stay" else f"moves {self.law}"
        return f"the {self.start.color} {self.start.shape} {law}"


Clip = tuple[Track, ...]  # one or two tracks, sorted by the place where they start


@functools.cache
def all_tracks() -> tuple[Track, ...]:
    """Every track that stays on the grid for the whole clip."""
    tracks = [Track(item, law) for item in all_items() for law in STEPS]
    return tuple(
        track for track in tracks if all(0 <= item.row < GRID and 0 <= item.column < GRID for item in track.rests)
    )


@functools.cache
def seen_tracks() -> tuple[Track, ...]:
    """Tracks that rest on no held-out combination."""
    return tuple(track for track in all_tracks() if not any(map(is_held_out, track.rests)))


def is_clear(clip: Clip) -> bool:
    """Something moves, the shapes can be told apart by name, and none enters a cell held now or one second ago."""
    if all(track.law == "stay" for track in clip):
        return False
    if len({(track.start.shape, track.start.color) for track in clip}) < len(clip):
        return False
    places = [[(item.row, item.column) for item in track.rests] for track in clip]
    for number, own in enumerate(places):
        for other in places[:number] + places[number + 1 :]:
            before = [other[0], *other[:-1]]
            if any(place in (now, past) for place, now, past in zip(own, other, before, strict=True)):
                return False
    return True


def draw_clip(rng: np.random.Generator, tracks: tuple[Track, ...], num_items: int) -> Clip:
    """A clear clip of `num_items` tracks chosen at random."""
    while True:
        chosen = [tracks[index] for index in rng.choice(len(tracks), num_items, replace=False)]
        clip = tuple(sorted(chosen, key=lambda track: (track.start.row, track.start.column)))
        if is_clear(clip):
            return clip


def random_clip(rng: np.random.Generator, num_items: int) -> Clip:
    """A clip that shows no held-out combination at any rest."""
    return draw_clip(rng, seen_tracks(), num_items)


def random_held_out_clip(rng: np.random.Generator, num_items: int, rest: int) -> Clip:
    """A clip in which, at `rest`, a shape that moves shows a held-out combination."""
    while True:
        clip = draw_clip(rng, all_tracks(), num_items)
        if any(track.law != "stay" and is_held_out(track.at(rest)) for track in clip):
            return clip


def rest_scene(clip: Clip, rest: int) -> Scene:
    return make_scene([track.at(rest) for track in clip])


def cells_gone() -> list[float]:
    """For each frame, how many cells a moving shape has gone."""
    first_glide = FRAMES_PER_SECOND - GLIDE_FRAMES // 2
    gone = []
    for frame in range(NUM_RESTS * FRAMES_PER_SECOND):
        rest, within = divmod(frame + FRAMES_PER_SECOND - first_glide, FRAMES_PER_SECOND)
        gliding = within < GLIDE_FRAMES and 0 < rest < NUM_RESTS
        part = (within + 1) / (GLIDE_FRAMES + 1) - 1 if gliding else 0.0
        gone.append(min(rest, NUM_RESTS - 1) + part)
    return gone


def clip_frames(clip: Clip, size: int = RAW_SIZE) -> list[np.ndarray]:
    """The frames of a clip, uint8 [size, size, 3] each; equal frames are the same object."""
    starts = tuple(track.start for track in clip)
    pictures: dict[float, np.ndarray] = {}
    for gone in cells_gone():
        if gone not in pictures:
            steps = [STEPS[track.law] for track in clip]
            offsets = [(gone * rows, gone * columns) for rows, columns in steps]
            pictures[gone] = draw_array(starts, size, offsets)
    return [pictures[gone] for gone in cells_gone()]


def law_text(clip: Clip) -> str:
    """The law in words: shapes and directions, never places."""
    return " and ".join(track.text() for track in clip)


def clip_caption(clip: Clip) -> str:
    """What happens and where it starts, for captioned clips."""
    return " and ".join(f"{track.text()} from {track.start.place}" for track in clip).replace(
        "stays still from", "stays still at"
    )


def timed_words(text: str, start_seconds: float, length_seconds: float) -> list[dict[str, object]]:
    """The words of `text` spoken evenly: [{"word", "start", "end"}] with times in seconds."""
    words = text.split()
    step = length_seconds / len(words)
    return [
        {
            "word": word,
            "start": round(start_seconds + number * step, 3),
            "end": round(start_seconds + (number + 1) * step, 3),
        }
        for number, word in enumerate(words)
    ]


def transcript(clip_text: str) -> list[dict[str, object]]:
    """The law said once before each rest that it predicts: after the frame of one second, before that of the next."""
    words = []
    for rest in range(NUM_RESTS - 1):
        words += timed_words(clip_text, rest + FIRST_WORD_SECONDS, SPEECH_SECONDS)
    return words
