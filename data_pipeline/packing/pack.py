"""Token files -> packed files: rows of fixed length, filled by choosing from a pool that mixes sources.

Packing is a pure function of (manifests, seed, configuration). The plan, which uses lengths only, is made anew by
every run; shards that are published already are not written again, so a run that was killed is continued by the same
command and ends in the same bytes.

Documents are taken in the order of a keyed permutation over all of them, so neighbouring rows mix sources and the
order of the rows needs no further shuffling. Images are never cut. Plain text marked `SPLITTABLE` fills the holes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents.prompts import label
from data_pipeline.packing.choice import TRAINING, Choice
from data_pipeline.packing.duplicates import NAME as NEAR_DUPLICATES
from data_pipeline.packing.duplicates import rule_of
from data_pipeline.packing.held_out import FOLDER_NAME as HELD_OUT_FOLDER
from data_pipeline.packing.held_out import HeldOutSet
from data_pipeline.packing.held_out import validate as validate_held_out
from data_pipeline.packing.pool import Pool
from data_pipeline.packing.window import Piece, Pieces, Row, WindowPacker
from data_pipeline.storage.atomic import atomic_write_bytes, atomic_write_json, remove_stale_temporaries
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from data_pipeline.storage.folder_claim import claim_folder, clear_claim
from data_pipeline.storage.format import FORMAT_VERSION, TOKEN_DTYPE, read_manifest, seal, suffixed
from data_pipeline.storage.manifests import Manifests
from data_pipeline.storage.packed_files import DATASET_NAME, check_shard, read_dataset_manifest
from data_pipeline.storage.permutation import derive_key, permute
from data_pipeline.storage.segments import MAX_TASKS, SEGMENT_DTYPE, Kind, count_classes, tasks_of
from data_pipeline.storage.token_files import TokenFileWriter
from model.durable import fingerprint_of
from model.errors import Problems, UserError

QUARANTINE_NAME = "dataset.quarantine.jsonl"
FILTERS_NAME = "dataset.filters.jsonl"  # what was left out as alike, in the form of a token file's filters
# Goes into the fingerprint of a packed folder: rows of packers that choose otherwise are never mixed.
_PACKER = "window-3"
# Documents whose place in the order is computed and whose files are opened at once: few for the first row, then more.
_LEAST_ORDER_BLOCK, _ORDER_BLOCK = 256, 65_536
_log = logging.getLogger(__name__)


@dataclass
class PackConfig:
    """What the packed bytes depend on, beside the token files."""

    sequence_length: int = 32_768  # tokens of a row
    rows_per_shard: int = 8_192
    window_rows: int = 256  # documents of so many rows wait to be chosen from; more of them keep the order less
    minimum_piece_tokens: int = 8  # text is not cut into pieces shorter than this
    seed: int = 1234

    def validate(self, problems: Problems, key: str) -> None:
        for name, least in (("sequence_length", 2), ("rows_per_shard", 1), ("window_rows", 1)):
            value = getattr(self, name)
            problems.check(value >= least, f"{key}{name}", f"must be at least {least}, got {value}")
        fits = 1 <= self.minimum_piece_tokens <= self.sequence_length
        problems.check(
            fits, f"{key}minimum_piece_tokens", "must be between 1 and sequence_length", f"{key}minimum_piece_tokens=8"
        )


@dataclass
class PackSummary:
    """What a packed folder holds."""

    target: str
    num_rows: int
    num_tokens: int  # padding included
    num_real_tokens: int
    fill: float  # real tokens / all tokens
    sources: dict[str, int]  # real tokens of each
    counts_by_class: dict[str, int]
    quarantined: dict[str, int] = field(default_factory=dict)  # documents left out, by reason
    held_out: dict[str, int] = field(default_factory=dict)  # documents kept for each validation set


@file_errors_are_user_errors("the token files or the target")
def pack(
    token_folders: Mapping[str, str | Path | Sequence[str | Path]],
    target: str | Path,
    config: PackConfig,
    removed: frozenset[int] = frozenset(),
    held_out: Mapping[str, HeldOutSet] | None = None,
    max_similarity: float | None = None,
) -> PackSummary:
    """Pack the token files of `token_folders` (source name -> folder or folders) into `target`.

    Documents whose ids are in `removed` are left out and counted under that reason. So are all but the first of documents that
    are alike by more than `max_similarity` (None: what the token files say; `data_pipeline.packing.duplicates`). Those of the
    sets of `held_out` are packed into folders of their own, `target/held_out/NAME`, before the others.
    Raises `UserError` for a bad configuration, missing or damaged input, token files of different vocabularies or
    tokenizers, a target that holds something else or that another process packs, and files that cannot be read or
    written.
    """
    problems = Problems()
    config.validate(problems, "")
    problems.check(bool(token_folders), "tokens", "no source is given", "tokens.NAME=FOLDER")
    sets = dict(held_out or {})
    validate_held_out(sets, problems)
    _check_each_once(token_folders, problems)
    fine = max_similarity is None or 0 <= max_similarity <= 1
    problems.check(fine, "max_similarity", f"must be in [0, 1], got {max_similarity}", "max_similarity=0.8")
    problems.raise_if_any()
    target = Path(target)
    pool = Pool({name: _as_list(folders) for name, folders in token_folders.items()})
    try:
        inputs = pool.source_fingerprints()
        identity = {"config": asdict(config), "inputs": inputs, "packer": _PACKER, "format_version": FORMAT_VERSION}
        if removed:
            identity["removed"] = fingerprint_of(sorted(removed))
        if sets:
            identity["held_out"] = {name: one.describe() for name, one in sets.items()}
        rule = rule_of(pool, max_similarity)
        if rule is not None:
            identity[NEAR_DUPLICATES] = rule.describe()
        choice = Choice(pool, removed, sets, rule)
        # The rows to train on are finished last: where they are, the sets are.
        parts = [*sorted(sets), TRAINING]
        packings = [_Packing(choice, target, config, part, identity, inputs) for part in parts]
        if not all(packing.is_complete() for packing in packings):
            with claim_folder(target, "pack"):
                _write_rows(pool, packings)
        else:
            clear_claim(target)
    finally:
        pool.close()
    return summarise(target)


def summarise(target: str | Path) -> PackSummary:
    """The summary of a finished packed folder."""
    dataset = read_dataset_manifest(target)
    held_out = {name: one["num_documents"] for name, one in dataset.get("held_out", {}).items()}
    return PackSummary(target=str(target), held_out=held_out, **{name: dataset[name] for name in _SUMMARY_KEYS})


_SUMMARY_KEYS = ("num_rows", "num_tokens", "num_real_tokens", "fill", "sources", "counts_by_class", "quarantined")


def _check_each_once(token_folders: Mapping[str, str | Path | Sequence[str | Path]], problems: Problems) -> None:
    """Documents of one folder under two names would be packed twice, and nothing later would tell."""
    names: dict[Path, list[str]] = {}
    for name, folders in token_folders.items():
        for folder in _as_list(folders):
            names.setdefault(Path(folder).resolve(), []).append(name)
    for folder, found in names.items():
        others = ", ".join(found[1:])
        problems.check(len(found) == 1, f"tokens.{found[0]}", f"{folder} is that of {others} too", "name it once")


def _as_list(folders: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [folders] if isinstance(folders, (str, Path)) else list(folders)


def _write_rows(pool: Pool, packings: Sequence[_Packing]) -> None:
    """In a folder that this process holds: another one may have finished, or begun, while it waited."""
    missing = [packing for packing in packings if not packing.is_complete()]
    if any(packing.choice.depends_on_all for packing in missing):
        pool.load_index(verify=True)  # before anything is left out for what a file says; else as they come
    for packing in missing:
        packing.run()


def _is_complete(target: Path, fingerprint: str) -> bool:
    """Is the whole folder packed already? Raises `UserError` when it holds rows of other input or configuration."""
    if not target.is_dir():
        return False
    dataset = read_dataset_manifest(target) if (target / DATASET_NAME).exists() else None
    if dataset is not None:
        _check_fingerprint(target / DATASET_NAME, dataset, fingerprint)
    entries = {entry["name"]: entry for entry in dataset["shards"]} if dataset is not None else {}
    num_shards = 0
    for name, manifest in Manifests(target, "packed").each():
        _check_fingerprint(target / f"{name}.json", manifest, fingerprint)
        if name in entries:
            check_shard(target / name, manifest, entries[name])
        num_shards += 1
    return dataset is not None and num_shards == len(entries)


def _check_fingerprint(path: Path, manifest: dict[str, Any], fingerprint: str) -> None:
    if manifest.get("config_fingerprint") != fingerprint:
        raise UserError(
            "the target holds rows packed from other token files, with another configuration or by another version",
            where=str(path),
            expected=f"fingerprint {fingerprint}",
            got=str(manifest.get("config_fingerprint")),
            fix="choose another target, or delete that folder when its rows are no longer needed",
        )


class _Packing:
    """One folder of a run of `pack`: plans all its rows, writes the shards that are missing.

    part: the name of a held-out set, or `TRAINING` for all documents that no set has.
    """

    def __init__(
        self,
        choice: Choice,
        target: Path,
        config: PackConfig,
        part: str,
        identity: dict[str, Any],
        inputs: list[dict[str, str]],
    ):
        self.choice, self.pool, self.config, self.part = choice, choice.pool, config, part
        self.target = target / HELD_OUT_FOLDER / part if part != TRAINING else target
        self.fingerprint = fingerprint_of(identity | {"part": part} if part != TRAINING else identity)
        self.inputs = inputs
        self.quarantine: list[dict[str, Any]] = []

    def is_complete(self) -> bool:
        return _is_complete(self.target, self.fingerprint)

    def run(self) -> None:
        self.target.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(self.target, "dataset.")
        rows = self.plan()
        manifests: list[dict[str, Any]] = []
        for first in rows:
            # Planned while they are written: those of a shard may have a million pieces.
            shard_rows = chain([first], islice(rows, self.config.rows_per_shard - 1))
            manifests.append(self.write_shard(len(manifests), shard_rows))
        self.publish_dataset(manifests)

    def plan(self) -> Iterator[Row]:
        """The rows in order, each as its pieces."""
        config = self.config
        packer = WindowPacker(config.sequence_length, config.window_rows, config.minimum_piece_tokens, self.pool.cut)
        for pieces, are_fillers in self.pieces():
            yield from packer.add(pieces, are_fillers)
        yield from packer.flush()

    def pieces(self) -> Iterator[tuple[Pieces, np.ndarray]]:
        """All pieces in the order that the seed selects, some at a time, and which of them are fillers (bool [n]).

        A file is verified before anything of it is told, and a file without documents at the end: what is damaged comes
        into no row, and ends the command before the folder is complete.
        """
        sets, here = self.choice.sets, self.choice.number_of(self.part)
        for documents in _document_order(len(self.pool), self.config.seed):
            lengths, fillers = self.pool.load_index(documents, verify=True)
            if sets is not None:
                documents = documents[sets[documents] == here]
            pieces = np.stack([documents, np.zeros_like(documents), lengths[documents]], axis=1)
            are_fillers = fillers[documents]
            is_usual = (pieces[:, 2] > 0) & (pieces[:, 2] <= self.config.sequence_length)
            is_usual &= ~self.choice.is_left_out[documents]
            first = 0
            for place in np.flatnonzero(~is_usual).tolist():
                yield pieces[first:place], are_fillers[first:place]
                unusual = self.pieces_of(Piece(*pieces[place].tolist()), bool(are_fillers[place]))
                yield unusual, np.full(len(unusual), are_fillers[place])
                first = place + 1
            yield pieces[first:], are_fillers[first:]
        self.pool.load_index(verify=True)

    def pieces_of(self, whole: Piece, is_filler: bool) -> Pieces:
        """Those of a document that is longer than a row or that is refused, which has none."""
        found: list[Piece] | str
        if whole.length == 0:
            self.refuse(whole, "empty_document")
            found = []
        elif self.choice.is_left_out[whole.document]:
            self.refuse(whole, *self.choice.left_out[whole.document])
            found = []
        elif isinstance(found := self.pool.cut_to_rows(whole.document, self.config.sequence_length), str):
            self.refuse(whole, found)
            found = []
        elif is_filler:
            found = [whole]
        return np.array(found, np.int64).reshape(-1, 3)

    def refuse(self, whole: Piece, reason: str, like: int | None = None) -> None:
        """`like`: id of the document that stands for this one."""
        file, index = self.pool.locate(whole.document)
        segments = self.pool.segments(whole.document)
        entry = {
            "reason": reason,
            "source": self.pool.sources[self.pool.source_of_file[file]],
            "file": self.pool.files[file].prefix.name,
            "index": index,
            "num_tokens": whole.length,
            "document": int(segments["document"][0]) if len(segments) else None,
        }
        self.quarantine.append(entry if like is None else entry | {"like": like})

    def write_shard(self, number: int, rows: Iterator[Row]) -> dict[str, Any]:
        """Write and publish one shard of all `rows`, unless it is there already; returns its manifest."""
        prefix = self.target / f"{number:06d}"
        if suffixed(prefix, ".json").exists():
            deque(rows, maxlen=0)  # the plan goes on behind them
            return read_manifest(prefix, "packed")
        vocabulary = self.pool.shared["vocabulary"]
        by_class: Counter[str] = Counter()
        by_task = np.zeros((len(self.pool.sources), MAX_TASKS), np.int64)
        with TokenFileWriter(prefix, with_crc=True) as writer:
            for row in rows:
                tokens, segments = self.assemble(row, vocabulary)
                writer.add(tokens, segments)
                by_class.update(count_classes(tokens, segments, vocabulary["visual_start"]))
                real = segments[segments["kind"] != Kind.PAD]
                np.add.at(by_task, (real["source"], tasks_of(real)), real["length"])
            manifest = {
                "kind": "packed",
                "num_rows": len(writer),
                "sequence_length": self.config.sequence_length,
                "sources": self.pool.sources,
                "counts_by_class": dict(by_class),
                **self.pool.shared,
                "tokens_by_source": dict(zip(self.pool.sources, by_task.sum(axis=1).tolist(), strict=True)),
                "tokens_by_task": label_counts(self.pool.sources, by_task),
                "config_fingerprint": self.fingerprint,
                "inputs": self.inputs,
                "quarantined": {},
            }
            _log.info("packed shard %s: %d rows", prefix.name, len(writer))
            return writer.finish(manifest)

    def assemble(self, row: Row, vocabulary: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32 [S]) and segments of a row; what is left of it is one segment of padding."""
        length = self.config.sequence_length
        tokens = np.full(length, vocabulary["structure"]["pad"], TOKEN_DTYPE)
        parts: list[np.ndarray] = []
        end = 0
        for piece in map(Piece._make, row.tolist()):
            tokens[end : end + piece.length], segments = self.pool.read(piece)
            segments["start"] += end
            parts.append(segments)
            end += piece.length
        if end < length:
            padding = np.zeros(1, SEGMENT_DTYPE)
            padding["start"], padding["length"], padding["kind"] = end, length - end, Kind.PAD
            parts.append(padding)
        self.check_ids(tokens, vocabulary["size"], row)
        # One record type throughout: numpy would compare the types of each pair of parts.
        return tokens, np.frombuffer(b"".join([part.tobytes() for part in parts]), SEGMENT_DTYPE)

    def check_ids(self, tokens: np.ndarray, vocabulary_size: int, row: Row) -> None:
        if tokens.min() < 0 or tokens.max() >= vocabulary_size:
            files = sorted(
                {str(self.pool.files[self.pool.locate(document)[0]].prefix) for document in row[:, 0].tolist()}
            )
            raise UserError(
                "token files hold ids outside the vocabulary of their manifest",
                where=", ".join(files),
                expected=f"ids in [0, {vocabulary_size})",
                got=f"[{tokens.min()}, {tokens.max()}]",
                fix="tokenize them again with the tokenizers of that vocabulary",
            )

    def publish_dataset(self, manifests: list[dict[str, Any]]) -> None:
        """The list of refused documents, then `dataset.json`: with it the packed folder is complete."""
        if not manifests:
            kept = self.part != TRAINING
            raise UserError(
                f"no document is held out for {self.part!r}" if kept else "no document can be packed",
                where=str(self.target),
                got=f"{len(self.quarantine)} documents refused: {dict(_reasons(self.quarantine))}",
                fix=f"raise {HELD_OUT_FOLDER}.{self.part}.share, or list documents of these token files"
                if kept
                else "",
            )
        lines = [json.dumps(entry, sort_keys=True) for entry in self.quarantine]
        atomic_write_bytes(self.target / QUARANTINE_NAME, "".join(f"{line}\n" for line in lines).encode())
        record = self.choice.duplicates.record
        if record is not None and self.part == TRAINING:
            atomic_write_bytes(self.target / FILTERS_NAME, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        atomic_write_json(self.target / DATASET_NAME, seal(self.describe_dataset(manifests)))

    def describe_dataset(self, manifests: list[dict[str, Any]]) -> dict[str, Any]:
        by_class = _sum_counts(manifest["counts_by_class"] for manifest in manifests)
        num_tokens = sum(manifest["num_tokens"] for manifest in manifests)
        num_real_tokens = num_tokens - by_class["padding"]
        shards = [
            {"name": f"{number:06d}", "num_rows": manifest["num_rows"], "checksum": fingerprint_of(manifest["outputs"])}
            for number, manifest in enumerate(manifests)
        ]
        return {
            "format_version": FORMAT_VERSION,
            "kind": "packed_dataset",
            "shards": shards,
            "fingerprint": fingerprint_of(shards),
            "config_fingerprint": self.fingerprint,
            "config": asdict(self.config),
            "inputs": self.inputs,
            "sequence_length": self.config.sequence_length,
            "num_rows": sum(shard["num_rows"] for shard in shards),
            "num_tokens": num_tokens,
            "num_real_tokens": num_real_tokens,
            "fill": num_real_tokens / num_tokens,
            "sources": _sum_counts(manifest["tokens_by_source"] for manifest in manifests),
            "tasks": _sum_counts(manifest.get("tokens_by_task", {}) for manifest in manifests),
            "counts_by_class": by_class,
            "quarantined": dict(_reasons(self.quarantine)),
            **self.pool.shared,
            **self.describe_held_out(),
            **self.describe_duplicates(),
        }

    def describe_duplicates(self) -> dict[str, Any]:
        """By which rule documents that are alike were left out, and how many could be compared; nothing without a rule."""
        rule = self.choice.rule
        if rule is None:
            return {}
        counts = {"num_compared": self.choice.duplicates.num_compared, "num_documents": len(self.pool)}
        return {NEAR_DUPLICATES: rule.describe() | counts}

    def describe_held_out(self) -> dict[str, Any]:
        """What the manifest says of held-out sets; nothing where there are none."""
        rules = {name: one.describe() for name, one in self.choice.held_out.items()}
        if self.part != TRAINING:
            return {"held_out_as": {"name": self.part} | rules[self.part]}
        sets = self.choice.sets
        if sets is None:
            return {}
        counts = {name: int((sets == self.choice.number_of(name)).sum()) for name in rules}
        return {"held_out": {name: rule | {"num_documents": counts[name]} for name, rule in rules.items()}}


def label_counts(sources: list[str], by_task: np.ndarray) -> dict[str, int]:
    """Tokens of every task that a source has, by its label: `{"chats as x2i": 1024}`. by_task: [sources, MAX_TASKS]."""
    found = zip(*np.nonzero(by_task), strict=True)
    return {label(sources[source], int(task)): int(by_task[source, task]) for source, task in found if task}


def _document_order(num_documents: int, seed: int) -> Iterator[np.ndarray]:
    """All documents, each once, in the order that the seed selects; int64 [n], some at a time."""
    key = derive_key("pack", seed)
    first, size = 0, _LEAST_ORDER_BLOCK
    while first < num_documents:
        block = np.arange(first, min(first + size, num_documents))
        yield permute(block, num_documents, key)
        first, size = first + size, min(2 * size, _ORDER_BLOCK)


def _reasons(quarantine: list[dict[str, Any]]) -> Counter[str]:
    return Counter(entry["reason"] for entry in quarantine)


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)
