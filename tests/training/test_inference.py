"""Prompts and answers with a decoder that plays back training documents, and loading of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade_checkpoints import publish_manifest
from safetensors.torch import save_file
from toy_inference import TEXT_SIZE, TEXTS, VOCABULARY, VOCABULARY_CONFIG, GrayTokenizer, RowsDecoder, toy_model

from data_pipeline.documents.builder import DocumentBuilder, Picture, Text
from data_pipeline.documents.reading import split_parts
from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from model.config import ModelConfig
from model.errors import UserError
from model.generation.decoding_config import DecodingConfig, DenoiseConfig
from model.generation.settings import PhaseSampling, SamplingConfig
from model.parallel import groups
from training.inference.answering import answer_all, begin
from training.inference.model import InferenceModel
from training.inference.observing import Event, Refined, Rows
from training.inference.prompts import Prompt
from training.inference.refinement import refine

GREEDY = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), max_new_tokens=200)


class PlaybackDecoder(RowsDecoder):
    """Knows whole documents by heart; says the next token of the one that begins like a row."""

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.documents = [document.tolist() for document in documents]

    def row_logits(self, row: list[int]) -> torch.Tensor:
        logits = torch.zeros(VOCABULARY.padded_size)
        for document in self.documents:
            if document[: len(row)] == row and len(document) > len(row):
                logits[document[len(row)]] = 10.0
        return logits


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "text_tokenizer"
    train_sentencepiece(TEXTS, folder, TEXT_SIZE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer((tokenizer_folder / "tokenizer.model").read_bytes())


def picture(seed: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Flat 8 x 8 patches, so that the tokenizer loses nothing."""
    codes = np.random.default_rng(seed).integers(0, 64, (1, height // 8, width // 8))
    return GrayTokenizer().decode(codes)[0]


def codes_of(image: np.ndarray) -> Picture:
    return Picture(GrayTokenizer().encode(image[None])[0])


def make_model(documents: Sequence[np.ndarray], tokenizer: SentencePieceTokenizer, **options: Any) -> InferenceModel:
    return toy_model(tokenizer, PlaybackDecoder(documents), **options)


def test_answers_to_prompts_of_every_format_come_from_training_documents(tokenizer: SentencePieceTokenizer) -> None:
    builder = DocumentBuilder(VOCABULARY, tokenizer)
    scene, target, first, second = (picture(seed) for seed in range(4))
    source = np.full_like(scene, 120)  # flat, so that resizing changes nothing
    documents = [
        builder.chat(0, "t2i", TEXTS[0], [], [codes_of(scene)]),
        builder.chat(1, "x2i", TEXTS[1], [codes_of(source)], [codes_of(target)]),
        builder.interleaved(2, [codes_of(first), Text(TEXTS[2]), codes_of(second), Text("end")]),
    ]
    size = (16, 24)
    prompts = [
        Prompt("interleaved", parts=[first, TEXTS[2]], image_size=size),
        Prompt("t2i", TEXTS[0], image_size=size),
        Prompt("x2i", TEXTS[1], [source.repeat(2, axis=0).repeat(2, axis=1)], image_size=size),
    ]
    model = make_model([document.tokens for document in documents], tokenizer)
    answers = model.generate(prompts, GREEDY)
    for answer, expected in zip(answers, [second, scene, target], strict=True):
        assert len(answer.images) == 1
        assert np.array_equal(answer.images[0], expected)
        assert answer.finished
        assert answer.text == ""
        assert len(answer.tokens) == len(answer.log_probs)


def test_interleaved_answers_hold_text_and_several_pictures(tokenizer: SentencePieceTokenizer) -> None:
    builder = DocumentBuilder(VOCABULARY, tokenizer)
    first, second, third = (picture(seed) for seed in range(3))
    story = [codes_of(first), Text("it moves"), codes_of(second), Text(" right"), codes_of(third)]
    document = builder.interleaved(0, story)
    prompt = Prompt("interleaved", parts=[first], image_size=(16, 24))
    model = make_model([document.tokens], tokenizer, max_images=2)
    (answer,) = model.generate([prompt], GREEDY)
    assert [part if isinstance(part, str) else "picture" for part in answer.parts] == [
        "it moves",
        "picture",
        " right",
        "picture",
    ]
    assert answer.text == "it moves right"
    assert np.array_equal(answer.images[1], third)


def test_interleaved_prompts_as_chat_go_on_with_the_answer(tokenizer: SentencePieceTokenizer) -> None:
    """The first frames are the question; what follows them is the answer so far, as in training documents."""
    builder = DocumentBuilder(VOCABULARY, tokenizer)
    first, second, third = (picture(seed) for seed in range(3))
    response = [Text("it moves"), codes_of(second), Text(" right"), codes_of(third)]
    chat = builder.chat(0, "explore", "look", [codes_of(first)], response)
    model = make_model([chat.tokens], tokenizer, interleaved_as="chat")
    for parts, expected in (
        (["look", first, "it moves"], second),
        (["look", first, "it moves", second, " right"], third),
    ):
        (answer,) = model.generate([Prompt("interleaved", parts=parts, image_size=(16, 24))], GREEDY)
        assert np.array_equal(answer.images[0], expected)


def test_the_prompt_of_guidance_keeps_answered_pictures_in_the_answer(tokenizer: SentencePieceTokenizer) -> None:
    model = make_model([], tokenizer, interleaved_as="chat", context_frames=1)
    parts: list[str | np.ndarray] = ["one", picture(1), "two", picture(2), "three"]
    (item,) = model._encode_prompts([Prompt("interleaved", parts=parts)])
    conditional, free = model._prompt_tokens(item), model._unconditional_tokens(item)
    vocabulary = model.vocabulary
    answers = [ids[ids.index(vocabulary.bss) :] for ids in (conditional, free)]
    assert answers[0] == answers[1]
    assert answers[1].count(vocabulary.boi) == 1
    assert free[: free.index(vocabulary.bss)].count(vocabulary.boi) == 1


def test_grids_follow_the_released_policy(tokenizer: SentencePieceTokenizer) -> None:
    """An edit of one picture has its grid, of several the model chooses; a continuation has the last picture's."""
    released, free = (make_model([], tokenizer, grids=grids) for grids in ("released", "free"))
    one, two = picture(1), picture(2, 24, 16)

    def grids(model: InferenceModel, *prompts: Prompt) -> list[Any]:
        return [model._grid(item) for item in model._encode_prompts(prompts)]

    edit, several = Prompt("x2i", "q", [one]), Prompt("x2i", "q", [one, two])
    continued, plain = Prompt("interleaved", parts=["a", one, two]), Prompt("t2i", "q")
    shapes = [codes_of(image).codes.shape for image in (one, two)]
    assert grids(released, edit, several, continued, plain) == [shapes[0], None, shapes[1], None]
    assert grids(free, edit, several, continued, plain) == [None] * 4
    assert released._grammar_options(continued).repeat_grid
    assert not free._grammar_options(continued).repeat_grid
    narrow = make_model([], tokenizer, max_grid_side=99)
    assert narrow._grammar_options(plain).max_side == 99


def test_picture_cut_short_is_left_out(tokenizer: SentencePieceTokenizer) -> None:
    builder = DocumentBuilder(VOCABULARY, tokenizer)
    document = builder.chat(0, "t2i", TEXTS[0], [], [codes_of(picture(0))])
    model = make_model([document.tokens], tokenizer)
    sampling = SamplingConfig(PhaseSampling(0.0), PhaseSampling(0.0), max_new_tokens=8)
    (answer,) = model.generate([Prompt("t2i", TEXTS[0], image_size=(16, 24))], sampling)
    assert not answer.finished
    assert answer.images == []
    assert len(answer.tokens) == 8


def test_split_parts_reads_what_the_builder_writes(tokenizer: SentencePieceTokenizer) -> None:
    codes = np.arange(15).reshape(3, 5)
    for image_format in ("emu35", "emu3"):
        builder = DocumentBuilder(VOCABULARY, tokenizer, image_format)
        tokens = builder.interleaved(0, [Text("a red"), Picture(codes), Picture(codes.T)]).tokens
        text, first, second = split_parts(tokens, VOCABULARY, tokenizer)
        assert tokenizer.decode(text.tolist()) == "a red"
        assert np.array_equal(first, codes)
        assert np.array_equal(second, codes.T)


def test_reconstruction_needs_no_decoder(tokenizer: SentencePieceTokenizer) -> None:
    model = InferenceModel(None, VOCABULARY, tokenizer, GrayTokenizer(), max_sequence_length=8)
    images = [picture(0), picture(1, 24, 16), picture(2)]
    for image, found in zip(images, model.reconstruct(images, (16, 24)), strict=True):
        assert np.array_equal(image, found)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("t2x", "a"), "format"),
        (Prompt("t2i", "a", image_size=(20, 24)), "whole number of visual tokens"),
        (Prompt("t2i", "a red " * 3000, image_size=(16, 24)), "longer than the model"),
    ],
)
def test_bad_prompts_are_the_users(tokenizer: SentencePieceTokenizer, prompt: Prompt, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model([np.array([1])], tokenizer).generate([prompt], GREEDY)


# Checkpoints

MODEL_CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=16,
    init_std=0.3,
    vocabulary=VOCABULARY_CONFIG,
)


