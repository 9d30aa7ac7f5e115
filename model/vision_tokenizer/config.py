"""Typed configuration of the IBQ vision tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from model.errors import Problems, UserError

CHECKPOINT_KIND = "vision_tokenizer"


def check_checkpoint_kind(kind: object, checkpoint: Path) -> None:
    """Refuses a checkpoint that its manifest calls something else."""
    if kind != CHECKPOINT_KIND:
        raise UserError(
            "this checkpoint is not a vision tokenizer", where=str(checkpoint), expected=CHECKPOINT_KIND, got=str(kind)
        )


@dataclass
class VisionTokenizerConfig:
    """Encoder, quantizer and decoder of an IBQ tokenizer in the structure of taming-transformers' VQGAN.

    The defaults are the 455M-parameter tokenizer of Emu3.5 (arXiv 2510.26583, section 2.3) where published; channels
    and blocks were found by matching the parameter count. The last five fields are our own: with their defaults the
    structure is the published one; small tokenizers use them to make a code depend on its own surroundings only.
    """

    ch: int = 256  # channels of the first level
    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # channels of each level / ch
    num_res_blocks: int = 4  # residual blocks a level in the encoder; the decoder has one more
    attn_resolutions: list[int] = field(default_factory=lambda: [16])  # sides, counted down from `resolution`
    resolution: int = 256  # nominal side in pixels; only decides which levels have attention
    in_channels: int = 3  # of an image
    out_ch: int = 3  # of a reconstruction
    z_channels: int = 256  # of the encoder's output
    embed_dim: int = 256  # width of a code
    n_embed: int = 131_072  # number of codes
    beta: float = 0.25  # weight of the term of the quantisation loss that moves the codes
    cosine_similarity: bool = False  # codes and latents compared, and looked up, on the unit sphere
    logit_scale: float = 1.0  # factor on the similarities before the softmax
    dropout: float = 0.0  # within residual blocks
    norm_groups: int = 32  # groups of channels that are normalised together
    norm_scope: str = "image"  # image: group statistics over all pixels; pixel: over the channels of one pixel
    mid_attention: bool = True  # at the lowest resolution, between encoder and decoder
    padding_mode: str = "zeros"  # zeros | replicate: what convolutions see beyond the border
    encoder_kernel_sizes: list[int] = field(default_factory=list)  # one a level, 1 or 3; empty: 3 everywhere

    patch_local_encoder: bool = False  # encode each patch of f x f pixels without its surroundings

    @property
    def factor(self) -> int:
        """Pixels of an image's side per code."""
        result: int = 2 ** (len(self.ch_mult) - 1)
        return result

    def validate(self, problems: Problems, key: str = "model") -> None:
        for name in (
            "ch",
            "num_res_blocks",
            "resolution",
            "in_channels",
            "out_ch",
            "z_channels",
            "embed_dim",
            "n_embed",
            "norm_groups",
        ):
            problems.check(getattr(self, name) > 0, f"{key}.{name}", "must be positive")
        problems.check(
            bool(self.ch_mult) and min(self.ch_mult) > 0, f"{key}.ch_mult", "must be a list of positive numbers"
        )
        groups = max(1, self.norm_groups)
        for mult in self.ch_mult:
            problems.check(
                self.ch * mult % groups == 0,
                f"{key}.norm_groups",
                f"must divide every level's channels; {self.ch} * {mult} is not a multiple of {groups}",
                f"{key}.norm_groups={self.ch}",
            )
        problems.check(self.logit_scale > 0, f"{key}.logit_scale", "must be positive")
        problems.check(0 <= self.dropout < 1, f"{key}.dropout", "must be in [0, 1)")
        for name, known in (("norm_scope", ("image", "pixel")), ("padding_mode", ("zeros", "replicate"))):
            value = getattr(self, name)
            problems.check(value in known, f"{key}.{name}", f"unknown value {value!r}", f"{key}.{name}={known[0]}")
        kernels = self.encoder_kernel_sizes
        problems.check(
            not kernels or (len(kernels) == len(self.ch_mult) and set(kernels) <= {1, 3}),
            f"{key}.encoder_kernel_sizes",
            f"must be {len(self.ch_mult)} numbers, each 1 or 3, or empty",
        )


def ibq_emu35() -> VisionTokenizerConfig:
    """The 455M-parameter tokenizer: f=16, 131,072 codes of width 256."""
    return VisionTokenizerConfig()
