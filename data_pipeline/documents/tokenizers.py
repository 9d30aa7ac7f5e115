"""Text tokenizers behind one interface: SentencePiece, tiktoken ranks, Hugging Face `tokenizers`.

All of them read text only: the names of control tokens in a user's text ("<s>", "<|extra_200|>")
are encoded as the characters they are. Structure ids come from `model.vocabulary` alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import itertools
import json
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.documents.byte_pairs import QWEN_PATTERN, BytePairs, byte_pairs_of, grouped
from data_pipeline.storage.atomic import atomic_write_bytes, atomic_write_json
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.errors import UserError

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
FORMAT_VERSION = 1

_MAX_BLANKS = 100_000  # of a run that is encoded at once
_MANY_CHARACTERS = 1 << 22  # for which Hugging Face's library takes seconds
_ENDLESS_BLANKS = re.compile(rf"\s{{{_MAX_BLANKS},}}")
_NUM_BYTES = 256  # pieces that every model has, to write any character
_MAX_LINE_BYTES = 4096  # of the SentencePiece trainer; longer lines would be ignored


class TextTokenizer(Protocol):
    """Text to ids in [0, size) and back."""

    size: int
    fingerprint: str  # differs wherever two tokenizers may give other ids

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as int32 [n]."""
        ids = self.encode(text)
        return np.fromiter(ids, np.int32, len(ids))  # several times as fast as `np.array` of a list

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each; in one call where the library has one. May be called in several threads at a time."""
        return [self.encode_array(text) for text in texts]


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model. With `train_sentencepiece`'s options decode(encode(x)) == x."""

    def __init__(self, model: bytes):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("not a SentencePiece model", got=str(error)) from error
        self.size = self._processor.vocab_size()
        self.fingerprint = _fingerprint("sentencepiece", model)
        # SentencePiece writes a space as this character; the character itself goes as bytes.
        self._block_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._with_blocks(text) if "\u2581" in text else self._processor.encode(text)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        if "\u2581" in text:
            return np.array(self._with_blocks(text), np.int32)
        ids: np.ndarray = self._processor.encode(text, out_type="numpy")
        return ids

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        plain = [text for text in texts if "\u2581" not in text]
        encoded = iter(self._processor.encode(plain, out_type="numpy", num_threads=1))
        return [self.encode_array(text) if "\u2581" in text else next(encoded) for text in texts]

    def _with_blocks(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(text.split("\u2581")):
            ids.extend(self._block_ids if number else [])
            ids.extend(self._processor.encode(piece))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids])


class TiktokenTokenizer(TextTokenizer):
    """Byte-level BPE from a ranks file as Qwen and Emu3.5 ship it; text is NFC-normalised first."""

    def __init__(self, ranks_file: bytes, name: str = "ranks"):
        import tiktoken

        ranks = _parse_ranks(ranks_file, name)
        pattern = grouped(QWEN_PATTERN)
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.size = len(ranks)
        self.fingerprint = _fingerprint("tiktoken", ranks_file)

    def encode(self, text: str) -> list[int]:
        normal = text if text.isascii() else unicodedata.normalize("NFC", text)
        return _joined([self._encoding.encode_ordinary(part) for part in _split_long(normal)])

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(index) for index in ids])


class HuggingFaceTokenizer(TextTokenizer):
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, definition: bytes):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError("this tokenizer needs the `tokenizers` package", fix="pip install tokenizers") from error
        # The library raises a bare Exception on a file it cannot read.
        try:
            self._tokenizer = Tokenizer.from_str(definition.decode())
        except Exception as error:
            raise UserError("not a tokenizer.json of Hugging Face", got=str(error)) from error
        self._tokenizer.encode_special_tokens = True  # names of special tokens are mere text
        # A file saved by a training script may cut or fill every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The number of entries says less: a vocabulary may have holes.
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = _fingerprint("huggingface", definition)
        self._definition = definition
        self._num_characters = 0  # encoded until now
        self._fast: BytePairs | None = None
        self._choice = threading.Lock()

    def encode(self, text: str) -> list[int]:
        return _joined([self._library_ids(part) for part in _split_long(text)])

    def encode_array(self, text: str) -> np.ndarray:
        self._num_characters += len(text)
        if self._num_characters < _MANY_CHARACTERS or (fast := self._fast_one()) is None:
            return super().encode_array(text)
        parts = [self._fast_ids(fast, part) for part in _split_long(text)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])

    def _fast_ids(self, fast: BytePairs, text: str) -> np.ndarray:
        ids = fast.ids(text)
        return np.array(self._library_ids(text), np.int32) if ids is None else ids

    def _library_ids(self, text: str) -> list[int]:
        # The fast one gives no offsets, which nobody asks for.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _fast_one(self) -> BytePairs | None:
        """Not made for a few texts: a large vocabulary takes a second or two."""
        with self._choice:
            if self._definition:
                self._fast, self._definition = byte_pairs_of(self._definition, self._tokenizer), b""
        return self._fast

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)


