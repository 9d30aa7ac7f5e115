"""The stage that trains the IBQ vision tokenizer, on one process.

Our choices, where Emu3.5 has published none: the autoencoder first trains without quantization, then the codes start
from its latents (k-means), then all train together. Plain random codes collapse on simple pictures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from model.errors import Problems, UserError
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import codes_from_latents, flat_latents, initialize_weights
from model.vision_tokenizer.losses import LossWeightsConfig, psnr_db
from model.vision_tokenizer.wrapper import CHECKPOINT_KIND, MODEL_PREFIX, load_weights, to_model_range
from training.config import OptimizerConfig, TrainConfig
from training.engines.base import Shard, ShardReader, StepResult
from training.tokenizers.image_data import ImageDataOptions, ImageSource
from training.tokenizers.image_stream import StreamingImageSource
from training.tokenizers.vision_terms import Adversary, Terms, TermsConfig, adam, moments

if TYPE_CHECKING:
    from training.stage import Job

OPTIMIZER_PREFIX = "optimizer/"
KMEANS_ROUNDS = 4
CALIBRATION_BATCHES = 30  # batches whose latents the codes start from


@dataclass
class VisionTokenizerOptions:
    """`stage.options` of the objective `vision_tokenizer`."""

    model: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    losses: LossWeightsConfig = field(default_factory=LossWeightsConfig)
    terms: TermsConfig = field(default_factory=TermsConfig)
    data: ImageDataOptions = field(default_factory=ImageDataOptions)
    continuous_steps: int = 0  # first steps without the quantizer; then the codes start from latents
    average_decay: float = 0.0  # of the moving average of the weights; 0: none is kept
    num_threads: int = 1  # of torch; small models gain nothing from more
    min_codebook_use: float = 0.01  # share of codes used on the held-back images, below which the stage fails

    def validate(self) -> None:
        problems = Problems()
        self.model.validate(problems, "stage.options.model")
        self.terms.validate(problems, "stage.options.terms", len(self.model.ch_mult))
        self.data.validate(problems, "stage.options.data", self.model.factor)
        problems.check(self.continuous_steps >= 0, "stage.options.continuous_steps", "must not be negative")
        problems.check(0 <= self.average_decay < 1, "stage.options.average_decay", "must be in [0, 1)")
        problems.check(self.num_threads > 0, "stage.options.num_threads", "must be positive")
        problems.check(0 <= self.min_codebook_use <= 1, "stage.options.min_codebook_use", "must be in [0, 1]")
        problems.raise_if_any()


def parse_options(values: dict[str, Any]) -> VisionTokenizerOptions:
    """The typed options out of `stage.options`; unknown keys and wrong types are refused."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(VisionTokenizerOptions), OmegaConf.create(values))
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(
            "stage.options does not fit the objective vision_tokenizer", where="stage.options", got=str(error)
        ) from None
    assert isinstance(options, VisionTokenizerOptions)
    options.validate()
    return options


def build(config: TrainConfig) -> Job:
    """The engine and the images of a stage."""
    from training.stage import Job

    options = parse_options(config.stage.options)
    if config.parallel.world_size != 1:
        raise UserError(
            "the vision tokenizer trains on one process",
            where="parallel",
            got=f"{config.parallel.world_size} ranks",
            fix="parallel.data=1",
        )
    stage = config.stage
    make = StreamingImageSource if options.data.streaming else ImageSource
    data = make(options.data, options.model.factor, config.seed, stage.global_batch_size, stage.micro_batch_size)
    engine = VisionTokenizerEngine(options, stage.optimizer, config.seed, data)
    return Job(engine, data, {"kind": CHECKPOINT_KIND, "model": asdict(options.model)})


