"""Strategies of decoding behind one interface: `ar`, `dida`, `diagonal`, `sjd`, `verified`. Each measures what it does.

| strategy | forward passes of an image of N codes | distribution |
|---|---|---|
| ar | N; forced tokens are read with those behind them | the model's |
| dida | steps, + 1 | of the noisy copies, changed by causal steps; a checkpoint of the objective `dida` |
| diagonal | H + W - 1, + 1 for H x W codes | that of copies read by diagonals; a checkpoint of the objective `diagonal` |
| sjd | as many rounds as guesses need, + 1 | the model's, exactly; no training |
| verified | steps that are not causal + 2 for each round, + 1 | the model's, exactly; guesses are DiDA's last draws |

The one more is the commit pass, which the image that ends an answer does without.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from model.errors import UserError
from model.generation.ar import ARGenerator, Generation
from model.generation.causal_steps import redraw_implausible
from model.generation.decoding_config import DecodingConfig, DenoiseConfig, not_trained_for
from model.generation.denoise import denoise, step_times
from model.generation.diagonals import DiagonalPhase
from model.generation.grammar import ImageGrammar
from model.generation.image_decoder import ImageDecoder
from model.generation.image_phases import GuidedImages, PhaseGenerator
from model.generation.paths import NUM_UNIFORMS, DiscretePath, behind, state_ids
from model.generation.sampling import allowed_log_probs, truncate
from model.generation.settings import PhaseSampling
from model.generation.speculative import UniformDraws, next_jacobi_guess, speculative_round

NUMBERS_APART = 1 << 12  # streams of random numbers of one image


@dataclass
class DecodingMetrics:
    """What strategies did so far. One forward pass serves the whole batch."""

    num_forwards: int = 0
    num_tokens: int = 0
    num_answers: int = 0
    seconds: float = 0.0

    @property
    def tokens_a_forward(self) -> float:
        return self.num_tokens / max(1, self.num_forwards)


class Strategy:
    """A generator of one name, measured. `metrics` is shared by the generators that one model makes."""

    def __init__(self, name: str, generator: ARGenerator, decoder: Any, metrics: DecodingMetrics) -> None:
        self.name, self.generator, self.decoder, self.metrics = name, generator, decoder, metrics

    def sample(self, *arguments: Any) -> list[Generation]:
        """As `ARGenerator.sample`."""
        started, before = time.perf_counter(), getattr(self.decoder, "num_forwards", 0)
        found = self.generator.sample(*arguments)
        self.metrics.seconds += time.perf_counter() - started
        self.metrics.num_forwards += getattr(self.decoder, "num_forwards", 0) - before
        self.metrics.num_tokens += sum(len(one.ids) for one in found)
        self.metrics.num_answers += len(found)
        return found


def make_strategy(
    config: DecodingConfig,
    decoder: Any,
    grammar: ImageGrammar,
    path: DiscretePath | None,
    metrics: DecodingMetrics,
    max_batch_size: int = 256,
    *,
    learnt_diagonals: bool = False,
) -> Strategy:
    """`path` is that of the checkpoint's DiDA training; `learnt_diagonals`: the objective `diagonal` trained it.

    Raises `UserError` for a checkpoint that was not trained for the strategy.
    """
    name = config.strategy
    if name == "ar":
        return Strategy(name, ARGenerator(decoder, grammar, max_batch_size), decoder, metrics)
    assert isinstance(decoder, ImageDecoder), "decoding images as wholes needs an ImageDecoder"
    if name == "sjd":
        phase: Any = JacobiPhase(config.window)
        spare = 2 * config.window + 1
    elif name == "diagonal":
        if not learnt_diagonals:
            raise not_trained_for(name, "diagonal")
        phase, spare = DiagonalPhase(), 0
    else:
        if path is None:
            raise not_trained_for(name, "dida")
        phase = DidaPhase(config.dida, path) if name == "dida" else VerifiedPhase(config.dida, path)
        spare = 0
    return Strategy(name, PhaseGenerator(decoder, grammar, phase, max_batch_size, spare), decoder, metrics)


class DidaPhase:
    """`config.steps` looks behind the exact prefix: at a noisy copy, and in the last `causal_steps` at what was drawn."""

    def __init__(self, config: DenoiseConfig, path: DiscretePath) -> None:
        self.config, self.path = config, path

    def decode(self, images: GuidedImages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_codes = len(images.block.places)
        check_steps(self.config.steps, num_codes)
        path, config = behind(self.path, images.references), self.config.before_causal()
        codes, log_probs = denoise(
            noisy_logits(images, path, config),
            path,
            config,
            step_numbers(images, num_codes),
            temperature=images.sampling.image.temperature,
            top_k=images.sampling.image.top_k,
        )
        for _ in range(self.config.causal_steps):
            codes, log_probs = self._read_causally(images, codes)
        return codes, log_probs, torch.zeros(len(codes), dtype=torch.int64)

    def _read_causally(self, images: GuidedImages, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = looks_at_codes(images, whole=False)(codes)
        probabilities = code_probabilities(logits, images.sampling.image)
        uniforms = images.uniforms(NUMBERS_APART, codes.shape[1])
        found = redraw_implausible(logits, probabilities, codes, self.config.plausible, uniforms)
        return found, logits.float().log_softmax(-1).gather(-1, found[..., None]).squeeze(-1)


class JacobiPhase:
    """Speculative Jacobi decoding (arXiv 2410.01699), with guesses drawn anew in each round."""

    def __init__(self, window: int) -> None:
        self.window = window

    def decode(self, images: GuidedImages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_codes = len(images.block.places)
        vocabulary = images.grammar.vocabulary
        width = min(self.window, num_codes)
        walk = _Walk(images, num_codes)
        guess = torch.full(
            (walk.num_rows, width, vocabulary.visual_size), 1 / vocabulary.visual_size, dtype=torch.float64
        ).to(walk.device)
        while walk.goes_on():
            num_decided, _, said = walk.round(guess)
            guess = next_jacobi_guess(said, num_decided)
        return walk.codes, walk.log_probs, walk.num_read


class VerifiedPhase:
    """DiDA's last draw as the guess of all codes that are left; then the rest is noised again, behind what is decided."""

    def __init__(self, config: DenoiseConfig, path: DiscretePath) -> None:
        self.config, self.path = config.before_causal(), path

    def decode(self, images: GuidedImages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_codes = len(images.block.places)
        check_steps(self.config.steps, num_codes)
        last_time, path = step_times(self.config)[-2], behind(self.path, images.references)
        denoiser, walk = noisy_logits(images, path, self.config), _Walk(images, num_codes, keeps=False)
        numbers = step_numbers(images, num_codes)
        draft = state = path.start(numbers(-1, NUM_UNIFORMS))
        if self.config.steps > 1:
            draft, _ = denoise(denoiser, path, self.config, numbers, temperature=images.sampling.image.temperature)
        while walk.goes_on():
            if self.config.steps > 1:
                again = images.uniforms(walk.next_stream(), NUM_UNIFORMS * num_codes).view(-1, NUM_UNIFORMS, num_codes)
                state = path.corrupt(draft, last_time, again.transpose(0, 1))
            columns = torch.arange(num_codes, device=walk.device)
            state = torch.where(columns < walk.accepted[:, None], walk.codes, state)
            guess = code_probabilities(denoiser(state, last_time), images.sampling.image)
            places = (walk.accepted[:, None] + columns).clamp(max=num_codes - 1)
            window = guess.gather(1, places[..., None].expand(-1, -1, guess.shape[-1]))
            before = walk.accepted
            _, guesses, _ = walk.round(window)
            of_code = (columns - before[:, None]).clamp(min=0)
            draft = torch.where(columns < walk.accepted[:, None], walk.codes, guesses.gather(1, of_code))
        return walk.codes, walk.log_probs, walk.num_read


class _Walk:
    """Images of which the first codes are decided, and rounds that decide more.

    With `keeps` decided tokens stay in the cache. Noisy copies begin where the image does, so their cache ends there.
    """

    def __init__(self, images: GuidedImages, num_codes: int, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.images, self.num_codes, self.device = images, num_codes, images.block.tokens.device
        self.num_rows, self.rounds = images.num_rows, 0
        self.codes = torch.zeros((self.num_rows, num_codes), dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(self.codes.shape, device=self.device)
        self.accepted = torch.zeros(self.num_rows, dtype=torch.int64, device=self.device)
        self.num_read = torch.zeros_like(self.accepted)  # tokens of the block that are in the cache
        self.draws = UniformDraws(lambda count: images.uniforms(self.next_stream(), count))

    def next_stream(self) -> int:
        self.rounds += 1
        return NUMBERS_APART + self.rounds

    def goes_on(self) -> bool:
        return bool((self.accepted < self.num_codes).any())

    def round(self, guess: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One round for `guess` [R, w, codes]: how many codes it decided [R], the guesses [R, w], what was said of them."""
        left, at = self.num_codes - self.accepted, self.accepted
        codes, num_decided, guesses, said = speculative_round(guess, self._said, left, self.draws)
        columns = torch.arange(guess.shape[1], device=self.device)
        rows, places = torch.nonzero(columns < num_decided[:, None], as_tuple=True)
        targets = at[rows] + places
        self.codes[rows, targets] = codes[rows, places]
        self.log_probs[rows, targets] = said[rows, places, codes[rows, places]].log().float()
        self.accepted = at + num_decided
        if not self.keeps:
            return num_decided, guesses, said
        # The last decided code is read at the beginning of the next round: what was looked at there may be another.
        now = torch.where(self.accepted > 0, self.images.block.places[self.accepted.clamp(min=1) - 1], 0)
        self.images.keep(now - self.num_read)
        self.num_read = now
        return num_decided, guesses, said

    def _said(self, guesses: torch.Tensor) -> torch.Tensor:
        places, width = self.images.block.places, guesses.shape[1]
        codes = torch.cat((self.codes, torch.zeros_like(guesses)), 1)
        codes.scatter_(1, self.accepted[:, None] + torch.arange(width, device=self.device), guesses)
        vocabulary = self.images.grammar.vocabulary
        tokens = self.images.block.with_ids(vocabulary.codes_to_ids(codes[:, : self.num_codes]))
        window = (self.accepted[:, None] + torch.arange(width, device=self.device)).clamp(max=self.num_codes - 1)
        before = places[window] - 1 - self.num_read[:, None]  # the tokens whose logits say the codes, as they are fed
        before = before.clamp(min=0)  # of images that are done
        fed = self.num_read[:, None] + torch.arange(int(before.max()) + 1, device=self.device)
        tokens = tokens.gather(1, fed.clamp(max=tokens.shape[1] - 1))
        return code_probabilities(self.images.logits(tokens, before, whole=False), self.images.sampling.image)


def code_probabilities(logits: torch.Tensor, settings: PhaseSampling) -> torch.Tensor:
    """float64 [R, n, codes]: the distribution that token-by-token decoding draws codes from."""
    if settings.greedy:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    flat = truncate(allowed_log_probs(logits.flatten(0, 1), None, settings.temperature), settings)
    return torch.softmax(flat.double(), dim=-1).view(logits.shape)


def noisy_logits(images: GuidedImages, path: DiscretePath, config: DenoiseConfig) -> Any:
    """The model's prediction of clean codes from noisy copies behind the cached prefix."""
    look = looks_at_codes(images, whole=True, path=path)
    return lambda state, time: look(state, guided=time < config.guidance_until)


def looks_at_codes(images: GuidedImages, *, whole: bool, path: DiscretePath | None = None) -> Any:
    """Logits float32 [R, N, codes] of all codes of images that hold codes int64 [R, N], or states of `path`, now.

    `whole`: as the noisy copies that the objective `dida` trains; else as token-by-token decoding reads them.
    """
    places, vocabulary = images.block.places, images.grammar.vocabulary
    length = int(places[-1]) + 1
    before = (places - 1).expand(images.num_rows, -1)

    def logits(codes: torch.Tensor, *, guided: bool = True) -> torch.Tensor:
        ids = vocabulary.codes_to_ids(codes) if path is None else state_ids(codes, path, vocabulary)
        tokens = images.block.with_ids(ids)[:, :length]
        images.show(tokens)
        return images.logits(tokens, before, whole=whole, guided=guided)

    return logits


def step_numbers(images: GuidedImages, num_codes: int) -> Any:
    def numbers(step: int, count: int) -> torch.Tensor:
        return images.uniforms(step + 1, count * num_codes).view(-1, count, num_codes).transpose(0, 1)

    return numbers


def check_steps(steps: int, num_codes: int) -> None:
    if steps > num_codes:
        raise UserError(
            "more decoding steps than an image has tokens",
            expected=f"at most {num_codes}, of the smallest image",
            got=str(steps),
            fix=f"decoding.dida.steps={num_codes}, or decoding.strategy=ar",
        )
