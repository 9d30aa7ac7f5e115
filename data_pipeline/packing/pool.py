"""The documents of all sources behind one index, and where each of them may be cut."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.packing.window import Piece
from data_pipeline.storage.descriptors import DescriptorCache
from data_pipeline.storage.format import TOKENIZER_PATHS
from data_pipeline.storage.manifests import Manifests
from data_pipeline.storage.segments import Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader
from model.errors import UserError
from model.vocabulary import description_of_ids

# What token files that are packed together must agree on.
_SHARED_KEYS = ("vocabulary", "text_tokenizer", "vision_tokenizer")
_SPLITTABLE, _IMAGE = np.uint8(Flag.SPLITTABLE), np.uint8(Kind.IMAGE)  # of an enumeration numpy asks much


class Pool:
    """Documents 0..N-1: source after source (by name), file after file, in the order of the files.

    Memory: about 30 bytes a document (lengths, flags and the files' indexes); a file is opened when one of its documents is
    asked for. Raises `UserError` for a missing or empty folder, and when the files disagree on the vocabulary or a
    tokenizer.
    """

    def __init__(self, folders: Mapping[str, Sequence[str | Path]]):
        self.sources = sorted(folders)
        self.files: list[TokenFileReader] = []
        self.source_of_file: list[int] = []
        self._descriptors = DescriptorCache()
        for number, source in enumerate(self.sources):
            for folder in map(Path, folders[source]):
                for name, manifest in Manifests(folder, "tokens").each():
                    self.files.append(TokenFileReader(folder / name, self._descriptors, manifest))
                    _share(manifest, self.files[0].manifest)
                    self.source_of_file.append(number)
            if self.source_of_file[-1:] != [number]:
                raise UserError(
                    f"source {source!r} has no finished token files",
                    where=", ".join(map(str, folders[source])),
                    fix="run `nextstate tokenize` for it first",
                )
        self.shared = _agree(self.files)
        self._first_document = [0, *accumulate(len(file) for file in self.files)]
        # Filled file by file: of each whether it is in them, and whether it was verified.
        self._lengths, self._fillers = np.zeros(len(self), np.int32), np.zeros(len(self), bool)
        self._is_loaded, self._is_verified = np.zeros((2, len(self.files)), bool)

    def __len__(self) -> int:
        return self._first_document[-1]

    def source_fingerprints(self) -> list[dict[str, str]]:
        """One {"name", "checksum"} a source: what its files hold, wherever they stand."""
        digests = [hashlib.blake2b(digest_size=16) for _ in self.sources]
        for file, source in zip(self.files, self.source_of_file, strict=True):
            digests[source].update(repr(sorted(file.manifest["outputs"].items())).encode())
        return [
            {"name": name, "checksum": digest.hexdigest()} for name, digest in zip(self.sources, digests, strict=True)
        ]

    def load_index(self, documents: np.ndarray | None = None, *, verify: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Length of every document (int32 [N]) and whether it is plain text that fills holes (bool [N]).

        documents: numbers of those that are asked about, int64 [k]; what is said of others means nothing, and their files
        are not opened. `verify`: the files are compared with their manifests, in the same reading.
        """
        done = self._is_verified if verify else self._is_loaded
        if documents is None:
            wanted = ~done
        else:
            wanted = np.zeros(len(self.files), bool)
            wanted[np.searchsorted(self._first_document, documents, side="right") - 1] = True
            wanted &= ~done
        for number in np.flatnonzero(wanted).tolist():
            file, first = self.files[number], self._first_document[number]
            self._fillers[first : first + len(file)] = _fillers(file, verify)
            self._lengths[first : first + len(file)] = file.lengths
            self._is_loaded[number] = True
            self._is_verified[number] |= verify
        return self._lengths, self._fillers

    def document_ids(self) -> np.ndarray:
        """Of every document; uint64 [N], 0 for one without tokens."""
        ids = np.zeros(len(self), np.uint64)
        for file, first in zip(self.files, self._first_document, strict=False):
            segments = file.all_segments()
            ids[first + segments["row"].astype(np.int64)] = segments["document"]
        return ids

    def locate(self, document: int) -> tuple[int, int]:
        """File and index in it."""
        file = bisect.bisect_right(self._first_document, document) - 1
        return file, document - self._first_document[file]

    def segments(self, document: int) -> np.ndarray:
        file, index = self.locate(document)
        segments = self.files[file].segments(index).copy()
        segments["source"] = self.source_of_file[file]
        return segments

    def read(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32 [n]) and segments of a piece; `start` counts from the piece's first token.

        The first segment is marked as a start; all are marked `CUT` when the document begins in another piece.
        """
        file, index = self.locate(piece.document)
        reader = self.files[file]
        if piece.length == reader.lengths[index]:
            tokens, segments = reader.document(index)
            segments = segments[segments["length"] > 0]  # a copy
            segments["source"] = self.source_of_file[file]
            segments["flags"][0] |= np.uint8(Flag.DOCUMENT_START)
            return tokens, segments
        tokens = reader.tokens(index, piece.start, piece.length)
        segments = self.segments(piece.document)
        starts = segments["start"].astype(np.int64) - piece.start
        ends = np.minimum(starts + segments["length"], piece.length)
        starts = np.maximum(starts, 0)
        kept = ends > starts
        segments = segments[kept]
        segments["start"], segments["length"] = starts[kept], (ends - starts)[kept]
        segments["flags"][0] |= np.uint8(Flag.DOCUMENT_START)
        if piece.start > 0:
            segments["flags"] |= np.uint8(Flag.CUT)
        return tokens, segments

    def cut(self, piece: Piece, limit: int) -> int:
        """The longest head of a filler, at most `limit` tokens, that ends inside splittable text or at a segment's end."""
        segments = self.segments(piece.document)
        ends = segments["start"].astype(np.int64) + segments["length"] - piece.start
        holder = int(np.searchsorted(ends, limit))  # the segment that the cut would fall into
        if holder == len(ends) or ends[holder] == limit or segments["flags"][holder] & Flag.SPLITTABLE:
            return min(limit, piece.length)
        return max(0, int(ends[holder - 1])) if holder else 0

    def cut_to_rows(self, document: int, sequence_length: int) -> list[Piece] | str:
        """Pieces of at most `sequence_length` tokens, cut at segment boundaries; as long as they come.

        A splittable text longer than a row is cut inside. Another segment longer than a row cannot be kept: the
        reason is returned instead.
        """
        pieces: list[Piece] = []
        start = end = 0
        for segment in self.segments(document):
            length = int(segment["length"])
            if length > sequence_length and not segment["flags"] & Flag.SPLITTABLE:
                image = segment["kind"] == Kind.IMAGE
                return "image_longer_than_row" if image else "segment_longer_than_row"
            if end > start and end + length - start > sequence_length:
                pieces.append(Piece(document, start, end - start))
                start = end
            end += length
            while end - start > sequence_length:
                pieces.append(Piece(document, start, sequence_length))
                start += sequence_length
        return [*pieces, Piece(document, start, end - start)]

    def close(self) -> None:
        self._descriptors.close()


def _fillers(file: TokenFileReader, verify: bool) -> np.ndarray:
    """Documents of a file with splittable text and without images; bool [n]."""
    splittable, images = np.zeros(len(file), bool), np.zeros(len(file), bool)
    segments = file.all_segments(verify=verify)
    splittable[segments["row"][(segments["flags"] & _SPLITTABLE) != 0]] = True
    images[segments["row"][segments["kind"] == _IMAGE]] = True
    return splittable & ~images


def _share(manifest: dict[str, Any], first: dict[str, Any]) -> None:
    """Of 100,000 files each would keep a vocabulary of its own, of some kilobytes; as a rule all are equal."""
    for key in (*_SHARED_KEYS, TOKENIZER_PATHS, "sources", "counts_by_class", "quarantined"):
        if key in manifest and manifest[key] == first.get(key):
            manifest[key] = first[key]


def _agree(files: list[TokenFileReader]) -> dict[str, Any]:
    """What all files say of `_SHARED_KEYS`, and where the tokenizers lay.

    A file without images may leave the vision tokenizer out, and the number of its codes is then not compared.
    """
    shared: dict[str, Any] = {}
    # Those with pictures first: their vocabulary is the rows'.
    files = sorted(files, key=lambda file: file.manifest.get("vision_tokenizer") is None)
    for key in _SHARED_KEYS:
        said: dict[str, str] = {}
        for file in files:
            value = file.manifest.get(key)
            if value and value is not shared.get(key):
                shared.setdefault(key, value)
                said.setdefault(repr(_comparable(key, value, shared[key], file)), str(file.prefix))
        if len(said) > 1:
            listed = "; ".join(f"{where}: {value}" for value, where in said.items())
            raise UserError(
                f"the token files do not agree on the {key.replace('_', ' ')}",
                got=listed,
                fix="tokenize all sources again with the same tokenizers and vocabulary",
            )
        shared.setdefault(key, None)
    if not shared["vocabulary"]:
        raise UserError("no token file says its vocabulary", where=str(files[0].prefix))
    paths = [file.manifest.get(TOKENIZER_PATHS) or {} for file in files]
    return shared | {TOKENIZER_PATHS: {name: path for one in reversed(paths) for name, path in one.items()}}


def _comparable(key: str, value: Any, first: Any, file: TokenFileReader) -> Any:
    """`value`; of the vocabulary of a file without images `first`, where its texts have the same ids."""
    if key != "vocabulary" or file.manifest.get("vision_tokenizer") is not None:
        return value
    ids = [description_of_ids(one, has_pictures=False) for one in (value, first)]
    return first if ids[0] == ids[1] else value
