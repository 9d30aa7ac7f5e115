"""Rewards by name: ours, or a dotted path to a class of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.errors import UserError
from model.registry import find_class, made_with
from training.rewards.base import Reward

REWARDS = {
    "scene": "training.rewards.rules.SceneMatch",
    "count": "training.rewards.rules.CountMatch",
    "color": "training.rewards.rules.ColorMatch",
    "shape": "training.rewards.rules.ShapeMatch",
    "place": "training.rewards.rules.PlaceMatch",
    "permanence": "training.rewards.rules.Permanence",
    "text_rendering": "training.rewards.ocr.TextRendering",
    "text_layout": "training.rewards.ocr.TextLayout",
    "edit_fidelity": "training.rewards.pixels.EditFidelity",
    "rule_aesthetic": "training.rewards.pixels.RuleAesthetic",
    "clip_similarity": "training.rewards.clip.ClipSimilarity",
    "clip_preference": "training.rewards.clip.ClipPreference",
    "vlm_judge": "training.rewards.vlm.VlmJudge",
    "remote": "training.rewards.client.RemoteReward",
}


def make_reward(name: str, options: Mapping[str, Any], key: str) -> Reward:
    """The reward `name` of `REWARDS`, or the class at that dotted path, made with `options`.

    `key` is the configuration's key, for messages. Raises `UserError` for an unknown name, a class that does not take
    the options, and a class that is no reward.
    """
    found = find_class("reward", name, REWARDS, key)
    reward = made_with(found, "reward", options, f"{key}.options")
    for member in ("name", "version"):
        if not isinstance(getattr(reward, member, None), str):
            raise UserError(
                "not a reward", where=f"{key}={name}", expected=f"a class with a text `{member}` and `score(answers)`"
            )
    if not callable(getattr(reward, "score", None)):
        raise UserError("not a reward", where=f"{key}={name}", expected="a class with `score(answers)`")
    made: Reward = reward
    return made
