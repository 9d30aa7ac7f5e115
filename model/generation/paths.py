"""Discrete probability paths: how codes of an image become noise, and how a sampler walks back.

At time 0 a token is noise, at time 1 it is its code x1; `p_t(x | x1)` lies between. Three paths share one interface:

- `MetricPath`: p_t(x | x1) = softmax_x(-beta_t d(x, x1)), beta_t = c (t / (1 - t))^alpha, with d the squared distance of
  L2-normalised codebook vectors (URSA, arXiv 2510.24717, `scheduling_dfm.py`). A token moves to nearer codes only.
- `UniformPath`: x1 with probability t, else any code; the step is the exact posterior q(x_t' | x_t, x1).
- `MaskPath`: x1 with probability t, else masked; a token that is set stays.

`FromReferencePath` is one of them for images that begin as noise; those behind another image begin as that one.

All functions are pure: randomness comes in as `uniforms`, float64 in [0, 1) of shape [NUM_UNIFORMS, B, N], so that an
image depends on its own numbers and on nothing else in the batch. Codes are int64 [B, N]; times are floats, or float64
[B, 1] where each image has its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from model.errors import UserError
from model.vocabulary import Vocabulary

NUM_UNIFORMS = 2  # numbers that one `corrupt` or `step` uses for each token
ELEMENTS_AT_ONCE = 1 << 24  # of [tokens, codes] tables
# beta_t' has a pole at 0 for alpha < 1: earlier times move at this time's rate. A rate of 0 at time 0, as URSA has it,
# would waste the first step.
EARLIEST_RATE_TIME = 1e-3
LATEST_TIME = 1.0 - 1e-6

Time = float | torch.Tensor


class DiscretePath(Protocol):
    """`num_codes` codes; states may hold `num_codes` itself where the path masks tokens."""

    @property
    def name(self) -> str: ...
    @property
    def num_codes(self) -> int: ...

    def start(self, uniforms: torch.Tensor) -> torch.Tensor:
        """int64 [B, N], states of time 0."""
        ...

    def corrupt(self, clean: torch.Tensor, time: Time, uniforms: torch.Tensor) -> torch.Tensor:
        """int64 [B, N] drawn from p_time(. | clean)."""
        ...

    def step(
        self, state: torch.Tensor, drawn: torch.Tensor, time: float, next_time: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """The state at `next_time` of tokens in `state` at `time`, if `drawn` is where they end."""
        ...

    def finish(self, state: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """The image at time 1."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of it; `make_path` is the inverse."""
        ...


