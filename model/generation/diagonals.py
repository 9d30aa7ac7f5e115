"""All codes of an anti-diagonal at once: an image of H x W codes in H + W - 1 forward passes (FlashAR's schedule).

Codes of one diagonal r + c = d are drawn independently given all earlier diagonals, so that the probability of an image is
the product of those of its codes, and known exactly:

    p(image) = product over d of the product over r + c = d of p(code r, c | diagonals before d, what stands before the image)

The token before a code predicts it, as in reading row by row: its left neighbour, or the end of the row above, which the
grammar knows beforehand; IMG for the first code. So one output layer is enough: FlashAR (github.com/lxazjk/Emu3.5-FlashAR),
whose grids have no ends of rows, needs a second one for the first column. What has to be learnt is to see an image in this
order. A copy of the image that nothing else sees is read so (`model.backbone.attention_plan`), at the positions of the image:
each step sees itself and the steps before, hence keys and values are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.generation.image_phases import GuidedImages
from model.generation.sampling import choose

DRAWS = 0  # the stream of an image's random numbers


@dataclass(frozen=True)
class DiagonalOrder:
    """How the tokens of an image block from IMG to its last code are read. Step d predicts the codes of diagonal d.

    The last of the H + W steps is the last code alone, which predicts no code: decoding does not read it.
    """

    tokens: np.ndarray  # int64 [L], places in the block, IMG at 0, in the order of reading
    lengths: np.ndarray  # int64 [H + W], tokens of each step

    @classmethod
    def of(cls, height: int, width: int) -> DiagonalOrder:
        """A code is read in the step behind its diagonal's, the end of row r when it has to predict: in step r + 1."""
        rows, columns = np.divmod(np.arange(height * (width + 1) - 1), width + 1)
        steps = np.concatenate(([0], rows + np.where(columns < width, columns, 0) + 1))
        return cls(np.argsort(steps, kind="stable"), np.bincount(steps))

    def steps(self) -> list[np.ndarray]:
        """The tokens of each step."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


class DiagonalPhase:
    """H + W - 1 reads of a copy behind the cached prefix, which are then forgotten."""

    def decode(self, images: GuidedImages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block, starts = images.block, images.decoder.cache.lengths.clone()
        device, settings = block.tokens.device, images.sampling.image
        tokens, places = block.tokens.clone(), block.places
        log_probs = torch.zeros(tokens.shape, device=device)
        is_code = torch.zeros(tokens.shape[1], dtype=torch.bool, device=device)
        is_code[places] = True
        numbers = images.uniforms(DRAWS, tokens.shape[1])
        visual_start = images.grammar.vocabulary.visual_start
        for step in DiagonalOrder.of(*block.grid).steps()[:-1]:
            at = torch.from_numpy(step).to(device)
            logits = images.extend(tokens[:, at], starts[:, None] + at)
            predicts = is_code[at + 1]
            logits, behind = logits[:, predicts], at[predicts] + 1
            codes, scores = choose(logits.flatten(0, 1), None, settings, numbers[:, behind].flatten())
            tokens[:, behind] = codes.view(len(tokens), -1) + visual_start
            log_probs[:, behind] = scores.view(len(tokens), -1)
        images.decoder.forget(starts)
        num_read = torch.zeros(len(tokens), dtype=torch.int64, device=device)
        return tokens[:, places] - visual_start, log_probs[:, places], num_read
