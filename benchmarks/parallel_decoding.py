"""Does parallel decoding keep what token-by-token decoding knows of whole images, in how many steps, and how fast?

    python -m benchmarks.parallel_decoding --side 8 --seeds 5 --out parallel_64.json
    python -m benchmarks.parallel_decoding --side 16 --steps 4 8 16 --seeds 5 --out parallel_256.json
    python -m benchmarks.parallel_decoding --side 16 --paths --diagonal --seeds 1  # anti-diagonals alone
    python -m benchmarks.parallel_decoding --side 16 --steps 16 --teacher-steps 0 --adaptation-steps 0  # times alone

A world of `side` x `side` codes: the prompt says the colour of each row, the colour of a cell follows from it and from the
column, and each row has one hidden texture of four, which no prompt says. Colours alone are marginal structure; joint
structure is that a row has one texture: independent draws give 4^(1 - side) of the rows. A decoder that always draws the
same texture is consistent as well, so the entropy of the textures stands beside (1: uniform), over all prompts and among 16
answers to one prompt (.93 at most on average, being estimated from so few).

A fresh model learns the world token by token, answers prompts itself, and is adapted to those answers by the objective
`dida` on the real engine, and with `--diagonal` once more from the same weights by the objective `diagonal`. Then the real
strategies decode, `ar` at temperature 1 as well; in `dida_S_renoised` every step begins from what was drawn, noised anew, in `dida_S_causal` the
second half of the steps are causal (`decoding.dida.causal_steps`). Controls: one step; one greedy step, from noise of each
image's own and from the same for all (`one_start`: nothing is left to chance); the mask path (`--paths metric mask`) at 4 steps;
diagonals before their adaptation. Seconds are those of one answer at batch 1, medians of the clock and of this process
(OMP_NUM_THREADS=1 makes the latter comparable on a busy machine).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.batch import MicroBatch, build_micro_batch
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from model.config import ModelConfig
from model.generation.decoding_config import DecodingConfig, DenoiseConfig
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.image_decoder import ImageDecoder
from model.generation.paths import DiscretePath, MaskPath, MetricPath, UniformPath
from model.generation.settings import PhaseSampling, SamplingConfig
from model.generation.strategies import DecodingMetrics, Strategy, make_strategy
from model.vocabulary import Vocabulary, VocabularyConfig
from training.config import OptimizerConfig, StageConfig, TrainConfig
from training.engines.megatron.engine import MegatronEngine
from training.objectives.diagonal import Diagonal
from training.objectives.dida import Dida
from training.objectives.dida_rows import RowsWithCopies
from training.objectives.image_copies import ImageCopiesObjective
from training.objectives.next_token import NextToken

COLOURS, TEXTURES = 6, 4
DIGITS, STAR = list(range(10, 20)), 20
VOCABULARY = VocabularyConfig(text_size=32, reserved_size=16, visual_size=COLOURS * TEXTURES, pad_multiple=64)
IDS = Vocabulary.from_config(VOCABULARY)
REPEATED_PROMPTS, ANSWERS = 32, 16  # prompts that are asked several times, for the entropy of one prompt's answers
GREEDY_CONTROL = DenoiseConfig(steps=1, temperature=0.0, last_temperature=0.0)


@dataclass
class World:
    side: int

    def prompt(self, colours: np.ndarray) -> list[int]:
        return [IDS.bos, *colours.tolist()]

    def document(self, colours: np.ndarray, codes: np.ndarray) -> list[int]:
        rows = [[*(IDS.visual_start + row).tolist(), IDS.eol] for row in codes]
        size = [DIGITS[int(digit)] for digit in str(self.side)]
        header = [IDS.boi, *size, STAR, *size, IDS.img]
        return [*self.prompt(colours), *header, *[token for row in rows for token in row][:-1], IDS.eoi]

    def colours(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.integers(0, COLOURS, (count, self.side))

    def codes(self, rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
        """int64 [side, side] of one prompt."""
        textures = rng.integers(0, TEXTURES, (self.side, 1))
        return self.cell_colours(colours) * TEXTURES + textures

    def cell_colours(self, colours: np.ndarray) -> np.ndarray:
        found: np.ndarray = (colours[:, None] + np.arange(self.side)[None]) % COLOURS
        return found

    def judge(self, colours: np.ndarray, codes: np.ndarray) -> dict[str, float]:
        """`joint`: share of rows of one texture in the right colours; `entropy` of first cells' textures."""
        textures = codes % TEXTURES
        right = np.stack([self.cell_colours(one) for one in colours]) == codes // TEXTURES
        joint = ((textures == textures[..., :1]) & right).all(-1).mean()
        shares = np.bincount(textures[..., 0].ravel(), minlength=TEXTURES) / textures[..., 0].size
        entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum() / math.log(TEXTURES)
        return {"joint": float(joint), "colours": float(right.mean()), "entropy": float(entropy)}

    def entropy_of_a_prompt(self, codes: np.ndarray) -> float:
        """The mean over prompts and rows of the entropy of first cells' textures; codes int64 [prompts, answers, side, side]."""
        textures = codes[..., 0] % TEXTURES
        shares = (textures[..., None] == np.arange(TEXTURES)).mean(1)
        entropies = -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1) / math.log(TEXTURES)
        return float(entropies.mean())


