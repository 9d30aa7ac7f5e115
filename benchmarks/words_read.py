"""Does the reader read the words world's sheets, and what does it cost?

    python -m benchmarks.words_read --sheets 200
    python -m benchmarks.words_read --sheets 8 --search
    python -m benchmarks.words_read --sheets 60 --vision-tokenizer runs/words/vision_tokenizer

Draws sheets of held-out texts, has RapidOCR read them as the reward `text_rendering` does, and prints the mean reward, the
share read exactly and the CPU seconds of one. `--search` lets the reader look for lines, as it does without `one_line`; with `--vision-tokenizer` it reads what that one has encoded
and decoded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from examples.words_world.tasks import WordsTask
from examples.words_world.writing import draw
from model.vision_tokenizer.wrapper import load_vision_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheets", type=int, default=200)
    parser.add_argument("--search", action="store_true", help="look for lines first")
    parser.add_argument("--vision-tokenizer", type=Path, default=None, help="folder of a trained one")
    options = parser.parse_args()
    task = WordsTask(num_prompts=options.sheets, one_line=not options.search)
    prompts = task.prompts()
    sheets = np.stack([draw(prompt.target) for prompt in prompts])
    if options.vision_tokenizer is not None:
        tokenizer = load_vision_tokenizer(options.vision_tokenizer)
        sheets = tokenizer.decode(tokenizer.encode(sheets))
    task.judge(prompts[0], [sheets[0]], "")  # loads the networks
    started = time.process_time()
    scores = [float(task.judge(prompt, [sheet], "")) for prompt, sheet in zip(prompts, sheets, strict=True)]
    seconds = (time.process_time() - started) / len(scores)
    found = {"reward": sum(scores) / len(scores), "exact": scores.count(1.0) / len(scores), "cpu_seconds": seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
