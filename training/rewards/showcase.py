"""The best and the worst answers of a step, kept as pictures: eyes see what no score says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import replace_file, write_json
from training.rewards.base import Answer
from training.rewards.system import Judgements
from training.rewards.wire import png_bytes


@dataclass
class Showcase:
    """Writes `step_N/best_0_0.png`, ... and `step_N/answers.json` below `folder`, every `every_steps` steps."""

    folder: Path
    every_steps: int = 50
    num_answers: int = 4  # of each end, for each task

    def keep(self, step: int, answers: Sequence[Answer], judged: Judgements) -> list[Path]:
        """The pictures written: none in steps between. A step that is done again replaces its own."""
        if step % self.every_steps:
            return []
        place = self.folder / f"step_{step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        records, written = [], []
        for end, index in self._chosen(answers, judged):
            record = self._record(end, answers[index], judged, index)
            for number, image in enumerate(answers[index].images):
                if image is not None:
                    written.append(place / f"{end}_{index}_{number}.png")
                    replace_file(written[-1], png_bytes(image))
                    record["images"].append(written[-1].name)
            records.append(record)
        write_json(place / "answers.json", records)
        return written

    def _chosen(self, answers: Sequence[Answer], judged: Judgements) -> list[tuple[str, int]]:
        """("best" or "worst", index), task by task. An answer without a total is neither."""
        chosen = []
        for task in sorted({answer.task for answer in answers}):
            there = [index for index, answer in enumerate(answers) if answer.task == task]
            there = sorted(
                (index for index in there if np.isfinite(judged.totals[index])), key=lambda index: judged.totals[index]
            )
            num = min(self.num_answers, (len(there) + 1) // 2)
            chosen += [("best", index) for index in there[::-1][:num]]
            chosen += [("worst", index) for index in there[: min(num, len(there) - num)]]
        return chosen

    def _record(self, end: str, answer: Answer, judged: Judgements, index: int) -> dict[str, Any]:
        signals = {name: float(values[index]) for name, values in judged.signals.items() if np.isfinite(values[index])}
        return {
            "end": end,
            "task": answer.task,
            "prompt": answer.prompt,
            "text": answer.text,
            "reward": float(judged.totals[index]),
            "signals": signals,
            "images": [],
        }
