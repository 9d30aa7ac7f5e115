"""Typed configuration of the transformer; exact counts of parameters and floating-point operations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.errors import Problems
from model.vocabulary import Vocabulary, VocabularyConfig

# Of the float32 logits that the output layer works on at once (`model.backbone.head`). 948 tokens of Emu3.5's vocabulary on
# one tensor-parallel rank: enough rows to keep matrix products busy and to make the pass over the float32 weight gradient
# (once a chunk) small beside them. A bfloat16 copy (half as much), or a second float32 one for entropy, comes on top while
# the chunk is worked on.
LOGIT_CHUNK_BYTES = 1 << 30


ADAPTED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # the linear layers of a transformer layer


# Of a model: weights of other sizes do not fit.
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")


@dataclass
class AdapterConfig:
    """Low-rank adapters on the linear layers; all other weights are then frozen."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0  # the adapters' output is scaled by alpha / rank
    modules: list[str] = field(
        default_factory=lambda: list(ADAPTED)
    )  # linear_qkv | linear_proj | linear_fc1 | linear_fc2
    tokens: str = "all"  # all | copies: those of images alone; every other token is as without adapters

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(self.rank >= 0, f"{key}.rank", f"must not be negative, got {self.rank}", f"{key}.rank=16")
        if self.rank == 0:
            for name in ("alpha", "modules", "tokens"):
                fine = getattr(self, name) == getattr(AdapterConfig(), name)
                problems.check(fine, f"{key}.{name}", f"has no effect without {key}.rank", f"{key}.rank=16")
        problems.check(self.alpha > 0, f"{key}.alpha", f"must be positive, got {self.alpha}", f"{key}.alpha=16")
        unknown = sorted(set(self.modules) - set(ADAPTED))
        choices = ", ".join(ADAPTED)
        problems.check(not unknown, f"{key}.modules", f"there is no {', '.join(unknown)}; choices are {choices}")
        problems.check(bool(self.modules), f"{key}.modules", "is empty: nothing would be trained", f"{key}.rank=0")
        problems.check(
            self.tokens in ("all", "copies"),
            f"{key}.tokens",
            f"unknown value {self.tokens!r}",
            f"{key}.tokens=all|copies",
        )


@dataclass
class ModelConfig:
    """A decoder-only transformer: pre-RMSNorm, SwiGLU, GQA, QK-norm before RoPE, no biases, untied embeddings.

    The structure is that of Emu3.5 (arXiv 2510.26583, section 2.2 and Table 1); the presets in `conf/model` differ
    in sizes only.
    """

    name: str = "toy"  # of the preset
    num_layers: int = 4  # transformer layers
    hidden_size: int = 128  # width of the residual stream
    ffn_hidden_size: int = 384  # width inside of the feed-forward network
    num_attention_heads: int = 4  # query heads
    num_query_groups: int = 2  # key/value heads
    head_dim: int = 32  # width of one head; need not be hidden_size / num_attention_heads
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rms_norm_eps: float = 1e-6  # added to the mean square in every norm
    max_sequence_length: int = 2048  # tokens of a row at most
    dropout: float = 0.0  # after the embedding, on both residual branches and in attention
    init_std: float = 0.02  # of the fresh weights
    dtype: str = "float32"  # float32 | bfloat16
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def validate(self, problems: Problems, key: str = "model") -> None:
        for name in (*SIZES, "max_sequence_length"):
            problems.check(getattr(self, name) > 0, f"{key}.{name}", "must be positive")
        problems.check(
            self.num_query_groups > 0 and self.num_attention_heads % self.num_query_groups == 0,
            f"{key}.num_query_groups",
            f"must divide num_attention_heads ({self.num_attention_heads}), got {self.num_query_groups}",
            f"{key}.num_query_groups={self.num_attention_heads}",
        )
        problems.check(self.head_dim % 2 == 0, f"{key}.head_dim", "must be even (rotary pairs)")
        for name, usual in (("rope_theta", "10000"), ("rms_norm_eps", "1e-6"), ("init_std", "0.02")):
            value = getattr(self, name)
            problems.check(value > 0, f"{key}.{name}", f"must be positive, got {value}", f"{key}.{name}={usual}")
        problems.check(
            self.adapter.rank <= self.hidden_size,
            f"{key}.adapter.rank",
            f"{self.adapter.rank} is more than the layers are wide ({self.hidden_size})",
            f"{key}.adapter.rank=16",
        )
        problems.check(0.0 <= self.dropout < 1.0, f"{key}.dropout", "must be in [0, 1)")
        problems.check(
            self.dtype in ("float32", "bfloat16"),
            f"{key}.dtype",
            f"unknown dtype {self.dtype!r}",
            f"{key}.dtype=bfloat16",
        )
        self.vocabulary.validate(problems, f"{key}.vocabulary")
        self.adapter.validate(problems, f"{key}.adapter")


