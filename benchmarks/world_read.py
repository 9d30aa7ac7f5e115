"""How much of the free world its vision tokenizer keeps: true scenes, encoded and decoded, as the judge reads them.

    python -m benchmarks.world_read --vision-tokenizer runs/world/vision_tokenizer [--pictures 100]

The ceiling of every accuracy of `curriculum=world`, before a model is trained. Prints one JSON object: the share of scenes read
exactly, by the number of bodies; and of the others what was wrong: a patch that is no body, other bodies, other places.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from examples.free_world.judge import read_scene, same_bodies
from examples.free_world.tasks import FreeReconstruction
from model.vision_tokenizer.wrapper import load_vision_tokenizer
from training.inference.evaluation import EvaluationPrompt


def mistake(picture: np.ndarray, task: FreeReconstruction, prompt: EvaluationPrompt) -> str:
    """What the judge finds wrong with uint8 [H, W, 3]; "" for nothing."""
    if task.judge(prompt, [picture], ""):
        return ""
    scene = read_scene(picture)
    if scene is None:
        return "unread"
    return "places" if same_bodies(scene, prompt.target) else "bodies"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision-tokenizer", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=100)
    options = parser.parse_args()
    tokenizer, task = load_vision_tokenizer(options.vision_tokenizer), FreeReconstruction(num_prompts=options.pictures)
    asked, read, mistakes = Counter[int](), Counter[int](), Counter[str]()
    for prompt in task.prompts():
        (picture,) = tokenizer.decode(tokenizer.encode(prompt.images[0][None]))
        found = mistake(picture, task, prompt)
        asked[len(prompt.target)] += 1
        read[len(prompt.target)] += not found
        mistakes[found] += 1
    right = mistakes.pop("", 0)
    by_bodies = {count: read[count] / asked[count] for count in sorted(asked)}
    print(json.dumps({"read": right / options.pictures, "by_bodies": by_bodies, "mistakes": mistakes}, indent=1))


if __name__ == "__main__":
    main()
