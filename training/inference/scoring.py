"""Log-probabilities of given tokens under a checkpoint: inputs, answer and figures. `training.inference.scorer` computes them.

Importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.checkpoint.manifest import CheckpointManifest
from model.config import ModelConfig
from model.conversion.hugging_face import model_config
from model.errors import Problems, UserError
from model.parallel.layout_rules import add_to, divided_sizes
from model.vocabulary import Vocabulary
from training.config import ParallelConfig
from training.contracts.layout import ParallelLayout
from training.inference.prompts import is_unicode

OUT_FOLDER_FIX = "make the folder first, or name another file"


@dataclass
class ScoreConfig:
    """What to score, with what, and where the answer goes."""

    checkpoint: str = ""  # a stage folder (its newest checkpoint) or a checkpoint folder
    tokens: str | None = None  # .npy of integers [batch, length], one document a row; or a folder of token files
    text: str | None = None  # instead of `tokens`: one document
    text_file: str | None = None  # instead of `tokens`: one document a line
    out: str | None = None  # .npy, float32 [batch, length - 1]; shorter documents end in NaN
    text_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    dtype: str = "float32"  # float32 | bfloat16: of the weights and activations in this run
    tokens_per_batch: int = 4096  # documents are packed into forward passes of this many tokens
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    json: bool = False  # answer with one JSON object

    def validate(self) -> None:
        problems = Problems()
        problems.check(bool(self.checkpoint), "checkpoint", "is required", "checkpoint=<folder>")
        given = [name for name in ("tokens", "text", "text_file") if getattr(self, name) is not None]
        problems.check(
            len(given) == 1,
            "tokens",
            f"give one of tokens, text and text_file, got {given or 'none'}",
            "tokens=FILE.npy",
        )
        problems.check(self.out is not None or self.tokens is None, "out", "is required with tokens", "out=FILE.npy")
        problems.check(self.dtype in ("float32", "bfloat16"), "dtype", f"unknown value {self.dtype!r}", "dtype=float32")
        problems.check(self.tokens_per_batch > 0, "tokens_per_batch", "must be positive", "tokens_per_batch=4096")
        add_to(problems, ParallelLayout.of(self.parallel).own_problems())
        if self.out is not None:
            folder = Path(self.out).absolute().parent
            problems.check(folder.is_dir(), "out", f"there is no folder {folder}", OUT_FOLDER_FIX)
            problems.check(not Path(self.out).is_dir(), "out", f"{self.out} is a folder", "out=FILE.npy")
        problems.raise_if_any()


def load_config(path: Path) -> ScoreConfig:
    values = json.loads(path.read_text(encoding="utf-8"))
    return ScoreConfig(**{**values, "parallel": ParallelConfig(**values["parallel"])})


def save_config(config: ScoreConfig, path: Path) -> None:
    path.write_text(json.dumps(asdict(config)), encoding="utf-8")


class Documents:
    """Token documents by number. `lengths` int64 [n]; `get(i)` gives the ids of one, int64."""

    def __init__(self, lengths: Any, get: Any):
        self.lengths, self.get = lengths, get

    def __len__(self) -> int:
        return len(self.lengths)


Inputs = tuple[Path, ModelConfig, Documents]


def open_inputs(config: ScoreConfig) -> Inputs:
    """The checkpoint's folder, its model and the documents. Everything that can be refused is refused here."""
    from model.checkpoint.manifest import latest_checkpoint
    from training.inference.choice import check_kind

    folder = latest_checkpoint(config.checkpoint)
    manifest = CheckpointManifest.read(folder)
    check_kind(manifest, folder)
    model = model_config(manifest.model or {}, str(folder))
    _check_layout(config.parallel, model)
    return folder, model, open_documents(config, folder, manifest, model)


def _check_layout(layout: ParallelConfig, model: ModelConfig) -> None:
    """Documents are packed to fit the layout: only the model's sizes can refuse it."""
    problems = Problems()
    add_to(problems, ParallelLayout.of(layout).problems(divided_sizes(model), of=""))
    problems.raise_if_any()