@pytest.fixture
def real_model() -> Iterator[torch.nn.Module]:
    from model.backbone.transformer import build_model

    started_here = not groups.is_initialized()
    if started_here:
        groups.initialize(rank=0, world_size=1)
    yield build_model(MODEL_CONFIG, seed=5).eval()
    if started_here:
        groups.destroy()


def write_checkpoint(folder: Path, model: torch.nn.Module, metadata: dict[str, Any]) -> Path:
    """As two ranks would write it: each block of a parameter in two halves, in two files."""
    from model.parallel.sharding import logical_parameters

    folder.mkdir(parents=True)
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    keys: dict[str, Any] = {}
    parameters = dict(model.named_parameters())
    for local_name, logical in logical_parameters(model).items():
        pieces = []
        for number, block in enumerate(logical.blocks):
            values = block.of(parameters[local_name]).detach()
            half = len(values) // 2
            for rank, (start, part) in enumerate([(0, values[:half]), (half, values[half:])]):
                name = f"{logical.name}@{number}"
                files[rank][name] = part.clone()
                first, *rest = block.global_offset
                piece = {"file": f"{rank}.safetensors", "name": name}
                pieces.append(piece | {"offset": [first + start, *rest], "shape": list(part.shape)})
        shape = list(logical.global_shape)
        entry = {"global_shape": shape, "dtype": "float32", "pieces": pieces}
        keys[f"model/{logical.name}"] = entry
    for rank, tensors in enumerate(files):
        save_file(tensors, folder / f"{rank}.safetensors")
    publish_manifest(folder, {"format_version": 1, "keys": keys} | metadata)
    return folder


