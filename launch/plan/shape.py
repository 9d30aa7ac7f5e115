"""The sizes of a transformer that planning needs, and how many FLOPs a token costs."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, count_adapter_parameters
from model.vocabulary import Vocabulary

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with untied embeddings. Our own models come from `of`, published ones by hand."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary_rows: int  # padding included
    gated: bool = True  # SwiGLU: two input matrices in the MLP
    qk_norm: bool = True
    dtype_bytes: int = 2
    dropout: float = 0.0
    adapters: int = 0  # parameters of one layer's low-rank adapters; 0: all parameters are trained

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        return cls(
            config.num_layers,
            config.hidden_size,
            config.ffn_hidden_size,
            config.num_attention_heads,
            config.num_query_groups,
            config.head_dim,
            Vocabulary.from_config(config.vocabulary).padded_size,
            dtype_bytes=DTYPE_BYTES[config.dtype],
            dropout=config.dropout,
            adapters=count_adapter_parameters(config) // config.num_layers,
        )

    def divided_sizes(self) -> dict[str, int]:
        """As `model.parallel.layout_rules.divided_sizes` of a model of ours."""
        return {
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "ffn_hidden_size": self.ffn,
            "padded_vocabulary": self.vocabulary_rows,
            "num_layers": self.num_layers,
        }

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Of the keys; the values have as much."""
        return self.groups * self.head_dim

    @property
    def ffn_inputs(self) -> int:
        """Width of the MLP's first product."""
        return (2 if self.gated else 1) * self.ffn

    def matrix_parameters(self) -> int:
        """Of one layer: everything that a matrix product reads."""
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        return attention + self.hidden * (self.ffn_inputs + self.ffn)

    def norm_parameters(self) -> int:
        """Of one layer; held whole by every tensor rank."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    def embedding_parameters(self) -> int:
        """Of the input embedding; the output layer has as many."""
        return self.vocabulary_rows * self.hidden

    def total_parameters(self) -> int:
        layers = self.num_layers * (self.matrix_parameters() + self.norm_parameters())
        return layers + self.hidden + 2 * self.embedding_parameters()

    def trained_parameters(self) -> int:
        return self.num_layers * self.adapters or self.total_parameters()

    def flops_per_token(self, attended_tokens: float) -> float:
        """Forward and backward of one token that attends to `attended_tokens` keys on average.

        Two FLOPs for a multiply-add; backward twice the forward. Matrices: 6 for each parameter that is multiplied
        (the input embedding is looked up, not multiplied). Attention: scores and weighted sum, 4 * width * keys.
        Norms, activation functions, softmax and whatever is recomputed are not counted.
        """
        matrices = self.num_layers * self.matrix_parameters() + self.embedding_parameters()
        attention = self.num_layers * 4 * self.query_width * attended_tokens
        return 6.0 * matrices + 3.0 * attention