def open_documents(config: ScoreConfig, folder: Path, manifest: CheckpointManifest, model: ModelConfig) -> Documents:
    """The documents of a run on the checkpoint `folder`, checked against its vocabulary and its longest sequence."""
    if config.tokens is None:
        documents = _open_text(config, folder, manifest, Vocabulary.from_config(model.vocabulary))
    elif Path(config.tokens).is_dir():
        documents = _open_token_files(Path(config.tokens), manifest)
    else:
        documents = _open_array(Path(config.tokens))
    where = config.tokens or config.text_file or "text"
    if len(documents) == 0 or int(documents.lengths.max()) < 2:
        raise UserError("nothing to score", where=where, expected="a document of at least 2 tokens")
    limit = model.max_sequence_length
    longest = int(documents.lengths.max())
    if longest > limit:
        raise UserError(
            "a document is longer than the model can read",
            where=where,
            got=f"{longest} tokens",
            expected=f"at most model.max_sequence_length = {limit}",
            fix="cut the documents",
        )
    _check_ids(documents, manifest, where)
    return documents


def _check_ids(documents: Documents, manifest: CheckpointManifest, where: str) -> None:
    import numpy as np

    size = described(manifest)["size"]
    for index in range(len(documents)):
        ids = documents.get(index)
        wrong = np.flatnonzero((ids < 0) | (ids >= size))
        if wrong.size:
            raise UserError(
                "a token id outside the vocabulary",
                where=f"{where}: document {index}, position {wrong[0]}",
                expected=f"ids in [0, {size})",
                got=str(ids[wrong[0]]),
                fix="tokenize with this checkpoint's tokenizers",
            )


def described(manifest: CheckpointManifest) -> dict[str, Any]:
    """The vocabulary of a transformer's checkpoint."""
    if manifest.vocabulary is None:
        raise UserError("the checkpoint's manifest does not describe its vocabulary", fix="name another checkpoint")
    return manifest.vocabulary


def _open_array(path: Path) -> Documents:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError("there is no such file of tokens", where=str(path)) from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            "the tokens cannot be read",
            where=str(path),
            expected="a .npy file of integers [batch, length]",
            got=str(error),
            fix="np.save(path, tokens)",
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(
            "not an array of tokens",
            where=str(path),
            expected="integers [batch, length]",
            got=found,
            fix="tokens.astype(np.int32), one document a row",
        )
    lengths = np.full(array.shape[0], array.shape[1], dtype=np.int64)
    return Documents(lengths, lambda index: np.asarray(array[index]).astype(np.int64))


def _open_token_files(folder: Path, manifest: CheckpointManifest) -> Documents:
    import numpy as np

    from data_pipeline.storage.format import read_manifest
    from data_pipeline.storage.token_files import TokenFileReader

    prefixes = [path.with_suffix("") for path in sorted(folder.rglob("*.idx"))]
    if not prefixes:
        raise UserError("no token files here", where=str(folder), expected="NNNNNN.idx, .bin and .json")
    vocabulary = described(manifest)
    for prefix in prefixes:
        file = read_manifest(prefix)
        if file["kind"] != "tokens" or file["vocabulary"] != vocabulary:
            raise UserError(
                "these are not token files of the checkpoint's vocabulary",
                where=str(prefix),
                expected=f"kind tokens, {vocabulary['size']} ids",
                got=f"kind {file['kind']}, {file['vocabulary'].get('size')} ids",
                fix="nextstate tokenize writes them",
            )
    readers = [TokenFileReader(prefix) for prefix in prefixes]
    starts = np.cumsum([0, *(len(reader) for reader in readers)])

    def get(index: int) -> Any:
        file = int(np.searchsorted(starts, index, side="right")) - 1
        return readers[file].tokens(index - int(starts[file])).astype(np.int64)

    lengths = np.concatenate([np.asarray(reader.lengths, dtype=np.int64) for reader in readers])
    return Documents(lengths, get)