@pytest.fixture
def checkpoint(
    tokenizer_folder: Path,
    tokenizer: SentencePieceTokenizer,
    real_model: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    run = tmp_path / "run"
    at_folder = {run / "vision_tokenizer": GrayTokenizer()}
    monkeypatch.setattr("training.inference.loading.load_vision", at_folder.__getitem__)
    run.mkdir()
    (run / "text_tokenizer").symlink_to(tokenizer_folder)
    metadata = {
        "kind": "transformer",
        "model": asdict(MODEL_CONFIG),
        "config": {"seed": 11},
        "text_tokenizer": {"path": "text_tokenizer", "fingerprint": tokenizer.fingerprint},
        "vision_tokenizer": "gray",
    }
    write_checkpoint(run / "sft" / "checkpoints" / "step_00000003", real_model, metadata)
    return run / "sft"


def change_manifest(stage: Path, **values: Any) -> None:
    path = stage / "checkpoints" / "step_00000003" / "manifest.json"
    publish_manifest(path.parent, json.loads(path.read_text()) | values)


def test_loaded_model_answers_like_the_one_that_was_saved(
    checkpoint: Path, real_model: torch.nn.Module, tokenizer: SentencePieceTokenizer
) -> None:
    from model.generation.decoder import CachedDecoder

    prompts = [Prompt("t2i", text, image_size=(16, 16)) for text in TEXTS[:3]]
    loaded = InferenceModel.load(checkpoint).generate(prompts, GREEDY)
    saved = InferenceModel(CachedDecoder(real_model), VOCABULARY, tokenizer, GrayTokenizer(), max_sequence_length=2048)
    for found, expected in zip(loaded, saved.generate(prompts, GREEDY), strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.log_probs.tolist() == expected.log_probs.tolist()
        assert found.images[0].shape == (16, 16, 3)
    fresh = InferenceModel.load(checkpoint, untrained=True).generate(prompts, GREEDY)
    assert fresh[0].log_probs.tolist() != loaded[0].log_probs.tolist()


def test_turns_are_taken_with_any_strategy(real_model: torch.nn.Module, tokenizer: SentencePieceTokenizer) -> None:
    from model.generation.image_decoder import ImageDecoder

    found = {}
    for strategy in ("ar", "sjd"):  # greedy, both say the same
        model = toy_model(tokenizer, ImageDecoder(real_model))
        model.decode_with(DecodingConfig(strategy))
        told: list[Event] = []
        (one,) = begin(model, [Prompt("t2i", TEXTS[0], image_size=(16, 32))], GREEDY, [0])
        answer_all(model, [one], GREEDY, 0, lambda _, event, told=told: told.append(event))
        assert [len(event.codes) for event in told if isinstance(event, Rows)] == [1, 2]
        found[strategy] = one
    assert found["sjd"].ids == found["ar"].ids
    assert found["ar"].num_forwards == 1 + 1 + 7  # the prompt, the header, the codes but the last
    assert 0 < found["sjd"].num_forwards <= found["ar"].num_forwards  # weights that say nothing are hard to guess


def test_a_picture_is_seen_while_it_is_refined(real_model: torch.nn.Module, tokenizer: SentencePieceTokenizer) -> None:
    from model.generation.image_decoder import ImageDecoder

    model = toy_model(tokenizer, ImageDecoder(real_model))
    model.dida = {"path": "uniform", "heights": [1, 9], "widths": [1, 9]}
    model.decode_with(DecodingConfig("dida", DenoiseConfig(steps=4)))
    guided = SamplingConfig(guidance_scale=2.0, max_new_tokens=60)
    answerings = begin(model, [Prompt("t2i", text, image_size=(16, 32)) for text in TEXTS[:2]], guided, [0, 1])
    told: dict[int, list[Event]] = {id(one): [] for one in answerings}
    answer_all(model, answerings, guided, 0, lambda one, event: told[id(one)].append(event))
    for one in answerings:
        *refined, first, second = told[id(one)]
        assert [(event.step, event.num_steps) for event in refined if isinstance(event, Refined)] == [
            (step, 4) for step in range(4)
        ]
        assert all(event.codes.shape == (2, 4) for event in refined if isinstance(event, Refined))
        assert isinstance(first, Rows)
        assert isinstance(second, Rows)
        assert np.array_equal(second.codes, one.pictures[0])
    # The prompt with BOI 2 * 4 behind it (IMG is read with the copies); four looks.
    assert answerings[0].num_forwards == 1 + 4
    strips = refine(model, [Prompt("t2i", text, image_size=(16, 32)) for text in TEXTS[:2]], guided)
    for one, pictures in zip(answerings, strips, strict=True):
        assert len(pictures) == 4 + 1, "before each step, and the finished one"
        assert np.array_equal(pictures[-1], model.picture(one.pictures[0]))
    with pytest.raises(UserError, match="stage with the objective diagonal"):
        model.decode_with(DecodingConfig("diagonal"))
    model.diagonal = {"heights": [1, 9], "widths": [1, 9]}
    for strategy in ("dida", "diagonal"):
        model.decode_with(DecodingConfig(strategy))
        with pytest.raises(UserError, match="not trained to decode images of this size in parallel"):
            begin(model, [Prompt("t2i", "a", image_size=(16, 80))], guided, [0])


def test_foreign_tokenizers_and_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    change_manifest(checkpoint, vision_tokenizer={"path": "vision_tokenizer", "fingerprint": "x"})
    with pytest.raises(UserError, match="vision_tokenizer is not the one"):
        InferenceModel.load(checkpoint)
    train_sentencepiece(TEXTS, tmp_path / "other", TEXT_SIZE - 2)
    with pytest.raises(UserError, match="text_tokenizer is not the one"):
        InferenceModel.load(checkpoint, text_tokenizer=tmp_path / "other")
    change_manifest(checkpoint, text_tokenizer=None)
    with pytest.raises(UserError, match="does not say which text_tokenizer"):
        InferenceModel.load(checkpoint)
    change_manifest(checkpoint, kind="vision_tokenizer")
    with pytest.raises(UserError, match="cannot generate"):
        InferenceModel.load(checkpoint)
    with pytest.raises(UserError, match="no complete checkpoint"):
        InferenceModel.load(tmp_path / "nowhere")


def test_weights_of_another_size_are_refused(checkpoint: Path) -> None:
    change_manifest(checkpoint, model=asdict(MODEL_CONFIG) | {"hidden_size": 64})
    with pytest.raises(UserError, match="do not fit"):
        InferenceModel.load(checkpoint)
