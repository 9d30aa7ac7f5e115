"""A text tokenizer as other tools read it: its own file, and a Hugging Face tokenizer directory with the same ids.

`tokenizer.json` is written directly, without the `tokenizers` library. It knows every id of the vocabulary: text
pieces, structure ids and visual codes (as special tokens).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.documents.byte_pairs import QWEN_PATTERN, byte_letters
from data_pipeline.documents.tokenizers import (
    MODEL_FILE,
    _parse_ranks,
    load_text_tokenizer,
    read_description,
    sole_tokenizer_file,
)
from model.errors import UserError
from model.vocabulary import EMU35_TEXT_SIZE, Vocabulary

RANKS_FILE = "emu3.tiktoken"  # names of the released files
VISION_TOKENS_FILE = "emu3_vision_tokens.txt"
_NAMED_EMU35 = {
    151643: "<|endoftext|>",
    151644: "<|im_start|>",
    151645: "<|im_end|>",
    151851: "<|image token|>",
    151852: "<|image start|>",
    151853: "<|image end|>",
}
_FIRST_EXTRA = 151_646
_FIRST_VISION_LINE = 151_851  # the released list of vision tokens starts with the image's own three


def export_text_tokenizer(source: Path, vocabulary: Vocabulary, target: Path) -> dict[str, Any]:
    """Write the tokenizer of `source` (folder or file) into the folder `target`; what was written, for the answer.

    Raises `UserError` for a tokenizer that is not of this vocabulary, or of a kind that has no export.
    """
    path = tokenizer_file(source)
    tokenizer = load_text_tokenizer(source)
    if path.suffix == ".tiktoken":
        data = path.read_bytes()
        ranks = _parse_ranks(data, path.name)
        _check_size(len(ranks), vocabulary, path)
        (target / RANKS_FILE).write_bytes(data)
        if vocabulary.text_size == EMU35_TEXT_SIZE:
            lines = [token_name(i, vocabulary) for i in range(_FIRST_VISION_LINE, vocabulary.size)]
            (target / VISION_TOKENS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        parts = byte_pair_parts(ranks)
    elif path.suffix == ".model":
        _check_size(tokenizer.size, vocabulary, path)
        (target / MODEL_FILE).write_bytes(path.read_bytes())
        parts = unigram_parts(path.read_bytes())
    else:
        raise UserError(
            "this kind of text tokenizer has no export", where=str(path), expected=".model or .tiktoken", got=path.name
        )
    added = [
        {
            "id": index,
            "content": token_name(index, vocabulary),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in range(vocabulary.text_size, vocabulary.size)
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
    } | parts
    (target / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    names = {name: token_name(index, vocabulary) for name, index in vocabulary.structure.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "pad_token": names["pad"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {"source": str(source), "fingerprint": tokenizer.fingerprint, "size": tokenizer.size}


def tokenizer_file(source: Path) -> Path:
    """The tokenizer's own file: `source`, or the one that its folder describes or consists of."""
    if not source.is_dir():
        return source
    description = read_description(source)
    if description is None:
        return sole_tokenizer_file(source) or source / "tokenizer.json"
    return source / Path(str(description["file"])).name


def _check_size(size: int, vocabulary: Vocabulary, path: Path) -> None:
    if size != vocabulary.text_size:
        raise UserError(
            "the text tokenizer is not of this vocabulary",
            where=str(path),
            expected=f"{vocabulary.text_size} text ids",
            got=str(size),
            fix="text_tokenizer=FOLDER of the one that the model was trained with",
        )


def token_name(index: int, vocabulary: Vocabulary) -> str:
    """The written form of an id behind the text ids; the released names for the emu35 vocabulary."""
    if index >= vocabulary.visual_start:
        return f"<|visual token {index - vocabulary.visual_start:06d}|>"
    if vocabulary.text_size == EMU35_TEXT_SIZE:
        return _NAMED_EMU35.get(index, f"<|extra_{index - _FIRST_EXTRA}|>")
    names = {value: name for name, value in vocabulary.structure.items()}
    return f"<|{names.get(index, f'reserved_{index - vocabulary.text_size}')}|>"


def unigram_parts(model: bytes) -> dict[str, Any]:
    """A SentencePiece unigram model without normalisation, as `train_sentencepiece` makes it."""
    import importlib

    schema = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # generated code

    proto = schema.ModelProto()
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    plain = (
        normalizer.name == "identity" and not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    )
    if trainer.model_type != trainer.UNIGRAM or not plain:
        raise UserError(
            "only SentencePiece unigram models that take text as it is can be exported",
            expected="normalization identity, no added space",
            got=f"normalization {normalizer.name}",
        )
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": trainer.unk_id,
            "byte_fallback": True,
            "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        },
    }


def byte_pair_parts(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Byte-level BPE from tiktoken ranks: two tokens merge wherever their sum is a token."""
    letters = byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    # tiktoken joins any two neighbours whose sum is a token, the token of lowest rank first.
    merges = [
        [written(token[:cut]), written(token[cut:])]
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken looks a whole piece up before it merges
            "vocab": {written(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