@dataclass(frozen=True)
class UniformPath:
    """A mixture of the code and any code."""

    num_codes: int
    name: str = "uniform"

    def start(self, uniforms: torch.Tensor) -> torch.Tensor:
        return _any_code(uniforms[0], self.num_codes)

    def corrupt(self, clean: torch.Tensor, time: Time, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.where(uniforms[0] < time, clean, _any_code(uniforms[1], self.num_codes))

    def step(
        self, state: torch.Tensor, drawn: torch.Tensor, time: float, next_time: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """Exact, and O(1) a token: with a = t / t', q(x' | x, x1) is proportional to q(x | x') q(x' | x1)."""
        kept, size = time / next_time, self.num_codes
        same = state == drawn
        other = (1 - kept) / size
        stay = (kept + other) * torch.where(same, next_time + (1 - next_time) / size, (1 - next_time) / size)
        arrive = torch.where(same, 0.0, other * (next_time + (1 - next_time) / size))
        num_others = torch.where(same, size - 1, size - 2)
        elsewhere = num_others * other * (1 - next_time) / size
        threshold = uniforms[0] * (stay + arrive + elsewhere)
        stray = _skip(_any_code(uniforms[1], num_others.clamp(min=1)), state, drawn)
        return torch.where(threshold < stay, state, torch.where(threshold < stay + arrive, drawn, stray))

    def finish(self, state: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return drawn

    def describe(self) -> dict[str, Any]:
        return {"path": self.name}


@dataclass(frozen=True)
class MaskPath:
    """A token is masked until it is set, in random order; round(N t) tokens of an image are set at time t."""

    num_codes: int
    name: str = "mask"

    def start(self, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.full_like(uniforms[0], self.num_codes, dtype=torch.int64)

    def corrupt(self, clean: torch.Tensor, time: Time, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.where(uniforms[0] < time, clean, self.num_codes)

    def step(
        self, state: torch.Tensor, drawn: torch.Tensor, time: float, next_time: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        masked = state == self.num_codes
        wanted = round(state.shape[1] * next_time)
        missing = (wanted - (~masked).sum(1, keepdim=True)).clamp(min=0)
        order = torch.where(masked, uniforms[0], 2.0).argsort(dim=1).argsort(dim=1)
        return torch.where(masked & (order < missing), drawn, state)

    def finish(self, state: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return torch.where(state == self.num_codes, drawn, state)

    def describe(self) -> dict[str, Any]:
        return {"path": self.name}


@dataclass(frozen=True)
class MetricPath:
    """Codes near x1 come first as noise fades. `codebook`: float32 [codes, D], normalised here."""

    codebook: torch.Tensor
    c: float
    alpha: float
    name: str = "metric"
    # Training draws noise on the host, decoding where the model is: the codebook is at both.
    _copies: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        normal = torch.nn.functional.normalize(self.codebook.detach().float(), dim=-1)
        object.__setattr__(self, "codebook", normal)

    @property
    def num_codes(self) -> int:
        return len(self.codebook)

    def start(self, uniforms: torch.Tensor) -> torch.Tensor:
        return _any_code(uniforms[0], self.num_codes)

    def corrupt(self, clean: torch.Tensor, time: Time, uniforms: torch.Tensor) -> torch.Tensor:
        sharpness = self.sharpness(torch.as_tensor(time, dtype=torch.float64, device=clean.device))
        sharpness = sharpness.expand(clean.shape).reshape(-1)
        flat, thresholds = clean.reshape(-1), uniforms[0].reshape(-1)
        result = torch.empty_like(flat)
        for chunk in self._chunks(len(flat)):
            distances = self.distances(flat[chunk])
            logits = -sharpness[chunk, None].to(distances.dtype) * distances
            result[chunk] = inverse_cumulative(logits.softmax(-1), thresholds[chunk])
        return result.view_as(clean)

    def step(
        self, state: torch.Tensor, drawn: torch.Tensor, time: float, next_time: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """Jumps at the rates u(x <- z | x1) = p_t(x | x1) beta_t' [d(z, x1) - d(x, x1)]_+ of `time`."""
        flat_state, flat_drawn = state.reshape(-1), drawn.reshape(-1)
        jumps, places = uniforms[0].reshape(-1), uniforms[1].reshape(-1)
        sharpness = float(self.sharpness(torch.tensor(time, dtype=torch.float64)))
        speed = self.speed(time) * (next_time - time)
        result = flat_state.clone()
        for chunk in self._chunks(len(flat_state)):
            distances = self.distances(flat_drawn[chunk])
            gain = (distances.gather(1, flat_state[chunk, None]) - distances).clamp_(min=0)
            rates = (-sharpness * distances).softmax(-1).mul_(gain)
            total = rates.sum(-1)
            moves = (jumps[chunk] < -torch.expm1(-speed * total.double())) & (total > 0)
            result[chunk] = torch.where(moves, inverse_cumulative(rates, places[chunk]), flat_state[chunk])
        return result.view_as(state)

    def finish(self, state: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return drawn

    def sharpness(self, time: torch.Tensor) -> torch.Tensor:
        """beta_t."""
        time = time.clamp(0.0, LATEST_TIME)
        return self.c * (time / (1 - time)) ** self.alpha

    def speed(self, time: float) -> float:
        """d beta_t / dt."""
        time = min(max(time, EARLIEST_RATE_TIME), LATEST_TIME)
        found: float = self.c * self.alpha * time ** (self.alpha - 1) / (1 - time) ** (self.alpha + 1)
        return found

    def distances(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 [n, codes], squared distances of unit vectors."""
        if codes.device not in self._copies:
            self._copies[codes.device] = self.codebook.to(codes.device)
        codebook = self._copies[codes.device]
        return (2.0 - 2.0 * codebook[codes] @ codebook.T).clamp_(min=0.0)

    def describe(self) -> dict[str, Any]:
        return {"path": self.name, "c": self.c, "alpha": self.alpha, "codebook": codebook_hash(self.codebook)}

    def _chunks(self, num_tokens: int) -> Iterator[slice]:
        at_once = max(1, ELEMENTS_AT_ONCE // self.num_codes)
        for start in range(0, num_tokens, at_once):
            yield slice(start, start + at_once)


@dataclass(frozen=True)
class FromReferencePath:
    """Another path, but images with a reference begin as the reference: x1 with probability t, else its code at that place.

    `references`: int64 [B, N], -1 where a code has none; such codes take the other path. A step draws tokens with a reference
    anew from p_t'(. | drawn), which keeps the marginals of any path.
    """

    path: DiscretePath
    references: torch.Tensor = field(default_factory=lambda: torch.full((1, 1), -1))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def num_codes(self) -> int:
        return self.path.num_codes

    def start(self, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.where(self.references >= 0, self.references, self.path.start(uniforms))

    def corrupt(self, clean: torch.Tensor, time: Time, uniforms: torch.Tensor) -> torch.Tensor:
        mixed = torch.where(uniforms[0] < time, clean, self.references)
        return torch.where(self.references >= 0, mixed, self.path.corrupt(clean, time, uniforms))

    def step(
        self, state: torch.Tensor, drawn: torch.Tensor, time: float, next_time: float, uniforms: torch.Tensor
    ) -> torch.Tensor:
        mixed = torch.where(uniforms[0] < next_time, drawn, self.references)
        return torch.where(self.references >= 0, mixed, self.path.step(state, drawn, time, next_time, uniforms))

    def finish(self, state: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return torch.where(self.references >= 0, drawn, self.path.finish(state, drawn))

    def describe(self) -> dict[str, Any]:
        return self.path.describe() | {"start": "reference"}


def behind(path: DiscretePath, references: torch.Tensor) -> DiscretePath:
    """The path of images with these `references` before them (see `FromReferencePath`), which most paths do not read."""
    return replace(path, references=references) if isinstance(path, FromReferencePath) else path


def make_path(described: dict[str, Any], num_codes: int, codebook: torch.Tensor | None = None) -> DiscretePath:
    """The path of `describe`. Raises `UserError` where it was calibrated for another codebook."""
    path = _make_path_from_noise(described, num_codes, codebook)
    return FromReferencePath(path) if described.get("start") == "reference" else path


def _make_path_from_noise(described: dict[str, Any], num_codes: int, codebook: torch.Tensor | None) -> DiscretePath:
    name = described.get("path")
    if name == "uniform":
        return UniformPath(num_codes)
    if name == "mask":
        return MaskPath(num_codes)
    assert name == "metric", f"no path {name!r}"
    assert codebook is not None, "the metric path needs the codebook"
    path = MetricPath(codebook, float(described["c"]), float(described["alpha"]))
    recorded, found = described.get("codebook"), codebook_hash(path.codebook)
    if recorded is not None and recorded != found:
        raise UserError(
            "the path was calibrated for another codebook",
            expected=f"codebook {recorded}",
            got=found,
            fix="use the vision tokenizer that the checkpoint names, or train with the objective dida again",
        )
    return path


def state_ids(states: Any, path: DiscretePath, vocabulary: Vocabulary) -> Any:
    """Token ids of a path's states (numpy or torch): a masked code is read as padding, which no image holds."""
    masked = states == path.num_codes
    return (states + vocabulary.visual_start) * ~masked + vocabulary.pad * masked


def codebook_hash(normalised: torch.Tensor) -> str:
    """Of normalised codebook vectors, rounded so that no kernel's last bit matters."""
    rounded = (normalised.detach().cpu().float() * 2**12).round().to(torch.int16).contiguous()
    return hashlib.blake2b(rounded.numpy().tobytes(), digest_size=16).hexdigest()


def inverse_cumulative(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 [n]: an index a row of non-negative `weights` [n, K], drawn by `uniforms` float64 [n] in [0, 1)."""
    cumulative = weights.double().cumsum(-1)
    threshold = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def shifted(time: torch.Tensor, shift: float) -> torch.Tensor:
    """URSA's time shift t / (t + s (1 - t)): s > 1 spends more of the steps near noise."""
    return time / (time + shift * (1 - time))


def _any_code(uniforms: torch.Tensor, num_codes: int | torch.Tensor) -> torch.Tensor:
    return (uniforms * num_codes).long()


def _skip(number: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The `number`-th code that is neither `first` nor `second`."""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    number = number + (number >= low)
    return number + ((number >= high) & (high != low))