class VisionTokenizerEngine:
    """A `training.engines.base.Engine` of a single process."""

    rank = 0
    world_size = 1
    data_parallel_rank = 0
    data_parallel_size = 1

    def __init__(
        self,
        options: VisionTokenizerOptions,
        optimizer: OptimizerConfig,
        seed: int,
        data: ImageSource | StreamingImageSource,
    ):
        torch.set_num_threads(options.num_threads)
        self.options, self.seed, self.data = options, seed, data
        self.gradient_clip = optimizer.gradient_clip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = IBQ(options.model)
        initialize_weights(model, seed)
        self.model = model.channels_last().to(self.device)
        self.terms = Terms(options.terms, options.losses, options.model, seed).to(self.device)
        self.trained = nn.ModuleDict({"model": self.model, "terms": self.terms})
        self.optimizer = adam(self.trained, optimizer)
        self.adversary: Adversary | None = None
        if options.terms.adversarial.weight:
            self.adversary = Adversary(options.terms.adversarial, optimizer, seed, self.device)
        self.num_updates = 0
        self.average: IBQ | None = None
        if options.average_decay:
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        self._gradient_norm = 0.0

    @property
    def quantizes(self) -> bool:
        return self.num_updates >= self.options.continuous_steps

    @property
    def playing(self) -> Adversary | None:
        """The adversary once it has joined."""
        joined = self.num_updates >= self.options.terms.adversarial.start_step
        return self.adversary if joined else None

    def forward_backward(self, micro_batches: Sequence[np.ndarray]) -> StepResult:
        """Gradients of the mean loss per pixel over images uint8 [n, H, W, 3] of any sizes."""
        if self.options.continuous_steps and self.num_updates == self.options.continuous_steps:
            self._start_codes()
        self.discard_gradients()
        num_pixels = sum(images[..., 0].size for images in micro_batches)
        terms: dict[str, float] = {}
        used: list[torch.Tensor] = []
        for images in micro_batches:
            share = images[..., 0].size / num_pixels
            for name, value in self._backward(images, share, used).items():
                terms[name] = terms.get(name, 0.0) + share * value
        gradients = [p.grad for p in self.trained.parameters() if p.grad is not None]
        self._gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        reported = self._gradient_norm
        if self.playing is not None:
            terms["discriminator_gradient_norm"] = self.playing.gradient_norm()
            if not math.isfinite(terms["discriminator_gradient_norm"]):  # the step must not be applied
                reported = terms["discriminator_gradient_norm"]
        num_codes = sum(codes.numel() for codes in used)
        if used:
            terms["codes_used"] = float(torch.cat(used).unique().numel())
        loss = terms.pop("loss")
        return StepResult(loss, reported, num_tokens=num_codes, extra=terms)

    def _backward(self, images: np.ndarray, share: float, used: list[torch.Tensor]) -> dict[str, float]:
        """Add the gradients of one array of images, weighted by `share`; the values of the loss's terms."""
        pixels = to_model_range(images).to(self.device)
        latents, quantized = self.model.latents(pixels), None
        if self.quantizes:
            quantized = self.model.quantize(latents)
            used.append(quantized.codes.flatten())
            latents = quantized.values
        elif self.options.model.cosine_similarity:
            latents = F.normalize(latents, dim=1)
        loss, reconstructions, terms = self.terms(self.model, pixels, latents, quantized, self.playing)
        (share * loss).backward()
        values = {f"loss_{name}": term.item() for name, term in terms.items()}
        if self.playing is not None:
            values["loss_discriminator"] = self.playing.backward(pixels, reconstructions, share)
        return values | {"loss": loss.item(), "psnr_db": psnr_db(pixels, reconstructions.detach()).item()}

    @torch.no_grad()
    def _start_codes(self) -> None:
        """Place the codes where the latents of training images lie. Depends on seed and weights only."""
        latents = [
            flat_latents(self.model, to_model_range(images).to(self.device)).cpu()
            for index in range(CALIBRATION_BATCHES)
            for images in self.data.batch(index * self.data.global_batch_size)
        ]
        codes = codes_from_latents(torch.cat(latents), self.options.model.n_embed, KMEANS_ROUNDS, self.seed)
        self.model.quantize.embedding.weight.copy_(codes)

    def optimizer_step(self, learning_rate: float) -> None:
        if self.gradient_clip > 0 and self._gradient_norm > self.gradient_clip:
            for parameter in self.trained.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.gradient_clip / self._gradient_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        if self.adversary is not None:
            self.adversary.step(learning_rate)
        self.discard_gradients()
        self.num_updates += 1
        if self.average is not None:
            # The average starts late enough to forget the first weights.
            decay = min(self.options.average_decay, (1 + self.num_updates) / (10 + self.num_updates))
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary is not None:
            self.adversary.discard_gradients()

    def model_shards(self) -> list[Shard]:
        """The weights to use: the moving average where one is kept."""
        return shards_of(MODEL_PREFIX, (self.average or self.model).state_dict())

    def optimizer_shards(self) -> list[Shard]:
        """Moments, counters, all that is trained beside the tokenizer, and its raw weights where an average is kept."""
        tensors: dict[str, torch.Tensor] = {"num_updates": torch.tensor(self.num_updates)}
        for module, prefix in ((self.model, ""), (self.terms, "terms.")):
            for moment, value in moments(module, self.optimizer).items():
                kind, _, name = moment.partition("/")
                tensors[f"{kind}/{prefix}{name}"] = value
        for name, parameter in self.terms.named_parameters():
            if parameter.requires_grad:
                tensors[f"weights/terms.{name}"] = parameter
        if self.adversary is not None:
            tensors |= {f"adversary/{name}": v for name, v in self.adversary.tensors().items()}
        if self.average is not None:
            tensors |= {f"weights/{name}": value for name, value in self.model.state_dict().items()}
        return shards_of(OPTIMIZER_PREFIX, tensors)

    def load_model(self, reader: ShardReader) -> None:
        load_weights(self.model, reader)
        if self.average is not None:
            load_weights(self.average, reader)

    @torch.no_grad()
    def load_optimizer(self, reader: ShardReader) -> None:
        for shard in self.optimizer_shards():
            value = reader.read(shard.key, shard.global_offset, shard.global_shape)
            shard.tensor.copy_(value)
            if shard.key == f"{OPTIMIZER_PREFIX}num_updates":
                self.num_updates = int(value)

    def random_state(self) -> dict[str, torch.Tensor]:
        state = {"torch": torch.get_rng_state()}
        return state | ({"accelerator": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {})

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        if "accelerator" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["accelerator"])

    def describe(self) -> dict[str, Any]:
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"tensor": 1, "pipeline": 1, "context": 1, "data": 1, "num_parameters": num_parameters}

    def final_metrics(self) -> dict[str, float]:
        """Figures on the held-back images, for the stage's summary. Raises `UserError` when the codes collapsed."""
        return measure(self.average or self.model, self.data.held_back, self.options.min_codebook_use)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing is held open."""


def shards_of(prefix: str, tensors: dict[str, torch.Tensor]) -> list[Shard]:
    """Whole tensors as shards of one rank."""
    return [
        Shard(prefix + name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())
        for name, tensor in tensors.items()
    ]


@torch.no_grad()
def measure(model: IBQ, images: Sequence[np.ndarray], min_codebook_use: float) -> dict[str, float]:
    """PSNR (mean over images, dB), the share of codes used and their number on images uint8 [H, W, 3].

    Raises `UserError` when the share is below `min_codebook_use`: what comes after would learn nothing.
    """
    model.eval()
    used: set[int] = set()
    psnr = []
    for image in images:
        pixels = to_model_range(image[None]).to(model.quantize.embedding.weight.device)
        codes = model.encode(pixels)
        used.update(codes.flatten().tolist())
        psnr.append(psnr_db(pixels, model.decode(codes)).item())
    model.train()
    share = len(used) / model.config.n_embed
    if share < min_codebook_use:
        raise UserError(
            "the vision tokenizer's codebook has collapsed",
            where="stage.options.min_codebook_use",
            expected=f"at least {min_codebook_use:.2%} of {model.config.n_embed} codes used",
            got=f"{len(used)} codes on {len(images)} held-back images",
            fix="stage.options.continuous_steps=200, more steps, or model.cosine_similarity=true",
        )
    return {"psnr_db": float(np.mean(psnr)), "codebook_use": share, "num_codes_used": float(len(used))}