def encode_grid(tokenizer: TextTokenizer, height: int, width: int) -> list[int]:
    """The ids of an image block's size, "6*6", one for each character whatever would be merged.

    Raises `UserError` when the tokenizer has no token of its own for a digit or the star.
    """
    ids = []
    for character in f"{height}*{width}":
        encoded = tokenizer.encode(character)
        if len(encoded) != 1:
            raise UserError(
                "the text tokenizer cannot write image sizes",
                expected="one token for each digit and *",
                got=f"{len(encoded)} tokens for {character!r}",
                fix="train the tokenizer with digits and * among its characters",
            )
        ids += encoded
    return ids


@file_errors_are_user_errors("the text tokenizer")
def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """From a folder that `train_sentencepiece` wrote, or a .model, .tiktoken or .json file."""
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise UserError(
            "the text tokenizer does not exist",
            where=str(path),
            expected="a text_tokenizer folder, or a .model, .tiktoken or tokenizer.json file",
            fix="train one with `nextstate train stage=text_tokenizer`, or give its path",
        )
    return _tokenizer_of_file(path, path.read_bytes())


def _load_folder(folder: Path) -> TextTokenizer:
    description = read_description(folder)
    if description is None:
        found = sole_tokenizer_file(folder)
        if found is not None:
            return load_text_tokenizer(found)
        raise UserError(
            "the folder holds no text tokenizer",
            where=str(folder),
            expected=f"{DESCRIPTION_FILE}, or one .tiktoken or .model file",
            fix="train one with `nextstate train stage=text_tokenizer`",
        )
    path = folder / Path(str(description["file"])).name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise UserError(
            "the text tokenizer is damaged",
            where=str(path),
            expected=f"sha256 {description['sha256']}",
            got=hashlib.sha256(data).hexdigest(),
            fix="remove the folder and train it again",
        )
    return _tokenizer_of_file(path, data)


def sole_tokenizer_file(folder: Path) -> Path | None:
    """Of a folder that another tool made: `tokenizer.json` of Hugging Face, or the only ranks or model file."""
    if (folder / DESCRIPTION_FILE).is_file():
        return folder / DESCRIPTION_FILE
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".tiktoken", ".model")]
    return found[0] if len(found) == 1 else None


def _tokenizer_of_file(path: Path, data: bytes) -> TextTokenizer:
    if path.suffix == ".model":
        return SentencePieceTokenizer(data)
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer(data, path.name)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(data)
    raise UserError(
        "unknown kind of text tokenizer",
        where=str(path),
        expected=".model, .tiktoken or .json",
        got=path.suffix or "no suffix",
        fix="rename the file or convert it",
    )


def read_description(folder: Path) -> dict[str, Any] | None:
    """What `train_sentencepiece` recorded, None where the folder is not one of its own."""
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    ours = isinstance(description, dict) and {"kind", "file", "sha256"} <= description.keys()
    return description if ours else None