def rows_of(documents: list[list[int]], num_prompt: int) -> MicroBatch:
    """A document a row: a prompt without loss, then the image."""
    length = len(documents[0])
    segments = np.zeros((len(documents), 2), SEGMENT_DTYPE)
    segments["kind"] = [Kind.TEXT, Kind.IMAGE]
    segments["flags"] = [Flag.DOCUMENT_START | Flag.NO_LOSS, 0]
    segments["start"], segments["length"] = [0, num_prompt], [num_prompt, length - num_prompt]
    segments["row"] = np.arange(len(documents))[:, None]
    weights = np.ones(3, np.float32)
    return build_micro_batch(np.array(documents, np.int64), segments.reshape(-1), weights, "document", IDS)


class Documents:
    """Stands for a `PackedDataSource`: batch n of documents drawn by `draw(n)`."""

    fingerprint = "made"

    def __init__(self, world: World, draw: Any) -> None:
        self.world, self.draw = world, draw

    def batch(self, first_sample: int) -> list[MicroBatch]:
        return [rows_of(self.draw(first_sample), self.world.side + 1)]

    def close(self) -> None: ...


def configuration(world: World, options: argparse.Namespace, seed: int) -> TrainConfig:
    length = len(world.document(np.zeros(world.side, np.int64), np.zeros((world.side, world.side), np.int64)))
    model = ModelConfig(
        num_layers=3,
        hidden_size=options.width,
        ffn_hidden_size=3 * options.width,
        num_attention_heads=4,
        num_query_groups=4,
        head_dim=options.width // 4,
        init_std=0.08,
        max_sequence_length=2 * length,
        vocabulary=VOCABULARY,
    )
    optimizer = OptimizerConfig(learning_rate=2e-3, beta2=0.98, weight_decay=0.01, gradient_clip=1.0)
    stage = StageConfig(
        sequence_length=length,
        global_batch_size=options.batch,
        micro_batch_size=options.batch,
        optimizer=optimizer,
        steps=options.adaptation_steps,
    )
    return TrainConfig(model=model, stage=stage, seed=seed)


