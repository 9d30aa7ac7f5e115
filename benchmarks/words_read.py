"""Does the reader read the words world's sheets, and what does it cost?

    python -m benchmarks.words_read --sheets 200
    python -m benchmarks.words_read --sheets 8 --search

Draws sheets of held-out texts, has RapidOCR read them as the reward `text_rendering` does, and prints the mean reward, the
share read exactly and the CPU seconds of one. `--search` lets the reader look for lines, as it does without `one_line`.
"""

from __future__ import annotations

import argparse
import json
import time

from examples.words_world.tasks import WordsTask
from examples.words_world.writing import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheets", type=int, default=200)
    parser.add_argument("--search", action="store_true", help="look for lines first")
    options = parser.parse_args()
    task = WordsTask(num_prompts=options.sheets, one_line=not options.search)
    prompts = task.prompts()
    pictures = [[draw(prompt.target)] for prompt in prompts]
    task.judge(prompts[0], pictures[0], "")  # loads the networks
    started = time.process_time()
    scores = [float(task.judge(prompt, shown, "")) for prompt, shown in zip(prompts, pictures, strict=True)]
    seconds = (time.process_time() - started) / len(scores)
    found = {"reward": sum(scores) / len(scores), "exact": scores.count(1.0) / len(scores), "cpu_seconds": seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
