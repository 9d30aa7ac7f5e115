"""`nextstate score`: against transformers' Qwen3, in several layouts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen3_checkpoints import NUM_IDS, config_of, transformers_model, write_checkpoint

from data_pipeline.documents.builder import DocumentBuilder
from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from data_pipeline.storage.token_files import TokenFileWriter
from launch.command_line import cli
from launch.commands import score as command
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig
from training.inference.scoring import ParallelConfig, ScoreConfig

SHAPES = [(48, 4, 2, 32, 1e6), (32, 4, 4, 8, 1e4), (24, 6, 2, 10, 5e5)]


@torch.no_grad()
def expected_scores(model: Any, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))
    log_probabilities = torch.log_softmax(model(ids).logits.double(), dim=-1)[:, :-1]
    return log_probabilities.gather(2, ids[:, 1:, None])[..., 0].numpy()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("score") / "checkpoint"
    config = config_of(*SHAPES[0], num_layers=4)
    model = transformers_model(config)
    return write_checkpoint(folder, model.state_dict(), config), model


def save_tokens(path: Path, batch: int, length: int, dtype: Any = np.int32) -> np.ndarray:
    tokens = np.random.default_rng(batch).integers(0, NUM_IDS, (batch, length)).astype(dtype)
    np.save(path, tokens)
    return tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens_per_batch", [1, 130, 10_000])
def test_scores_agree_with_transformers(shape: tuple, tokens_per_batch: int, tmp_path: Path) -> None:
    config = config_of(*shape)
    model = transformers_model(config)
    folder = write_checkpoint(tmp_path / "checkpoint", model.state_dict(), config)
    tokens = save_tokens(tmp_path / "tokens.npy", 7, 60)
    out = tmp_path / "out.npy"
    answer = command.run(
        ScoreConfig(str(folder), tokens=str(tmp_path / "tokens.npy"), out=str(out), tokens_per_batch=tokens_per_batch)
    )
    got, expected = np.load(out), expected_scores(model, tokens)
    assert got.dtype == np.float32
    assert got.shape == (7, 59)
    assert np.abs(got - expected).max() <= 1e-5
    assert answer["num_tokens"] == 7 * 59
    assert answer["mean_log_probability"] == pytest.approx(expected.mean(), abs=1e-6)
    counts = [answer["by_class"][name]["num_tokens"] for name in ("text", "visual", "structure")]
    labels = tokens[:, 1:]
    assert counts == [(labels < 70).sum(), (labels >= 86).sum(), ((labels >= 70) & (labels < 86)).sum()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out.npy", "tokens.npy"]


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"context": 2}, {"tensor": 2, "pipeline": 2}]
)
def test_every_layout_gives_the_same_scores(
    layout: dict, checkpoint: tuple[Path, Any], tmp_path: Path, pool: Any
) -> None:
    folder, model = checkpoint
    tokens = save_tokens(tmp_path / "tokens.npy", 5, 33)  # odd: rows do not divide among ranks
    config = ScoreConfig(
        str(folder),
        tokens=str(tmp_path / "tokens.npy"),
        out=str(tmp_path / "out.npy"),
        tokens_per_batch=40,
        parallel=ParallelConfig(**layout),
    )
    pool.run(score_rank, config, ranks=config.parallel.world_size)
    assert np.abs(np.load(tmp_path / "out.npy") - expected_scores(model, tokens)).max() <= 1e-5


def score_rank(config: ScoreConfig) -> Any:
    from training.inference.scorer import score

    return score(config)


def test_the_command_starts_its_ranks_and_answers_in_json(
    checkpoint: tuple[Path, Any], tmp_path: Path, capfd: Any
) -> None:
    folder, model = checkpoint
    tokens = save_tokens(tmp_path / "tokens.npy", 3, 20, np.uint16)
    out = tmp_path / "out.npy"
    call = ["score", f"checkpoint={folder}", f"tokens={tmp_path}/tokens.npy", f"out={out}", "parallel.tensor=2"]
    assert cli.main([*call, "json=true"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["out"], answer["num_documents"]) == (str(out), 3)
    assert np.abs(np.load(out) - expected_scores(model, tokens)).max() <= 1e-5


def text_checkpoint(tmp_path: Path) -> tuple[Path, Any, Any, SentencePieceTokenizer]:
    """A checkpoint in a run folder with a text tokenizer beside it."""
    run = tmp_path / "run"
    train_sentencepiece(["a red circle at top left", "make it blue"] * 40, run / "text_tokenizer", 280)
    tokenizer = SentencePieceTokenizer((run / "text_tokenizer" / "tokenizer.model").read_bytes())
    vocabulary = VocabularyConfig(text_size=280, reserved_size=16, visual_size=23, pad_multiple=64)
    config = config_of(*SHAPES[0], vocabulary=vocabulary)
    padded = Vocabulary.from_config(vocabulary)
    assert padded.padded_size == padded.size + 1  # what the helper writes
    model = transformers_model(config, num_ids=padded.size)
    record = {"path": "text_tokenizer", "fingerprint": tokenizer.fingerprint}
    folder = run / "sft" / "checkpoints" / "step_00000001"
    return (write_checkpoint(folder, model.state_dict(), config, text_tokenizer=record), config, model, tokenizer)


def test_texts_and_token_files_of_different_lengths(tmp_path: Path) -> None:
    folder, config, model, tokenizer = text_checkpoint(tmp_path)
    builder = DocumentBuilder(Vocabulary.from_config(config.vocabulary), tokenizer)
    texts = ["a red circle", "make it blue at top", "a"]
    documents = [builder.text(index, text) for index, text in enumerate(texts)]
    rows = [document.tokens for document in documents]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, ""]))
    with TokenFileWriter(tmp_path / "tokens" / "000000") as writer:
        for document in documents:
            writer.add(document.tokens, document.segments)
        writer.finish(
            {"kind": "tokens", "vocabulary": builder.vocabulary.describe(), "num_tokens": 0, "num_documents": 3}
        )
    stage = str(folder.parents[1])
    for given in ({"text_file": str(tmp_path / "texts.txt")}, {"tokens": str(tmp_path / "tokens")}):
        command.run(ScoreConfig(stage, out=str(tmp_path / "out.npy"), **given))
        got = np.load(tmp_path / "out.npy")
        assert got.shape == (3, max(map(len, rows)) - 1)
        for values, row in zip(got, rows, strict=True):
            assert np.abs(values[: len(row) - 1] - expected_scores(model, row[None])[0]).max() <= 1e-5
            assert np.isnan(values[len(row) - 1 :]).all()
    answer = command.run(ScoreConfig(stage, text=texts[0]))
    expected = expected_scores(model, rows[0][None]).mean()
    assert answer["mean_log_probability"] == pytest.approx(expected, abs=1e-6)
    assert answer["out"] is None


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.save(path, np.zeros((2, 3), np.float32)), "not an array of tokens"),
        (lambda path: np.save(path, np.zeros(3, np.int32)), "not an array of tokens"),
        (lambda path: np.save(path, np.zeros((2, 1), np.int32)), "nothing to score"),
        (lambda path: np.save(path, np.zeros((0, 9), np.int32)), "nothing to score"),
        (lambda path: np.save(path, np.full((2, 3), NUM_IDS)), "outside the vocabulary"),
        (lambda path: np.save(path, np.array([[1, 2], [3, -1]])), "document 1, position 1"),
        (lambda path: np.save(path, np.zeros((1, 2049), np.int8)), "longer than the model"),
        (lambda path: np.save(path, np.array([[1, 2]], dtype=object), allow_pickle=True), "cannot be read"),
        (lambda path: path.write_bytes(b"no numpy file"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no token files"),
    ],
)
def test_bad_tokens_are_the_users(write: Any, message: str, checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    write(path)
    config = ScoreConfig(str(checkpoint[0]), tokens=str(path), out=str(tmp_path / "out.npy"))
    with pytest.raises(UserError, match=message):
        command.run(config)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "{}/missing/out.npy"}, "there is no folder"),
        ({"out": "{}"}, "is a folder"),
        ({"out": None}, "out: is required"),
        ({"text": "a"}, "give one of"),
        ({"dtype": "float8"}, "unknown value"),
        ({"checkpoint": "{}/nothing"}, "no complete checkpoint"),
        ({"parallel": ParallelConfig(tensor=0)}, "parallel.tensor"),
        ({"parallel": ParallelConfig(tensor=3)}, "3 does not divide num_attention_heads"),
        ({"parallel": ParallelConfig(pipeline=3)}, "3 does not divide num_layers"),
    ],
)
def test_bad_configurations_are_the_users(
    changes: dict, message: str, checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    save_tokens(tmp_path / "tokens.npy", 2, 4)
    values = {
        "checkpoint": str(checkpoint[0]),
        "tokens": str(tmp_path / "tokens.npy"),
        "out": str(tmp_path / "out.npy"),
    }
    values |= {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        command.run(ScoreConfig(**values))