def codebook() -> torch.Tensor:
    """Unit vectors in clusters by colour."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(COLOURS, 8))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = np.repeat(centres, TEXTURES, 0) + 0.35 * rng.normal(size=(COLOURS * TEXTURES, 8)) * 1.5 / math.sqrt(8)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).float()


def path_of(name: str) -> DiscretePath:
    num_codes = COLOURS * TEXTURES
    others: dict[str, DiscretePath] = {"uniform": UniformPath(num_codes), "mask": MaskPath(num_codes)}
    return others.get(name) or MetricPath(codebook(), 10.0, 0.9)


class Trial:
    """One seed: a model, what it has learnt, and how it decodes."""

    def __init__(self, world: World, options: argparse.Namespace, seed: int) -> None:
        self.world, self.options, self.seed = world, options, seed
        self.config = configuration(world, options, seed)
        self.engine = MegatronEngine(self.config)

    def learn(self, objective: Any, rows: Any, steps: int) -> None:
        objective.source_names = ["world"]
        peak = self.config.stage.optimizer.learning_rate
        for step in range(steps):
            batches = rows.batch(step * self.options.batch)
            result = objective.result(*self.engine.forward_backward(batches, objective).read())
            rate = peak * min(1.0, (step + 1) / 20) * (1 - step / steps)
            self.engine.optimizer_step(rate, result.gradient_norm)
            if step % 100 == 0:
                print(f"seed {self.seed} {type(objective).__name__} step {step} loss {result.loss:.3f}", flush=True)

    def teach(self) -> None:
        """The world itself, token by token."""

        def draw(first: int) -> list[list[int]]:
            rng = np.random.default_rng([self.seed, first])
            colours = self.world.colours(rng, self.options.batch)
            return [self.world.document(one, self.world.codes(rng, one)) for one in colours]

        objective = NextToken(self.config, NextToken.Options())
        self.learn(objective, Documents(self.world, draw), self.options.teacher_steps)

    def adapt(self, objective: ImageCopiesObjective, samples: list[list[int]]) -> None:
        """The model's own answers, with copies of their images."""

        def draw(first: int) -> list[list[int]]:
            rng = np.random.default_rng([self.seed, 1, first])
            return [samples[index] for index in rng.integers(0, len(samples), self.options.batch)]

        room = self.config.stage.sequence_length
        rows = RowsWithCopies(Documents(self.world, draw), IDS, self.seed, room, self.options.batch, 0)  # type: ignore[arg-type]
        self.learn(objective, rows, self.options.adaptation_steps)

    def strategy(self, decoding: DecodingConfig, path: DiscretePath | None, batch: int = 128) -> Strategy:
        options = GrammarOptions(begin_with_image=True, max_images=1, stop_after_images=1)
        grammar = ImageGrammar(IDS, DIGITS, STAR, options, self.engine.device)
        decoder = ImageDecoder(self.engine.model)
        return make_strategy(decoding, decoder, grammar, path, DecodingMetrics(), batch, learnt_diagonals=True)

    def ask(self, strategy: Strategy, colours: np.ndarray, one_stream: bool = False) -> np.ndarray:
        """int64 [n, side, side], one picture a prompt; `one_stream`: every picture by the same random numbers."""
        size = self.world.side
        sampling = SamplingConfig(text=PhaseSampling(0.0), image=PhaseSampling(), max_new_tokens=2 * size**2 + 16)
        prompts = [self.world.prompt(one) for one in colours]
        streams = [0] * len(prompts) if one_stream else list(range(len(prompts)))
        found, batch = [], strategy.generator.max_batch_size
        for first in range(0, len(prompts), batch):
            asked = prompts[first : first + batch]
            grids = [(size, size)] * len(asked)
            found += strategy.sample(asked, sampling, self.seed, grids, None, streams[first : first + batch])
        codes = [IDS.ids_to_codes(one.ids[IDS.is_visual(one.ids)]) for one in found]
        return np.stack(codes).reshape(-1, size, size)

    @contextmanager
    def decoding_mode(self) -> Iterator[None]:
        """As a loaded checkpoint is."""
        self.engine.model.eval().post_process = True
        yield
        self.engine.model.train().post_process = False

    def measure(
        self, decoding: DecodingConfig, path: DiscretePath | None, colours: np.ndarray, one_stream: bool = False
    ) -> dict[str, float]:
        repeated = np.repeat(colours[:REPEATED_PROMPTS], ANSWERS, axis=0)
        with self.decoding_mode():
            strategy = self.strategy(decoding, path)
            codes, answers = (self.ask(strategy, asked, one_stream) for asked in (colours, repeated))
        diversity = self.world.entropy_of_a_prompt(answers.reshape(-1, ANSWERS, *answers.shape[1:]))
        return self.world.judge(colours, codes) | {"entropy_of_a_prompt": diversity}

    def times(
        self, decodings: dict[str, DecodingConfig], path: DiscretePath | None, colours: np.ndarray
    ) -> dict[str, dict[str, float]]:
        """Of one answer at batch 1, medians. The decoders take turns: what else the machine does strikes all of them alike."""
        seconds: dict[str, list[float]] = {name: [] for name in decodings}
        process_seconds: dict[str, list[float]] = {name: [] for name in decodings}
        with self.decoding_mode():
            strategies = {name: self.strategy(one, path, batch=1) for name, one in decodings.items()}
            for prompt in [colours[:1], *np.split(colours, len(colours))]:  # one to warm up
                for name, strategy in strategies.items():
                    before, started = strategy.metrics.seconds, time.process_time()
                    self.ask(strategy, prompt)
                    seconds[name].append(strategy.metrics.seconds - before)
                    process_seconds[name].append(time.process_time() - started)
        of_ar = np.median(seconds["ar"][1:])
        return {
            name: {
                "seconds": float(np.median(seconds[name][1:])),
                "process_seconds": float(np.median(process_seconds[name][1:])),
                "times_as_fast_as_ar": float(of_ar / np.median(seconds[name][1:])),
                "num_forwards": strategy.metrics.num_forwards / strategy.metrics.num_answers,
            }
            for name, strategy in strategies.items()
        }

    def run(self) -> dict[str, Any]:
        options, ar = self.options, DecodingConfig("ar")
        rng = np.random.default_rng([self.seed, 2])
        held_out, asked = self.world.colours(rng, options.prompts), self.world.colours(rng, options.samples)
        started = time.monotonic()
        self.teach()
        before = self.measure(ar, None, held_out)
        samples: list[list[int]] = []
        if options.adaptation_steps:
            with self.decoding_mode():
                codes = self.ask(self.strategy(ar, None), asked)
            samples = [self.world.document(one, image) for one, image in zip(asked, codes, strict=True)]
        taught = {name: value.clone() for name, value in self.engine.model.state_dict().items() if value is not None}
        found: dict[str, Any] = {"seed": self.seed, "ar_before": before}
        for name in [*options.paths, *(["diagonal"] if options.diagonal else [])]:
            self.engine = MegatronEngine(self.config)  # with fresh state of the optimizer
            self.engine.model.load_state_dict(taught, strict=False)
            objective = self.objective(name)
            if name == "diagonal":  # what the order costs a model that has not learnt it
                found["diagonal_before"] = self.measure(DecodingConfig("diagonal"), None, held_out)
            if samples:
                self.adapt(objective, samples)
            found[name] = self.figures(objective.path if isinstance(objective, Dida) else None, held_out)
        return found | {"wall_seconds": time.monotonic() - started}

    def objective(self, name: str) -> ImageCopiesObjective:
        if name == "diagonal":
            return Diagonal(self.config, Diagonal.Options())
        dida = Dida(self.config, Dida.Options(path="uniform"))
        dida.path = path_of(name)
        return dida

    def figures(self, path: DiscretePath | None, held_out: np.ndarray) -> dict[str, Any]:
        """Without a path the model has learnt diagonals."""
        decodings = {"ar": DecodingConfig("ar")}
        if path is None:
            decodings["diagonal"] = DecodingConfig("diagonal")
        else:
            schedule = "cosine" if path.name == "mask" else "linear"
            for steps in sorted({1, *self.options.steps}):
                decodings[f"dida_{steps}"] = DecodingConfig("dida", DenoiseConfig(steps=steps, schedule=schedule))
            for steps in self.options.steps:
                renoised = DenoiseConfig(steps=steps, schedule=schedule, corrector=0.0, corrector_share=1.0)
                decodings[f"dida_{steps}_renoised"] = DecodingConfig("dida", renoised)
                if steps > 1:
                    causal = DenoiseConfig(steps=steps, schedule=schedule, causal_steps=steps // 2)
                    decodings[f"dida_{steps}_causal"] = DecodingConfig("dida", causal)
        times = self.times(decodings, path, held_out[: self.options.single])
        found: dict[str, Any] = {
            name: self.measure(decoding, path, held_out) | times[name] for name, decoding in decodings.items()
        }
        if path is not None:
            greedy = DecodingConfig("dida", GREEDY_CONTROL)
            found["dida_1_greedy"] = self.measure(greedy, path, held_out)
            found["dida_1_greedy_one_start"] = self.measure(greedy, path, held_out, one_stream=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--paths", nargs="*", default=["metric"], choices=["metric", "uniform", "mask"])
    parser.add_argument("--diagonal", action="store_true", help="also adapt to decoding by anti-diagonals")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--adaptation-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4096, help="of the model's own answers to learn from")
    parser.add_argument("--prompts", type=int, default=512, help="held out")
    parser.add_argument("--single", type=int, default=4, help="prompts asked one at a time for the seconds")
    parser.add_argument("--width", type=int, default=96, help="of the model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        found.append(Trial(World(options.side), options, seed).run())
        print(json.dumps(found[-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps({"options": vars(options) | {"out": str(options.out)}, "trials": found}))


if __name__ == "__main__":
    main()