def train_sentencepiece(
    texts: Iterable[str],
    target: Path,
    size: int,
    *,
    seed: int = 0,
    character_coverage: float = 0.9995,
    inputs: dict[str, Any] | None = None,
) -> SentencePieceTokenizer:
    """Train a unigram model of exactly `size` pieces and publish it as the folder `target`.

    The same texts in the same order give the same bytes: one thread, nothing sampled. Text is
    taken as it is (no normalisation, no added space), unknown characters become bytes, and digits
    stand one by one, so that decode(encode(x)) == x. `character_coverage` is the share of the
    text's characters that get pieces of their own, as far as `_rare_characters` allows. `inputs` is
    kept in the description, which is written last. Raises `UserError` when the texts are too few
    for `size` pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = list(_training_lines(texts))  # the trainer holds them all anyway
    rare = _rare_characters(lines, size - _NUM_BYTES, character_coverage)
    sentences = [part for line in lines for part in line.translate(rare).split("\n") if part]
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            num_threads=1,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            required_chars="0123456789*",
            character_coverage=1.0,
            shuffle_input_sentence=False,
            max_sentence_length=_MAX_LINE_BYTES + 8,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(error, size) from error
    description = {
        "format_version": FORMAT_VERSION,
        "kind": "sentencepiece",
        "file": MODEL_FILE,
        "size": size,
        "sha256": hashlib.sha256(model.getvalue()).hexdigest(),
        "inputs": inputs or {},
    }
    tokenizer = SentencePieceTokenizer(model.getvalue())
    _publish(target, model.getvalue(), description)
    return tokenizer


def _training_error(error: RuntimeError, size: int) -> UserError:
    message = str(error).strip().splitlines()[-1]
    suggested = re.search(r"value <= (\d+)", message)
    fix = f"ask for at most {suggested[1]} pieces" if suggested else "give other text or another size"
    return UserError(
        "the text tokenizer cannot be trained",
        expected=f"text for {size} pieces",
        got=message,
        fix=f"{fix}, or give more text",
    )


def _rare_characters(lines: Iterable[str], num_pieces: int, coverage: float) -> dict[int, str]:
    """A table that turns the characters without a piece of their own into line ends.

    Kept are the most frequent ones that make up `coverage` of the text, as far as they take a
    quarter of the pieces at most (of a small vocabulary, a half). The trainer has an option for
    the share, but not for the number, without which Chinese text leaves no room for words.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    covered = itertools.accumulate(counts[character] for character in ordered)
    wanted = sum(total < coverage * counts.total() for total in covered) + 1
    num_kept = min(wanted, max(num_pieces // 4, min(num_pieces // 2, 128)))
    return dict.fromkeys(map(ord, ordered[num_kept:]), "\n")


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, cut at the trainer's limit."""
    max_characters = _MAX_LINE_BYTES // 4  # a character has at most 4 bytes in UTF-8
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), max_characters):
                yield line[start : start + max_characters]


def _publish(target: Path, model: bytes, description: dict[str, Any]) -> None:
    """The description is removed first and written last: without it there is no tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    (target / DESCRIPTION_FILE).unlink(missing_ok=True)
    atomic_write_bytes(target / MODEL_FILE, model)
    atomic_write_json(target / DESCRIPTION_FILE, description)


def _parse_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Lines of base64 token and rank. Ranks must be 0 .. n - 1."""
    try:
        lines = (line.split() for line in data.splitlines() if line.strip())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise UserError("not a tiktoken ranks file", where=name, got=str(error)) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(
            "not a complete tiktoken ranks file",
            where=name,
            expected="every rank from 0 on once, the 256 single bytes among the tokens",
            got=f"{len(ranks)} tokens",
        )
    return ranks


def _split_long(text: str) -> Iterator[str]:
    """The whole text; only a run of blanks beyond any real one is cut, inside.

    tiktoken and Hugging Face cut text by patterns that look ahead over blanks, and end the process on a million of
    them. Any other cut could change the ids around it, and none is needed: time grows with the length.
    """
    start = 0
    if len(text) < _MAX_BLANKS:
        if text:
            yield text
        return
    for run in _ENDLESS_BLANKS.finditer(text):
        for end in range(run.start() + _MAX_BLANKS, run.end(), _MAX_BLANKS):
            yield text[start:end]
            start = end
    if text[start:]:
        yield text[start:]


def _joined(parts: list[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts))


def _fingerprint(kind: str, data: bytes) -> str:
    return hashlib.blake2b(kind.encode() + b"\0" + data, digest_size=16).hexdigest()
