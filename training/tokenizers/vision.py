"""The stage that trains the IBQ vision tokenizer, on one process or on several replicas.

The loss is the mean per pixel of the global batch. What compares several pictures (even use of the codes, the balance of
the adversary, its batch norms) looks at those of one size in a micro-batch, whatever the number of replicas.

Our choices, where Emu3.5 has published none: the autoencoder first trains without quantization, then the codes start
from its latents (k-means), then all train together; codes that no latent takes are moved to latents now and then. Plain
random codes collapse on simple pictures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model.durable import replace_file
from model.errors import UserError
from model.parallel import groups
from model.vision_tokenizer.config import CHECKPOINT_KIND
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import codes_from_latents, codes_restarted, initialize_weights
from model.vision_tokenizer.losses import latent_distance, pixel_weights, psnr_db
from model.vision_tokenizer.wrapper import load_weights, to_model_range, to_pixels
from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.results import StepResult
from training.contracts.shards import ShardReader
from training.metrics import PICTURES_NAME
from training.objectives.offline_rows import OfflineRows
from training.rewards.wire import png_bytes
from training.tokenizers.codes import place_codes
from training.tokenizers.collisions import describe_collisions
from training.tokenizers.image_data import BatchShare, ImageSource
from training.tokenizers.image_stream import StreamingImageSource
from training.tokenizers.tokenizer_options import VisionTokenizerOptions
from training.tokenizers.vision_terms import Adversary, Terms

KMEANS_ROUNDS = 4
WINDOW_STREAM = 3  # keeps its draws apart from the batches'
PICTURES_EVERY_STEPS, PICTURES_OF_A_CORPUS = 500, 2  # that are kept for eyes, and go to the loggers


class VisionTokenizer:
    """Learns codes of images uint8 [n, H, W, 3]; a `training.contracts.objective.ModuleObjective`."""

    Options = VisionTokenizerOptions
    engine = "replicated"

    def __init__(self, config: TrainConfig, options: VisionTokenizerOptions):
        torch.set_num_threads(options.num_threads)
        groups.take_accelerator()
        self.config, self.options, self.seed = config, options, config.seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = IBQ(options.model)
        initialize_weights(model, self.seed)
        self.model = model.channels_last().to(self.device)
        self.terms = Terms(options.terms, options.losses, options.model, self.seed).to(self.device)
        self.adversary: Adversary | None = None
        if options.terms.adversarial.weight:
            optimizer = config.stage.optimizer
            self.adversary = Adversary(options.terms.adversarial, optimizer, self.seed, self.device)
        self.average: IBQ | None = None
        if options.average_decay:
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.num_updates = 0
        self._names: list[str] = []  # of the last step's figures

    @property
    def quantizes(self) -> bool:
        return self.num_updates >= self.options.continuous_steps

    @property
    def playing(self) -> Adversary | None:
        """The adversary once it has joined."""
        joined = self.num_updates >= self.options.terms.adversarial.start_step
        return self.adversary if joined else None

    def batches(self, ranks: Ranks) -> OfflineRows:
        stage, options = self.config.stage, self.options
        make = StreamingImageSource if options.data.streaming else ImageSource
        share = BatchShare(
            stage.global_batch_size, stage.micro_batch_size, ranks.data_parallel_rank, ranks.data_parallel_size
        )
        self.images, self.ranks = make(options.data, options.model.factor, self.seed, share), ranks
        return OfflineRows(self.images)

    def totals(self, batches: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels, and what `losses.contrast` makes them weigh together."""
        num_pixels, contrast = sum(images[..., 0].size for images in batches), self.options.losses.contrast
        weights = [pixel_weights(self._pixels(images), contrast).double().sum() for images in batches if contrast]
        return np.array([num_pixels, float(sum(weights)) if contrast else num_pixels], np.float64)

    def backward(self, batches: Sequence[np.ndarray], totals: np.ndarray, num_updates: int) -> torch.Tensor:
        """Add the gradients of the mean loss per pixel; the step's figures, which `result` names, and uses of each code."""
        self.num_updates, num_codes = num_updates, self.options.model.n_embed
        if self.options.starts_codes(num_updates):
            self._place_codes(lambda latents: codes_from_latents(latents, num_codes, KMEANS_ROUNDS, self.seed))
        elif self.options.restarts_codes(num_updates, self.config.stage.steps):
            self._place_codes(lambda latents: codes_restarted(latents, self.model.quantize, self.seed))
        if num_updates and num_updates % PICTURES_EVERY_STEPS == 0 and self.ranks.rank == 0:
            keep_pictures(self.average or self.model, self.images.held_back, self.config.stage_folder, num_updates)
        num_pixels, weight = totals.tolist()
        figures: dict[str, torch.Tensor] = {}
        uses = torch.zeros(num_codes, dtype=torch.float64, device=self.device)
        for images in batches:
            share = images[..., 0].size / num_pixels
            for name, value in self._backward(images, share, weight / num_pixels, uses).items():
                figures[name] = figures.get(name, 0.0) + share * value.double()
        self._names = list(figures)
        return torch.cat((torch.stack(list(figures.values())), uses))

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        num_figures = len(self._names)
        figures = dict(zip(self._names, sums[:num_figures].tolist(), strict=True))
        uses, loss = sums[num_figures:], figures.pop("loss")
        if self.playing is not None:
            self.playing.mean_logits = [figures[name] for name in ("real_logit", "fake_logit") if name in figures]
            adversary_norm = figures["discriminator_gradient_norm"] = self.playing.gradient_norm()
            if not math.isfinite(adversary_norm):  # the step must not be applied
                gradient_norm = adversary_norm
        if self.quantizes:
            figures["codes_used"] = float(np.count_nonzero(uses))
        return StepResult(loss, gradient_norm, int(uses.sum()), metrics=figures)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        return to_model_range(images).to(self.device)

    def _backward(
        self, images: np.ndarray, share: float, mean_weight: float, uses: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of one array of images, weighted by `share`, and to `uses`; values of the loss's terms."""
        pixels = self._pixels(images)
        latents, quantized = self.model.latents(pixels), None
        weight = self.options.losses.consistency
        consistency = self._consistency(pixels, latents) if weight else None
        if self.quantizes:
            quantized = self.model.quantize(latents)
            codes = quantized.codes.flatten()
            uses.index_add_(0, codes, torch.ones_like(codes, dtype=uses.dtype))
            latents = quantized.values
        elif self.options.model.cosine_similarity:
            latents = F.normalize(latents, dim=1)
        loss, reconstructions, terms = self.terms(self.model, pixels, latents, quantized, self.playing, mean_weight)
        if consistency is not None:
            loss, terms = loss + weight * consistency, terms | {"consistency": consistency}
        (share * loss).backward()
        values = {f"loss_{name}": term.detach() for name, term in terms.items()}
        if self.playing is not None:
            values |= self.playing.backward(pixels, reconstructions, share)
        return values | {"loss": loss.detach(), "psnr_db": psnr_db(pixels, reconstructions.detach())}

    def _consistency(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """How far the latents of a window, encoded alone, are from those that it has within its images.

        The place of the window, a quarter of the area, is a pure function of seed and step.
        """
        (rows, columns), factor = latents.shape[2:], self.options.model.factor
        height, width = max(1, rows // 2), max(1, columns // 2)
        rng = np.random.default_rng((self.seed, WINDOW_STREAM, self.num_updates))
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        down = slice(top * factor, (top + height) * factor)
        across = slice(left * factor, (left + width) * factor)
        alone = self.model.latents(pixels[:, :, down, across])
        return latent_distance(alone, latents[:, :, top : top + height, left : left + width])

    @torch.no_grad()
    def _place_codes(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Depends on seed and weights only."""
        size = self.config.stage.global_batch_size
        changed = place_codes(self.model, self.images, size, self.ranks, place)
        if self.average is not None:  # what a code was elsewhere says nothing of where it is now
            self.average.quantize.embedding.weight[changed] = self.model.quantize.embedding.weight[changed]

    def update(self, learning_rate: float, num_updates: int) -> None:
        """What moves with every applied step beside the engine's optimizer."""
        if self.adversary is not None:
            self.adversary.step(learning_rate)
        if self.average is not None:
            # The average starts late enough to forget the first weights.
            decay = min(self.options.average_decay, (1 + num_updates) / (10 + num_updates))
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)

    def other_parameters(self) -> list[nn.Parameter]:
        return [] if self.adversary is None else list(self.adversary.model.parameters())

    def discard_gradients(self) -> None:
        if self.adversary is not None:
            self.adversary.discard_gradients()

    def published(self) -> dict[str, torch.Tensor]:
        """The weights to use: the moving average where one is kept."""
        return (self.average or self.model).state_dict()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All else that a checkpoint needs beside the engine's moments."""
        tensors: dict[str, torch.Tensor] = {
            f"weights/terms.{name}": parameter
            for name, parameter in self.terms.named_parameters()
            if parameter.requires_grad
        }
        if self.adversary is not None:
            tensors |= {f"adversary/{name}": value for name, value in self.adversary.tensors().items()}
        if self.average is not None:
            tensors |= {f"weights/{name}": value for name, value in self.model.state_dict().items()}
        return tensors

    def load_published(self, reader: ShardReader) -> None:
        load_weights(self.model, reader)
        if self.average is not None:
            load_weights(self.average, reader)

    def metadata(self) -> dict[str, Any]:
        return {"kind": CHECKPOINT_KIND, "model": asdict(self.options.model)}

    def final_metrics(self) -> dict[str, Any]:
        """Figures on the held-back images, for the stage's summary, and which captions' pictures have the same codes.

        Raises `UserError` when the codes collapsed.
        """
        model = self.average or self.model
        figures = measure(model, self.images.held_back, self.options.min_codebook_use)
        return figures | describe_collisions(model, self.images.captioned)


@torch.no_grad()
def keep_pictures(model: IBQ, images_by_corpus: Mapping[str, Sequence[np.ndarray]], folder: Path, step: int) -> None:
    """Held-back pictures uint8 [H, W, 3], each beside what is rebuilt from its codes."""
    place = folder / PICTURES_NAME / f"step_{step:06d}"
    place.mkdir(parents=True, exist_ok=True)
    model.eval()
    for corpus, images in images_by_corpus.items():
        for number, image in enumerate(images[:PICTURES_OF_A_CORPUS]):
            pixels = to_model_range(image[None]).to(model.quantize.embedding.weight.device)
            rebuilt = to_pixels(model.decode(model.encode(pixels)))[0]
            replace_file(place / f"{corpus}_{number}.png", png_bytes(np.concatenate((image, rebuilt), axis=1)))
    model.train()


@torch.no_grad()
def measure(
    model: IBQ, images_by_corpus: Mapping[str, Sequence[np.ndarray]], min_codebook_use: float
) -> dict[str, float]:
    """Figures on images uint8 [H, W, 3]: the share of codes used and their number, and mean PSNR in dB.

    PSNR stands for all images and for each corpus, there beside that of a picture in which every code's square is its
    own mean colour: what a tokenizer must beat. Raises `UserError` when the share is below `min_codebook_use`: what
    comes after would learn nothing.
    """
    model.eval()
    used: set[int] = set()
    figures: dict[str, float] = {}
    psnr: list[float] = []
    for corpus, images in images_by_corpus.items():
        of_corpus, of_means = [], []
        for image in images:
            pixels = to_model_range(image[None]).to(model.quantize.embedding.weight.device)
            codes = model.encode(pixels)
            used.update(codes.flatten().tolist())
            of_corpus.append(psnr_db(pixels, model.decode(codes)).item())
            means = F.avg_pool2d(pixels, model.config.factor)
            means = F.interpolate(means, scale_factor=float(model.config.factor))
            of_means.append(psnr_db(pixels, means).item())
        figures[f"psnr_db_{corpus}"] = float(np.mean(of_corpus))
        figures[f"block_mean_psnr_db_{corpus}"] = float(np.mean(of_means))
        psnr += of_corpus
    model.train()
    share = len(used) / model.config.n_embed
    if share < min_codebook_use:
        raise UserError(
            "the vision tokenizer's codebook has collapsed",
            where="stage.objective.min_codebook_use",
            expected=f"at least {min_codebook_use:.2%} of {model.config.n_embed} codes used",
            got=f"{len(used)} codes on {len(psnr)} held-back images",
            fix="stage.objective.continuous_steps=200, stage.objective.restart_codes_every_steps=300, more steps, or model.cosine_similarity=true",
        )
    overall = {"psnr_db": float(np.mean(psnr)), "codebook_use": share, "num_codes_used": float(len(used))}
    return overall | figures