def _open_text(config: ScoreConfig, folder: Path, manifest: CheckpointManifest, vocabulary: Vocabulary) -> Documents:
    """Documents as pretraining has them: BOS, the text, EOS."""
    import numpy as np

    from data_pipeline.documents.builder import DocumentBuilder
    from data_pipeline.documents.tokenizers import load_text_tokenizer
    from training.inference.choice import check_fingerprint, tokenizer_folder

    given = config.text_tokenizer
    tokenizer = load_text_tokenizer(tokenizer_folder(manifest, folder, "text_tokenizer", given))
    check_fingerprint(manifest, folder, "text_tokenizer", tokenizer.fingerprint)
    builder = DocumentBuilder(vocabulary, tokenizer)
    if config.text is not None:
        texts = [config.text]
    else:
        try:
            texts = Path(config.text_file or "").read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("the text cannot be read", where=str(config.text_file), got=str(error)) from None
        texts = [text for text in texts if text.strip()]
    for text in texts:
        if not is_unicode(text):
            raise UserError("a text is not Unicode", where=config.text_file or "text", got=ascii(text)[:80])
    rows = [builder.text(index, text).tokens.astype(np.int64) for index, text in enumerate(texts)]
    return Documents(np.array([len(row) for row in rows], dtype=np.int64), rows.__getitem__)


class ScoreFile:
    """The answer as it grows: rows go to the file at once, figures by class are summed up. Published by rename."""

    def __init__(self, path: Path | None, documents: Documents, vocabulary: Vocabulary):
        import numpy as np

        self.path, self.documents, self.vocabulary = path, documents, vocabulary
        self.sums = np.zeros(3)
        self.counts = np.zeros(3, dtype=np.int64)
        self._rows: Any = None
        if path is not None:
            self.temporary = path.with_name(f".{path.name}.{os.getpid()}")
            shape = (len(documents), int(documents.lengths.max()) - 1)
            try:
                self._rows = np.lib.format.open_memmap(self.temporary, "w+", np.float32, shape)
            except OSError as error:
                raise UserError(
                    "the answer cannot be written", where=str(path), got=str(error), fix=OUT_FOLDER_FIX
                ) from None

    def put(self, index: int, values: Any) -> None:
        """`values` float32 [length - 1]: the log-probability of each token of a document after its first."""
        import numpy as np

        if self._rows is not None:
            self._rows[index, : len(values)] = values
            self._rows[index, len(values) :] = np.nan
        labels = self.documents.get(index)[1:]
        classes = np.where(labels < self.vocabulary.text_size, 0, 2)
        classes[self.vocabulary.is_visual(labels)] = 1
        self.sums += np.bincount(classes, values.astype(np.float64), minlength=3)
        self.counts += np.bincount(classes, minlength=3)

    def finish(self) -> dict[str, Any]:
        if self._rows is not None:
            assert self.path is not None
            self._rows.flush()
            self._rows = None
            os.replace(self.temporary, self.path)
        names = ("text", "visual", "structure")
        by_class = {
            name: figures(float(total), int(count))
            for name, total, count in zip(names, self.sums, self.counts, strict=True)
            if count
        }
        out = str(self.path) if self.path else None
        summed = figures(float(self.sums.sum()), int(self.counts.sum()))
        return {"out": out, "num_documents": len(self.documents)} | summed | {"by_class": by_class}

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._rows is not None:
            self._rows = None
            self.temporary.unlink(missing_ok=True)


def figures(total: float, count: int) -> dict[str, Any]:
    """Number of scored tokens, their mean log-probability in nats and their perplexity."""
    mean = float(total) / int(count)
    return {
        "num_tokens": int(count),
        "mean_log_probability": mean,
        "perplexity": math.exp(-mean) if mean > -700 else math.inf,
    }


@contextlib.contextmanager
def writing(
    path: Path | None, documents: Documents, vocabulary: Vocabulary, *, enabled: bool
) -> Iterator[ScoreFile | None]:
    """The score file of the rank that writes it, None on the others; removed when anything fails."""
    if not enabled:
        yield None
        return
    file = ScoreFile(path, documents, vocabulary)
    try:
        yield file
    finally:
        file.abandon()
