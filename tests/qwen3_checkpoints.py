"""One random model twice: as transformers' Qwen3 and as a checkpoint of ours, written without the code under test."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from handmade_checkpoints import publish_manifest
from safetensors.torch import save_file

from model.config import ModelConfig
from model.vocabulary import Vocabulary, VocabularyConfig

# 70 + 16 + 41 = 127 ids, padded to 128: one row of padding that must never count.
VOCABULARY = VocabularyConfig(text_size=70, reserved_size=16, visual_size=41, pad_multiple=64)
NUM_IDS = 127


def config_of(hidden: int, heads: int, groups: int, head_dim: int, theta: float = 1e6, **changes: Any) -> ModelConfig:
    values = {
        "num_layers": 2,
        "hidden_size": hidden,
        "ffn_hidden_size": 56,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": head_dim,
        "rope_theta": theta,
        "init_std": 0.2,
        "rms_norm_eps": 1e-5,
        "vocabulary": VOCABULARY,
    }
    return ModelConfig(**(values | changes))


def transformers_model(config: ModelConfig, seed: int = 0, num_ids: int = NUM_IDS) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=num_ids,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm applied in the wrong place
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def our_tensors(theirs: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Logical tensors: q, k, v of each group side by side, gate above up, padded ids at the end."""
    padding = torch.full((1, config.hidden_size), 9.0)  # large, so that it shows if it counts
    ours = {
        "embedding.word_embeddings.weight": torch.cat((theirs["model.embed_tokens.weight"], padding)),
        "output_layer.weight": torch.cat((theirs["lm_head.weight"], padding)),
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    groups, width = config.num_query_groups, config.head_dim
    for layer in range(config.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        rows = []
        for group in range(groups):
            for part, per_group in (("q", config.num_attention_heads // groups), ("k", 1), ("v", 1)):
                size = per_group * width
                rows.append(theirs[f"{there}self_attn.{part}_proj.weight"][group * size : (group + 1) * size])
        ours[here + "self_attention.linear_qkv.weight"] = torch.cat(rows)
        ours[here + "mlp.linear_fc1.weight"] = torch.cat(
            (theirs[there + "mlp.gate_proj.weight"], theirs[there + "mlp.up_proj.weight"])
        )
        for mine, other in (
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
            ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
            ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
            ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
        ):
            ours[here + mine] = theirs[there + other]
    return ours


def write_checkpoint(
    folder: Path,
    theirs: dict[str, torch.Tensor],
    config: ModelConfig,
    more: dict[str, torch.Tensor] | None = None,
    **metadata: Any,
) -> Path:
    """A checkpoint folder of one file; `more`: logical tensors of ours beside those of the model."""
    folder.mkdir(parents=True)
    ours = our_tensors(theirs, config) | (more or {})
    tensors = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
    save_file(tensors, folder / "all.safetensors")
    keys = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        piece = {"file": "all.safetensors", "name": name, "offset": [0] * len(shape), "shape": shape}
        dtype = str(tensor.dtype).removeprefix("torch.")
        keys[f"model/{name}"] = {"global_shape": shape, "dtype": dtype, "pieces": [piece]}
    manifest = {
        "format_version": 1,
        "kind": "transformer",
        "model": asdict(config),
        "vocabulary": Vocabulary.from_config(config.vocabulary).describe(),
        "keys": keys,
    }
    publish_manifest(folder, manifest | metadata)
    return folder
