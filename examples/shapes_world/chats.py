"""Chats about the shapes world as people's own data look: `python -m examples.shapes_world.chats target=FOLDER [key=value]`.

`FOLDER/general.jsonl` (pictures from captions; what a picture shows, in two turns), `x2i.jsonl` (pairs), `exploration.jsonl` (the next
states of a scene, with thoughts), and the pictures in `FOLDER/media`. The same arguments give the same bytes. Only combinations
that are not held out are shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from examples.shapes_world.edits import random_edit
from examples.shapes_world.media import png_bytes
from examples.shapes_world.motion import NUM_RESTS, law_text, random_clip, rest_scene
from examples.shapes_world.world import Scene, caption, draw_array, random_scene
from model.durable import replace_file
from model.errors import UserError

Line = dict[str, Any]
Show = Callable[[Scene], str]  # keeps a picture of the scene; its path below the media folder


def message(role: str, *items: Line, **more: Any) -> Line:
    return {"role": role, "content": list(items)} | more


def words(text: str, kind: str = "text") -> Line:
    return {"type": kind, "text": text}


def picture(path: str) -> Line:
    return {"type": "image", "image": path}


def general(rng: np.random.Generator, number: int, show: Show) -> Line:
    scene = random_scene(rng, 1 + number % 2)
    if number % 2:
        asked = message("user", words(caption(scene)))
        return {"task": "t2i", "messages": [asked, message("assistant", picture(show(scene)))]}
    return {
        "messages": [
            message("user", picture(show(scene)), words("how many shapes?")),
            message("assistant", words(str(len(scene))), supervised=False),
            message("user", words("what is where?")),
            message("assistant", words(caption(scene))),
        ]
    }


def edit(rng: np.random.Generator, number: int, show: Show) -> Line:
    made = random_edit(rng, 1 + number % 2)
    return {"instruction": made.instruction, "sources": [show(made.source)], "target": show(made.target)}


def exploration(rng: np.random.Generator, number: int, show: Show) -> Line:
    clip = random_clip(rng, 1 + number % 2)
    scenes = [rest_scene(clip, rest) for rest in range(NUM_RESTS)]
    answer = [words(law_text(clip), "global_thought")]
    for scene in scenes[1:]:
        answer += [words(caption(scene), "image_thought"), picture(show(scene))]
    asked = message("user", picture(show(scenes[0])), words("go on"))
    return {"task": "explore", "messages": [asked, message("assistant", *answer)]}


FILES = {"general": general, "x2i": edit, "exploration": exploration}


def lines_of(name: str, target: Path, num_samples: int, seed: int) -> Iterator[Line]:
    rng = np.random.default_rng([seed, sorted(FILES).index(name)])
    count = 0

    def show(scene: Scene) -> str:
        nonlocal count
        path = f"{name}_{count:06d}.png"
        (target / "media" / path).write_bytes(png_bytes(draw_array(scene)))
        count += 1
        return path

    for number in range(num_samples):
        yield FILES[name](rng, number, show)


def write(target: Path, num_samples: int, seed: int) -> None:
    (target / "media").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        lines = [json.dumps(line) + "\n" for line in lines_of(name, target, num_samples, seed)]
        replace_file(target / f"{name}.jsonl", "".join(lines))


def main() -> int:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    unknown = given.keys() - {"target", "num_samples", "seed"}
    try:
        if unknown or len(given) < len(sys.argv) - 1 or "target" not in given:
            raise UserError("the arguments are target=FOLDER, num_samples=N, seed=N", got=" ".join(sys.argv[1:]))
        write(Path(given["target"]), int(given.get("num_samples", 1000)), int(given.get("seed", 0)))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
