"""All terms of the tokenizer's loss for one array of images, and the adversary with its own optimizer."""

from __future__ import annotations

import torch
from torch import nn

from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.discriminator import (
    GENERATOR_LOSSES,
    LECAM_DECAY,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    initialize_discriminator,
    lecam_regularisation,
)
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.loss_config import AdversarialConfig, LossWeightsConfig
from model.vision_tokenizer.losses import tokenizer_loss
from model.vision_tokenizer.perceptual import Distillation, PerceptualLoss
from model.vision_tokenizer.quantizer import Quantized
from training.config import OptimizerConfig
from training.engines.adam import adam, moments
from training.tokenizers.tokenizer_options import TermsConfig

KEY = "stage.objective.terms"


class Adversary:
    """The discriminator and its optimizer. Its state is part of the optimizer's in a checkpoint."""

    def __init__(self, config: AdversarialConfig, optimizer: OptimizerConfig, seed: int, device: torch.device):
        self.config, self.gradient_clip = config, optimizer.gradient_clip
        self.model = PatchDiscriminator(config)
        initialize_discriminator(self.model, seed + 1)
        self.model.to(device)
        self.optimizer = adam(self.model, optimizer)
        # Means over a global batch of the logits of real and of reconstructed images: those of the last step, and moving
        # averages of those of the steps before, [2]. Only LeCam reads them.
        self.mean_logits: list[float] = []
        self.average_logits = torch.zeros(2, dtype=torch.float64)

    def judge(self, images: torch.Tensor) -> torch.Tensor:
        """Logits through which gradients flow to the images only."""
        self.model.requires_grad_(False)
        logits = self.model(images)
        self.model.requires_grad_(True)
        result: torch.Tensor = logits
        return result

    def backward(self, images: torch.Tensor, reconstructions: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
        """Add the discriminator's own gradients; its loss, and with LeCam the mean logits."""
        real, fake = self.model(images), self.model(reconstructions.detach())
        loss, means = hinge_loss(real, fake), {}
        if self.config.lecam_weight:
            means = {"real_logit": real.detach().mean(), "fake_logit": fake.detach().mean()}
            real_average, fake_average = self.average_logits.tolist()
            penalty = lecam_regularisation(real, fake, real_average, fake_average)
            loss = loss + self.config.lecam_weight * penalty
        (share * loss).backward()
        return {"loss_discriminator": loss.detach()} | means

    def gradient_norm(self) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def step(self, learning_rate: float) -> None:
        if all(parameter.grad is None for parameter in self.model.parameters()):
            return  # it has not joined yet
        if self.config.lecam_weight:
            self.average_logits.lerp_(torch.tensor(self.mean_logits, dtype=torch.float64), 1.0 - LECAM_DECAY)
        if self.gradient_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        self.optimizer.param_groups[0]["lr"] = learning_rate * self.config.learning_rate_ratio
        self.optimizer.step()

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, running statistics and moments by name."""
        found = {f"weights/{name}": value for name, value in self.model.state_dict().items()}
        if self.config.lecam_weight:
            found["average_logits"] = self.average_logits
        return found | moments(self.model, self.optimizer)


class Terms(nn.Module):
    """The loss of a `TermsConfig`. Its trainable parameters (the distillation's projection) join the tokenizer's."""

    def __init__(self, config: TermsConfig, weights: LossWeightsConfig, model: VisionTokenizerConfig, seed: int):
        super().__init__()
        self.config, self.weights = config, weights
        self.perceptual: PerceptualLoss | None = None
        self.distillation: Distillation | None = None
        if config.perceptual.weight:
            self.perceptual = PerceptualLoss.load(config.perceptual, f"{KEY}.perceptual.backbone")
        if config.distillation.weight:
            # After the middle the map has the width of the lowest level, then that of each level in turn.
            widths = [model.ch * mult for mult in (*model.ch_mult, model.ch_mult[-1])]
            width = widths[::-1][config.distillation.level]
            key = f"{KEY}.distillation.teacher"
            self.distillation = Distillation.load(config.distillation, width, seed + 2, key)

    def forward(
        self,
        model: IBQ,
        images: torch.Tensor,
        values: torch.Tensor,
        quantized: Quantized | None,
        adversary: Adversary | None,
        mean_weight: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(loss, reconstructions, terms unweighted) of images [B, 3, H, W] and the latents that are decoded.

        `mean_weight`: see `tokenizer_loss`.
        """
        reconstructions, features = model.reconstruct_with_features(values)
        extra = {}
        if self.perceptual is not None:
            extra["perceptual"] = (self.config.perceptual.weight, self.perceptual)
        loss, terms = tokenizer_loss(images, reconstructions, quantized, self.weights, extra, mean_weight)
        if self.distillation is not None:
            config = self.config.distillation
            terms["distillation"] = self.distillation(images, features[config.level])
            loss = loss + config.weight * terms["distillation"]
        if adversary is not None:
            chosen = self.config.adversarial
            terms["adversarial"] = GENERATOR_LOSSES[chosen.generator](adversary.judge(reconstructions))
            weighted = chosen.weight * terms["adversarial"]
            if chosen.weighting == "adaptive":
                terms["adaptive_weight"] = self._balance(model, terms)
                weighted = terms["adaptive_weight"] * weighted
            loss = loss + weighted
        return loss, reconstructions, terms

    def _balance(self, model: IBQ, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """Against what the decoder's last layer owes to the image, not to codes or features."""
        visible = self.weights.l1 * terms["l1"] + self.weights.l2 * terms["l2"]
        if "perceptual" in terms:
            visible = visible + self.config.perceptual.weight * terms["perceptual"]
        return adaptive_weight(visible, terms["adversarial"], model.decoder.conv_out.weight)
