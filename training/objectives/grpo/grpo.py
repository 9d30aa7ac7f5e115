"""Reinforcement learning on the tokens that a model generates: text and image codes alike (GRPO)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.documents.tokenizers import load_text_tokenizer
from model.backbone.attention_plan import packed_documents
from model.backbone.head import AllowedSets
from model.checkpoint.manifest import CheckpointManifest
from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.parallel import cpu_backend
from model.vocabulary import Vocabulary
from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.inputs import LocalInput, LossSums, ModelInput, TokenScores
from training.contracts.results import StepResult
from training.inference.choice import check_fingerprint, check_kind, tokenizer_folder
from training.inference.loading import load_vision
from training.inference.model import InferenceModel
from training.objectives.grpo.grpo_options import GrpoOptions
from training.objectives.grpo.policy_loss import (
    clipped_surrogate,
    importance_weights,
    kl_to_reference,
    segment_ratios,
    token_ratios,
)
from training.objectives.grpo.rollouts import Rollouts
from training.objectives.grpo.rows import MODALITIES, MicroBatch
from training.objectives.next_token import path_in_run
from training.reliability.agreement import seen_by_first_rank

CHECKPOINT_KIND = "transformer"
TOKENIZERS = ("text_tokenizer", "vision_tokenizer")
# Of each modality, summed over its learnt tokens.
FIGURES = ("policy_loss", "kl", "entropy", "clip_fraction", "importance_weight", "mismatch")


class Grpo:
    """See `training.contracts.objective`. The loss of a token is

        w * (-min(ratio * A, clip(ratio) * A) + kl_weight * ratio * KL)

    with A the advantage of its answer and w the truncated pi_old / mu. Tokens that the grammar forced are no part of it.
    The tokens of each modality have one mean over the global batch; the loss is the weighted sum of these means.
    """

    Options = GrpoOptions
    engine = "megatron"
    num_sums = 1 + len(MODALITIES) * len(FIGURES)

    def __init__(self, config: TrainConfig, options: GrpoOptions):
        self.config, self.options = config, options
        self.vocabulary = Vocabulary.from_config(config.model.vocabulary)
        self.rollouts: Rollouts | None = None
        self._tokenizers: dict[str, Any] = {}
        self._batches_made_at = 0.0
        self._modality_weights = [options.weights.text, options.weights.image]

    def batches(self, ranks: Ranks) -> Rollouts:
        """Opens the tokenizers, the prompts and the rewards. Raises `UserError` for what is missing or does not fit."""
        start = Path(str(self.config.stage.initialize_from))
        folder = Path(seen_by_first_rank(ranks, lambda: str(latest_checkpoint(start))))
        reader = CheckpointReader(folder)
        manifest = CheckpointManifest.of(reader.manifest, folder)
        check_kind(manifest, folder)
        loaded: dict[str, Any] = {}
        loaders: tuple[Callable[[Path], Any], ...] = (load_text_tokenizer, load_vision)
        for name, load in zip(TOKENIZERS, loaders, strict=True):
            place = tokenizer_folder(manifest, folder, name, getattr(self.options, name))
            loaded[name] = load(place)
            check_fingerprint(manifest, folder, name, loaded[name].fingerprint)
            self._tokenizers[name] = {
                "path": path_in_run(place, Path(self.config.run_folder)),
                "fingerprint": loaded[name].fingerprint,
            }
        self._tokenizers["image_format"] = manifest.image_format
        answering = InferenceModel(
            None,
            self.vocabulary,
            loaded["text_tokenizer"],
            loaded["vision_tokenizer"],
            max_sequence_length=self.config.model.max_sequence_length,
            image_format=manifest.image_format,
            options=self.options.answers,
            device="cuda" if cpu_backend.has_accelerator() else "cpu",
        )
        if self.options.kl_weight == 0:
            reader.close()
        reference = reader if self.options.kl_weight > 0 else None
        self.rollouts = Rollouts(self.config, self.options, ranks, answering, reference, self)
        return self.rollouts

    def inputs(self, batch: MicroBatch) -> ModelInput:
        return ModelInput(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            plan=packed_documents(batch.bounds),
            labels=batch.labels,
            weights=batch.learnt,
            fields=batch.fields,
        )

    def totals(self, batches: Sequence[MicroBatch]) -> np.ndarray:
        """float64 [1 + modalities]: positions, and learnt tokens of each modality."""
        totals = np.zeros(1 + len(MODALITIES))
        for batch in batches:
            totals[0] += batch.tokens.size
            totals[1:] += np.bincount(batch.fields["modality"][batch.learnt > 0], minlength=len(MODALITIES))
        self._batches_made_at = time.monotonic()
        return totals

    def label_log_probs(self, scores: TokenScores, inputs: LocalInput) -> torch.Tensor:
        return self._as_sampled(scores, inputs).log_probs(inputs.labels, self._allowed(inputs))

    def loss(self, scores: TokenScores, inputs: LocalInput, totals: torch.Tensor) -> LossSums:
        options, fields, learnt = self.options, inputs.fields, inputs.weights > 0
        sampled = self._as_sampled(scores, inputs)
        log_probs, entropy = sampled.log_probs_and_entropy(inputs.labels, self._allowed(inputs))
        old = fields["old"] if "old" in fields else log_probs.detach()
        if options.ratio == "segment":
            ratios = segment_ratios(log_probs, old, learnt, fields["segment"])
        else:
            ratios = token_ratios(log_probs, old)
        policy, clipped = clipped_surrogate(ratios, fields["advantage"], options.clip_low, options.clip_high)
        weights = importance_weights(old, fields["sampler"], options.importance_cap)
        kl = torch.zeros_like(policy)
        if options.kl_weight > 0:
            kl = kl_to_reference(log_probs, fields["reference"]) * ratios.detach()
        losses = torch.where(learnt, weights * (policy + options.kl_weight * kl), 0.0)
        factors = torch.tensor(self._modality_weights, dtype=torch.float64, device=totals.device)
        per_token = torch.where(totals[1:] > 0, factors / totals[1:], 0.0).to(losses.dtype)
        loss = torch.dot(losses, per_token[fields["modality"]])
        mismatch = (old - fields["sampler"]).abs()
        figures = (policy, kl, entropy, clipped.to(policy.dtype), weights, mismatch)
        return LossSums(loss, self._sums(loss.detach(), figures, learnt, fields["modality"]))

    def _sums(
        self, loss: torch.Tensor, figures: Sequence[torch.Tensor], learnt: torch.Tensor, modality: torch.Tensor
    ) -> torch.Tensor:
        """The loss, then each of `FIGURES` by modality."""
        found = [loss.double()[None]]
        for values in figures:
            counted = torch.where(learnt, values.detach().double(), 0.0)
            found.append(torch.bincount(modality, counted, minlength=len(MODALITIES)))
        return torch.cat(found)

    def _as_sampled(self, scores: TokenScores, inputs: LocalInput) -> TokenScores:
        """With the temperature and the guidance of the rollouts: what is trained is what was drawn from."""
        sampling, fields = self.options.sampling, inputs.fields
        scale = sampling.guidance_scale
        if scale == 1.0 and sampling.text.temperature == sampling.image.temperature == 1.0:
            return scores
        return scores.adjusted(fields["temperature"], None if scale == 1.0 else fields["partner"], scale)

    def _allowed(self, inputs: LocalInput) -> AllowedSets:
        assert self.rollouts is not None, "batches come first"
        return AllowedSets(self.rollouts.allowed_sets, inputs.fields["allowed"])

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        counts = totals[1:]
        figures = sums[1:].reshape(len(FIGURES), len(MODALITIES))
        metrics: dict[str, Any] = {
            name: {MODALITIES[m]: float(row[m] / counts[m]) for m in range(len(MODALITIES)) if counts[m] > 0}
            for name, row in zip(FIGURES, figures, strict=True)
        }
        metrics["tokens_learnt"] = {name: int(count) for name, count in zip(MODALITIES, counts, strict=True)}
        seconds = time.monotonic() - self._batches_made_at
        metrics["training_tokens_per_second"] = float(totals[0]) / seconds if seconds > 0 else 0.0
        metrics |= self.rollouts.metrics if self.rollouts is not None else {}
        return StepResult(float(sums[0]), gradient_norm, int(totals[0]), bool(counts.any()), metrics)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint needs to be asked, how its answers were drawn and what judged them."""
        rewards = self.rollouts.rewards.describe() if self.rollouts is not None else {}
        return {
            "kind": CHECKPOINT_KIND,
            "model": asdict(self.config.model),
            "vocabulary": self.vocabulary.describe(),
            "rollout": {"sampling": asdict(self.options.sampling), "answers": asdict(self.options.answers)},
            "rewards": rewards,
        } | self._tokenizers

    def final_metrics(self) -> dict[str, float]:
        return {"dropped_groups": self.rollouts.num_dropped} if self.rollouts is not None else {}
