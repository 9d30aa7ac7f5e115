"""How much of the free world its vision tokenizer keeps: true scenes, encoded and decoded, as the judge reads them.

    python -m benchmarks.world_read --vision-tokenizer runs/world/vision_tokenizer [--pictures 100]

The ceiling of every accuracy of `curriculum=world`, before a model is trained. Prints one JSON object: the share of scenes read
exactly, by the number of bodies; and of the others what was wrong: a patch that is no body, other bodies, other places.
And how many codes stay where two frames in a row are alike, pixel for pixel: what changes there no model can know.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from examples.free_world.bodies import draw, random_ground
from examples.free_world.judge import read_scene, same_bodies
from examples.free_world.laws import random_clip
from examples.free_world.tasks import MAX_MOVING, FreeReconstruction
from model.vision_tokenizer.wrapper import VisionTokenizer, load_vision_tokenizer
from training.inference.evaluation import EvaluationPrompt


def mistake(picture: np.ndarray, task: FreeReconstruction, prompt: EvaluationPrompt) -> str:
    """What the judge finds wrong with uint8 [H, W, 3]; "" for nothing."""
    if task.judge(prompt, [picture], ""):
        return ""
    scene = read_scene(picture)
    if scene is None:
        return "unread"
    return "places" if same_bodies(scene, prompt.target) else "bodies"


def codes_kept(tokenizer: VisionTokenizer, num_clips: int) -> float:
    """Of the patches that two frames in a row have pixel for pixel in common, the share that keeps its code.

    A model has to guess the rest, and a picture whose codes are all the likeliest is none that the tokenizer has seen.
    """
    rng, kept, common = np.random.default_rng(5), 0, 0
    for number in range(num_clips):
        clip, ground = random_clip(rng, 1 + number % MAX_MOVING), random_ground(rng)
        frames = np.stack([draw(scene, ground) for scene in clip.scenes[:2]])
        codes = tokenizer.encode(frames)
        side = frames.shape[1] // codes.shape[1]
        patches = frames.reshape(2, codes.shape[1], side, codes.shape[2], side, 3)
        is_common = (patches[0] == patches[1]).all(axis=(1, 3, 4))
        kept += int((codes[0] == codes[1])[is_common].sum())
        common += int(is_common.sum())
    return kept / common


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
    answer = {"read": right / options.pictures, "by_bodies": by_bodies, "mistakes": mistakes}
    print(json.dumps(answer | {"codes_kept": codes_kept(tokenizer, options.pictures)}, indent=1))


if __name__ == "__main__":
    main()