def count_parameters(config: ModelConfig, *, padded: bool = False) -> dict[str, int]:
    """Exact number of parameters: `embeddings` (input and output), `layers` (final norm included), `total`.

    Of `layers`, `attention`, `mlp` and `norms` give the parts.
    `padded=True` counts the rows that pad the vocabulary too. For `emu35_34b` the unpadded figures are those that
    Emu3.5 publishes in rounded form (section 2.2: 31.2B + 2.9B = 34.1B).
    """
    vocabulary = Vocabulary.from_config(config.vocabulary)
    rows = vocabulary.padded_size if padded else vocabulary.size
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_query_groups * config.head_dim
    attention = config.hidden_size * (query_width + 2 * key_value_width) + query_width * config.hidden_size
    mlp = 3 * config.hidden_size * config.ffn_hidden_size
    norms = 2 * config.hidden_size + 2 * config.head_dim
    parts = {
        "attention": config.num_layers * attention,
        "mlp": config.num_layers * mlp,
        "norms": config.num_layers * norms + config.hidden_size,
    }
    layers = sum(parts.values())
    embeddings = 2 * rows * config.hidden_size
    return {"embeddings": embeddings, "layers": layers, "total": embeddings + layers} | parts


def count_adapter_parameters(config: ModelConfig) -> int:
    """Exact number of parameters of all low-rank adapters: rank * (inputs + outputs) for each adapted layer."""
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_query_groups * config.head_dim
    widths = {
        "linear_qkv": config.hidden_size + query_width + 2 * key_value_width,
        "linear_proj": query_width + config.hidden_size,
        "linear_fc1": config.hidden_size + 2 * config.ffn_hidden_size,
        "linear_fc2": config.ffn_hidden_size + config.hidden_size,
    }
    return config.num_layers * config.adapter.rank * sum(widths[name] for name in config.adapter.modules)


def count_trained_parameters(config: ModelConfig, *, padded: bool = False) -> int:
    """All, or beside adapters those alone."""
    return count_adapter_parameters(config) or count_parameters(config, padded=padded)["total"]


FLOP_CONVENTION = (
    "forward pass; a multiplication and its addition count 2; matrix products only (no norms, softmax, RoPE, "
    "activations); attention counts the pairs that causal attention sees; training takes 3 times as much, without "
    "recomputation"
)


def count_flops(
    config: ModelConfig, cu_seqlens: Sequence[int], *, causal: bool = True, padded: bool = False
) -> dict[str, int]:
    """Exact floating-point operations of one forward pass over packed documents, by class, and their `total`.

    `cu_seqlens` bounds the documents over all T tokens, as in training. See `FLOP_CONVENTION`; `causal=False` counts
    all pairs of a document, as kernels that compute whole squares do, and `padded=True` the rows that pad the
    vocabulary. Divide by T for figures per token.
    """
    vocabulary = Vocabulary.from_config(config.vocabulary)
    num_tokens = cu_seqlens[-1] - cu_seqlens[0]
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    num_pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_query_groups * config.head_dim
    projections = 2 * config.hidden_size * (2 * query_width + 2 * key_value_width)
    rows = vocabulary.padded_size if padded else vocabulary.size
    flops = {
        "attention_projections": config.num_layers * num_tokens * projections,
        # Queries times keys, and probabilities times values.
        "attention_scores": config.num_layers * num_pairs * 2 * 2 * query_width,
        "mlp": config.num_layers * num_tokens * 2 * 3 * config.hidden_size * config.ffn_hidden_size,
        "logits": num_tokens * 2 * config.hidden_size * rows,
    }
    return flops | {"total": sum(flops.values())}
