"""The whole model: against transformers' Qwen3, packed against single documents, step by step against at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.backbone import token_step
from model.backbone.attention_plan import append_image_copies, documents_with_image_copies, packed_documents
from model.backbone.packed_attention import prepare_attention
from model.backbone.token_step import TokenStep
from model.backbone.transformer import build_model
from model.config import AdapterConfig, ModelConfig
from model.generation import decoder, image_decoder
from model.generation.decoder import CachedDecoder, allocate_cache, decoder_forward
from model.generation.image_decoder import ImageDecoder
from model.vocabulary import VocabularyConfig

pytestmark = pytest.mark.usefixtures("single_process")

# head_dim is not hidden_size / num_attention_heads, as in the published model.
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    rope_theta=1_000_000.0,
    init_std=0.2,
    vocabulary=VocabularyConfig(text_size=70, reserved_size=16, visual_size=42, pad_multiple=64),
)
NUM_IDS = 128


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(CONFIG, seed=11).eval()


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    packed = prepare_attention(
        packed_documents(cu_seqlens), positions, head_dim=CONFIG.head_dim, rope_theta=CONFIG.rope_theta
    )
    return model(tokens[None], None, None, packed_seq_params=packed)[0]


def qwen3_weights(model: Any) -> dict[str, torch.Tensor]:
    """transformers' names; qkv is fused by query group, gate and up are the halves of fc1."""
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    groups, width = CONFIG.num_query_groups, CONFIG.head_dim
    per_group = CONFIG.num_attention_heads // groups
    for layer in range(CONFIG.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        fused = ours[here + "self_attention.linear_qkv.weight"].view(groups, (per_group + 2) * width, -1)
        query, key, value = fused.split([per_group * width, width, width], dim=1)
        theirs[there + "self_attn.q_proj.weight"] = query.reshape(-1, CONFIG.hidden_size)
        theirs[there + "self_attn.k_proj.weight"] = key.reshape(-1, CONFIG.hidden_size)
        theirs[there + "self_attn.v_proj.weight"] = value.reshape(-1, CONFIG.hidden_size)
        theirs[there + "self_attn.o_proj.weight"] = ours[here + "self_attention.linear_proj.weight"]
        theirs[there + "self_attn.q_norm.weight"] = ours[here + "self_attention.q_layernorm.weight"]
        theirs[there + "self_attn.k_norm.weight"] = ours[here + "self_attention.k_layernorm.weight"]
        gate, up = ours[here + "mlp.linear_fc1.weight"].chunk(2)
        theirs[there + "mlp.gate_proj.weight"], theirs[there + "mlp.up_proj.weight"] = gate, up
        theirs[there + "mlp.down_proj.weight"] = ours[here + "mlp.linear_fc2.weight"]
        theirs[there + "input_layernorm.weight"] = ours[here + "input_layernorm.weight"]
        theirs[there + "post_attention_layernorm.weight"] = ours[here + "pre_mlp_layernorm.weight"]
    return theirs


@torch.no_grad()
def test_logits_agree_with_transformers_qwen3() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = build_model(CONFIG, seed=12).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm applied in the wrong place
            parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
    config = Qwen3Config(
        vocab_size=model.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.ffn_hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_query_groups,
        head_dim=CONFIG.head_dim,
        rms_norm_eps=CONFIG.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=False,
    )
    reference = Qwen3ForCausalLM(config).eval()
    reference.load_state_dict(qwen3_weights(model))
    tokens = torch.randint(0, NUM_IDS, (200,))
    expected = reference(tokens[None]).logits[0]
    assert expected.std() > 0.5
    assert (logits_of(model, tokens, [200]) - expected).abs().max() <= 1e-4


def test_packed_documents_agree_with_each_document_alone(model: Any) -> None:
    lengths = [7, 1, 40, 19, 33]
    tokens = torch.randint(0, NUM_IDS, (sum(lengths),))
    packed = logits_of(model, tokens, lengths)
    alone = torch.cat([logits_of(model, part, [len(part)]) for part in tokens.split(lengths)])
    assert (packed - alone).abs().max() <= 1e-5


@torch.no_grad()
def test_copies_of_images_see_their_prefix_and_change_nothing(model: Any) -> None:
    """Logits of the document are those without copies; a copy depends on what lies before its image and on itself."""
    layout = append_image_copies(np.array([0, 30, 50]), np.array([5, 18, 33]), np.array([9, 9, 12]))
    copies = layout.copy_numbers()
    positions = torch.from_numpy(np.concatenate((np.arange(30), np.arange(20)))[layout.source_tokens()])
    planned = prepare_attention(
        documents_with_image_copies(layout), positions, head_dim=CONFIG.head_dim, rope_theta=CONFIG.rope_theta
    )

    def run(row: torch.Tensor) -> torch.Tensor:
        return model(row[None], None, None, packed_seq_params=planned)[0]

    def with_other(row: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
        return torch.where(torch.from_numpy(chosen), (row + 1) % NUM_IDS, row)

    row = torch.randint(0, NUM_IDS, (layout.num_tokens,))
    logits = run(row)
    assert (logits[copies == 0] - logits_of(model, row[copies == 0], [30, 20])).abs().max() <= 1e-5
    assert torch.equal(run(with_other(row, copies > 0))[copies == 0], logits[copies == 0])
    # The image of copy 2 begins at token 18 of its document; copy 1 and that image itself lie outside its view.
    first_document = np.arange(layout.num_tokens) < 30
    unseen = (first_document & (np.arange(layout.num_tokens) >= 18)) | (copies == 1) | (copies == 3)
    assert torch.equal(run(with_other(row, unseen))[copies == 2], logits[copies == 2])
    for seen in (np.arange(layout.num_tokens) == 17, np.arange(layout.num_tokens) == np.flatnonzero(copies == 2)[-1]):
        assert not torch.equal(run(with_other(row, seen))[copies == 2][0], logits[copies == 2][0])


def test_decoding_step_by_step_agrees_with_the_full_forward(model: Any) -> None:
    tokens = torch.randint(0, NUM_IDS, (60,))
    full = logits_of(model, tokens, [60])[:, :NUM_IDS]
    cache = allocate_cache(model, 1, 60)
    steps = [decoder_forward(model, tokens[None, :20], torch.arange(20)[None], cache)]
    for position in range(20, 60):
        steps.append(decoder_forward(model, tokens[None, [position]], torch.tensor([[position]]), cache))
    logits = torch.cat(steps, dim=1)[0]
    assert bool((logits[:, NUM_IDS:] == float("-inf")).all())
    assert (logits[:, :NUM_IDS] - full).abs().max() <= 1e-5


def test_sequences_of_different_length_decode_together(model: Any) -> None:
    lengths = torch.tensor([5, 12, 9])
    rows = torch.randint(0, NUM_IDS, (3, 30))
    cache = allocate_cache(model, 3, 64)
    positions = torch.arange(12).expand(3, 12)
    logits = decoder_forward(model, rows[:, :12], positions, cache, num_new=lengths, last_only=True)
    assert logits.shape[1] == 1
    for step in range(6):
        expected = [
            logits_of(model, rows[row, : lengths[row] + step], [int(lengths[row]) + step])[-1] for row in range(3)
        ]
        difference = logits[:, 0, :NUM_IDS] - torch.stack(expected)[:, :NUM_IDS]
        assert difference.abs().max() <= 1e-5, step
        chosen = rows[torch.arange(3), lengths + step]
        logits = decoder_forward(model, chosen[:, None], (lengths + step)[:, None], cache)
    assert cache.lengths.tolist() == (lengths + 6).tolist()


def test_equal_prompts_are_read_once_and_answered_apart(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.randint(0, NUM_IDS, (2, 9)).tolist()
    prompts = [first, second[:6], first, first]
    answers = torch.randint(0, NUM_IDS, (3, 4))
    tokens_read = []
    read = TokenStep.read_prompts
    monkeypatch.setattr(
        TokenStep, "read_prompts", lambda step, ids, ends: (tokens_read.append(ids.numel()), read(step, ids, ends))[1]
    )
    batch = CachedDecoder(model)
    logits = [batch.start(prompts, 3), *(batch.step(ids) for ids in answers)]
    assert tokens_read == [2 * 9]  # steps read a token a row
    for row, prompt in enumerate(prompts):
        whole = torch.tensor([*prompt, *answers[:, row].tolist()])
        expected = logits_of(model, whole, [len(whole)])[len(prompt) - 1 :, :NUM_IDS]
        assert (torch.stack([one[row, :NUM_IDS] for one in logits]) - expected).abs().max() <= 1e-5
    assert batch._cache is not None
    assert batch._cache.max_length == 12


@pytest.mark.parametrize("adapted", ["none", "all", "copies"])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 7)], ids=["even", "uneven"])
def test_steps_are_those_of_the_modules(
    model: Any, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], adapted: str
) -> None:
    """Prompts read in parts, rows that do not advance, some columns only, looks that leave no trace, a cache that ends where
    the longest row does."""
    monkeypatch.setattr(token_step, "PROMPT_TOKENS_AT_ONCE", 4)
    if adapted != "none":
        adapter = AdapterConfig(rank=3, alpha=12.0, tokens=adapted)
        model = build_model(ModelConfig(**{**vars(CONFIG), "adapter": adapter}), seed=11)
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b"):
                torch.nn.init.normal_(parameter, std=0.1)
    prompts = [torch.randint(0, NUM_IDS, (length,)).tolist() for length in lengths]
    steps = [torch.randint(0, NUM_IDS, (3,)) for _ in range(6)]
    advances = [None, None, torch.tensor([True, False, True]), torch.tensor([False, True, True]), None, None]

    block = torch.randint(0, NUM_IDS, (3, 3))

    def run() -> torch.Tensor:
        batch = ImageDecoder(model)
        logits = [batch.start(prompts, 6)]
        for step, (ids, moves) in enumerate(zip(steps, advances, strict=True)):
            logits.append(batch.step(ids, moves))
            if step in (0, 2):
                logits += [batch.look(block, whole=whole)[:, number] for whole in (True, False) for number in range(3)]
        part = CachedDecoder(model)
        part.start(prompts, 6)
        assert (part.step(steps[0], None, slice(3, 40)) - logits[1][:, 3:40]).abs().max() <= 1e-5
        return torch.stack(logits)

    found = run()
    for module in (decoder, image_decoder):
        monkeypatch.setattr(module, "has_known_layers", lambda _: False)
    expected = run()
    assert (found - expected)[..., :NUM_IDS].abs().max() <= 1e-5
    assert bool((found[..., NUM_IDS:] == -torch.inf).all())


def test_dropout_acts_in_training_only_and_in_three_places() -> None:
    config = ModelConfig(**{**vars(CONFIG), "dropout": 0.5})
    model = build_model(config, seed=11)
    layer = model.decoder.layers[0]
    assert model.embedding.embedding_dropout.p == 0.5
    assert layer.hidden_dropout == 0.5
    assert layer.self_attention.core_attention.dropout == 0.5
    tokens = torch.randint(0, NUM_IDS, (32,))
    assert not torch.equal(logits_of(model.train(), tokens, [32]), logits_of(model, tokens, [32]))
    assert torch.equal(logits_of(model.eval(), tokens, [32]), logits_of(model, tokens, [32]))
