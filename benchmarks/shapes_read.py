"""How many scenes of the demo's world its vision tokenizers keep: held-out ones, encoded, decoded and read by the judge.

    python -m benchmarks.shapes_read runs/demo/vision_tokenizer [runs/demo/another ...]

The ceiling of the demo's accuracies, of more scenes than its report has. Prints one JSON object a tokenizer: the share that is
read exactly, the number of codes in use on pictures held back from its training, and the mistakes by their number.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from examples.shapes_world.tasks import ReconstructionAccuracy
from model.vision_tokenizer.wrapper import load_vision_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vision_tokenizers", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=3000)
    options = parser.parse_args()
    task = ReconstructionAccuracy(num_prompts=options.scenes, seed=options.seed)
    prompts = task.prompts()
    for folder in options.vision_tokenizers:
        tokenizer, mistakes = load_vision_tokenizer(folder), Counter[str]()
        for prompt in prompts:
            pictures = list(tokenizer.decode(tokenizer.encode(prompt.images[0][None])))
            if not task.judge(prompt, pictures, ""):
                mistakes[task.reason(prompt, pictures, "")] += 1
        num_codes = json.loads((folder / "summary.json").read_text())["num_codes_used"]
        answer = {"read": 1 - mistakes.total() / len(prompts), "num_codes_used": num_codes, "mistakes": mistakes}
        print(json.dumps({"vision_tokenizer": str(folder)} | answer), flush=True)


if __name__ == "__main__":
    main()
