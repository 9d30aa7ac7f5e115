"""`nextstate rewards`: the reward service, frozen scales, and scores of answers in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import Problems, UserError
from training.rewards.micro_batches import ServiceLimits
from training.rewards.registry import REWARDS
from training.rewards.system import RewardEntry

if TYPE_CHECKING:
    from training.rewards.base import Answer

HELP = """Serve rewards over HTTP, freeze their scales, or score answers in a file.

serve: scorers behind HTTP until SIGTERM; the file `address` says where (with the token; readable for you alone), and
training names it as path=remote options.address=FILE. calibrate: the quantiles of the answers in `answers` (one JSON
object a line, as `training.rewards.wire` writes them) become the frozen scales `out`. score: a line of scores an answer.

examples:
  nextstate rewards serve signals.ocr.path=text_rendering address=runs/mine/rewards.json
  nextstate rewards calibrate answers=answers.jsonl out=scales.json signals.ocr.path=text_rendering
  nextstate rewards score answers=answers.jsonl out=scores.jsonl signals.ocr.path=text_rendering"""

POSITIONAL = "action"
ACTIONS = ("serve", "calibrate", "score")


@dataclass
class Config:
    action: str = "serve"  # serve | calibrate | score
    signals: dict[str, RewardEntry] = field(default_factory=dict)  # name -> path, options, tasks
    host: str = "127.0.0.1"  # serve: where it listens
    port: int = 0  # serve: 0 takes a free one
    address: str = "rewards.json"  # serve: file that gets the URL and the token
    token_file: str | None = None  # serve: a token of yours; null makes one, on loopback only
    limits: ServiceLimits = field(default_factory=ServiceLimits)  # serve
    answers: str | None = None  # calibrate, score: JSON lines
    out: str | None = None  # calibrate: file of scales; score: JSON lines
    json: bool = False  # print one JSON object on stdout

    def validate(self) -> None:
        problems = Problems()
        choices = ", ".join(ACTIONS)
        problems.check(self.action in ACTIONS, "action", f"choices are {choices}, got {self.action!r}")
        problems.check(bool(self.signals), "signals", "no reward is named", "signals.ocr.path=text_rendering")
        for name, entry in self.signals.items():
            known = entry.path in REWARDS or "." in entry.path
            problems.check(
                known, f"signals.{name}.path", f"there is no reward {entry.path!r}; ours: {', '.join(REWARDS)}"
            )
        if self.action != "serve":
            for key in ("answers", "out"):
                problems.check(bool(getattr(self, key)), key, f"{self.action} needs a file", f"{key}=FILE")
        problems.raise_if_any()


def run(config: Config) -> dict[str, Any]:
    if config.action == "serve":
        return run_service(config)
    from training.rewards.system import RewardsConfig, RewardSystem

    assert config.answers
    assert config.out
    answers = read_answers(Path(config.answers))
    if config.action == "calibrate":
        signals = {name: RewardEntry(one.path, one.options, tasks=one.tasks) for name, one in config.signals.items()}
        scales = RewardSystem(RewardsConfig(signals), key="").calibrated(answers)
        scales.save(Path(config.out))
        return {"out": config.out, "num_answers": len(answers)} | scales.as_json() | {"version": scales.version}
    return run_scores(config, answers)


def run_service(config: Config) -> dict[str, Any]:
    from training.rewards.host import serve
    from training.rewards.registry import make_reward

    rewards = {name: make_reward(one.path, one.options, f"signals.{name}") for name, one in config.signals.items()}
    token_file = Path(config.token_file) if config.token_file else None
    serve(rewards, config.host, config.port, Path(config.address), token_file, config.limits)
    return {"served": {name: reward.version for name, reward in rewards.items()}}


def run_scores(config: Config, answers: list[Answer]) -> dict[str, Any]:
    from model.durable import replace_file
    from training.rewards.base import scores_of
    from training.rewards.registry import make_reward

    lines: list[dict[str, float | None]] = [{} for _ in answers]
    faults: dict[str, dict[str, int]] = {}
    for name, entry in config.signals.items():
        scores = scores_of(make_reward(entry.path, entry.options, f"signals.{name}"), answers)
        faults[name] = scores.faults
        for line, value in zip(lines, scores.values, strict=True):
            line[name] = value
    assert config.out
    replace_file(Path(config.out), "".join(json.dumps(line) + "\n" for line in lines))
    return {"out": config.out, "num_answers": len(answers), "missing": faults}


def read_answers(path: Path) -> list[Answer]:
    """Raises `UserError` with the line that is no answer."""
    from training.rewards.wire import WireError, decoded

    answers = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    answers.append(decoded(json.loads(line)))
                except (WireError, ValueError, RecursionError) as error:
                    raise UserError("a line is no answer", where=f"{path}:{number}", got=str(error)) from error
    except OSError as error:
        raise UserError("the answers cannot be read", where=str(path), got=str(error)) from error
    return answers
