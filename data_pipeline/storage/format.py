"""The pieces of the on-disk token format: Megatron's index, segment files, checksums, manifests.

A file is five pieces that share a prefix:

- `.bin`      the tokens of all documents (or rows), little-endian int32, end to end;
- `.idx`      Megatron's index of them (`megatron.core.datasets.indexed_dataset`, version 1), each one a document;
- `.seg.npy`  the segments (`SEGMENT_DTYPE`), sorted by document (or row) and start;
- `.crc.npy`  one CRC32 (uint32) a document (or row), of its tokens' bytes followed by its segments' bytes; token files
              of older versions have none;
- `.json`     the manifest, published last: a file without one does not exist for any reader. It names the checksums of
              the others and has one of itself.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
import os
import re
import tokenize
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

try:  # pip install 'nextstate[fast]': the same checksum, four times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

from model.durable import fingerprint_of, read_json
from model.errors import UserError

FORMAT_VERSION = 1
TOKEN_DTYPE = np.dtype("<i4")
TOKEN_BYTES = TOKEN_DTYPE.itemsize

# Megatron's index: magic, version 1, dtype code 4 (int32), number of sequences, number of document marks.
_INDEX_HEADER_DTYPE = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype_code", "u1"), ("sequences", "<u8"), ("marks", "<u8")]
)
_INDEX_MAGIC = b"MMIDIDX"  # followed by two zero bytes, which numpy's "S9" supplies
_INT32_CODE = 4
TOKENIZER_PATHS = "tokenizer_paths"  # of a manifest: where the tokenizers lay, by text_tokenizer and vision_tokenizer
CHECKSUM_KEY = "checksum"  # of a manifest: of everything else in it
# Keys of manifests that were written before manifests had a checksum. A manifest without one may have no others.
_KEYS_WITHOUT_CHECKSUM = frozenset(
    [
        "config",
        "config_fingerprint",
        "counts_by_class",
        "fill",
        "fingerprint",
        "format_version",
        "inputs",
        "kind",
        "num_documents",
        "num_real_tokens",
        "num_rows",
        "num_tokens",
        "outputs",
        "quarantined",
        "sequence_length",
        "shards",
        "sources",
        "text_tokenizer",
        "tokens_by_source",
        "vision_tokenizer",
        "vocabulary",
    ]
)
_log = logging.getLogger(__name__)
REWRITE = "delete the .json of that file and run the command that wrote it again"


def suffixed(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def checksum(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def checksum_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself."""
    content = {key: value for key, value in manifest.items() if key != CHECKSUM_KEY}
    return content | {CHECKSUM_KEY: fingerprint_of(content)}


def check_seal(path: Path, manifest: Any) -> None:
    """Raises `UserError` when the manifest is not what was written.

    One without a checksum is taken as it is, and told, if it looks as manifests did before they had one: no key that
    came with the checksum or later, so that a damaged key does not make an old manifest of a new one.
    """
    if isinstance(manifest, dict) and CHECKSUM_KEY in manifest:
        intact = manifest[CHECKSUM_KEY] == seal(manifest)[CHECKSUM_KEY]
    else:
        intact = isinstance(manifest, dict) and manifest.keys() <= _KEYS_WITHOUT_CHECKSUM
        if intact:
            _tell_old_manifests(path.parent)
    if not intact:
        raise UserError("a manifest is damaged: its checksum is not of what it says", where=str(path), fix=REWRITE)


@functools.cache
def _tell_old_manifests(folder: Path) -> None:
    _log.warning("%s: manifests without a checksum, written by an older version; damage in them is not noticed", folder)


def encode_index(lengths: np.ndarray) -> bytes:
    """The bytes of Megatron's `.idx` for sequences of these lengths (int32 [n]), each a document of its own."""
    num_sequences = len(lengths)
    header = np.array((_INDEX_MAGIC, 1, _INT32_CODE, num_sequences, num_sequences + 1), _INDEX_HEADER_DTYPE)
    ends = np.cumsum(lengths, dtype=np.int64) * TOKEN_BYTES
    offsets = np.concatenate([np.zeros(1, np.int64), ends])[:num_sequences]
    marks = np.arange(num_sequences + 1, dtype="<i8")
    pieces = (header, lengths.astype("<i4"), offsets.astype("<i8"), marks)
    return b"".join(piece.tobytes() for piece in pieces)


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens (int32 [n]) and offsets in bytes (int64 [n]) of a Megatron `.idx` of int32 tokens.

    Raises `UserError` for anything else, a truncated file included.
    """
    return index_of(read_piece(path), path)


def read_piece(path: str | Path) -> bytes:
    """A file that a manifest names, whole. Raises `UserError` where there is none."""
    try:
        with open(path, "rb", buffering=0) as stream:  # a buffer costs more than reading a small file
            return stream.readall()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError("a file named by its manifest is missing", where=str(path), fix=REWRITE) from None


def index_of(content: bytes, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """As `read_index`, of what was read already."""
    header_bytes = _INDEX_HEADER_DTYPE.itemsize
    if len(content) < header_bytes:
        raise UserError("an index file is truncated", where=str(path), got=f"{len(content)} bytes")
    header = np.frombuffer(content, _INDEX_HEADER_DTYPE, count=1)[0]
    found = (bytes(header["magic"]), int(header["version"]), int(header["dtype_code"]))
    if found != (_INDEX_MAGIC, 1, _INT32_CODE):
        raise UserError(
            "not a Megatron index of int32 tokens",
            where=str(path),
            expected=str((_INDEX_MAGIC, 1, _INT32_CODE)),
            got=str(found),
        )
    num_sequences = int(header["sequences"])
    if len(content) < header_bytes + num_sequences * 12 + int(header["marks"]) * 8:
        raise UserError("an index file is truncated", where=str(path), got=f"{len(content)} bytes")
    lengths = np.frombuffer(content, "<i4", num_sequences, header_bytes)
    offsets = np.frombuffer(content, "<i8", num_sequences, header_bytes + 4 * num_sequences)
    return lengths, offsets


def encode_array(array: np.ndarray) -> bytes:
    """The bytes of a `.npy` file."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def encode_header(dtype: np.dtype, count: int) -> bytes:
    """The bytes of a `.npy` file of so many records before the first of them."""
    stream = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


# What numpy raises on damaged .npy files, whose header is a Python literal.
NPY_ERRORS = (ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, tokenize.TokenError)
# The header of one row of records, as numpy writes it: what it says of the type, and how many there are.
_USUAL_NPY = re.compile(
    rb"\x93NUMPY\x01\x00.{2}\{'descr': ([^\n]+), 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n"
)
_MOST_NPY_HEADER = 1024  # bytes of a usual one


@functools.lru_cache(maxsize=64)
def _type_of(description: bytes) -> np.dtype:
    """From a header's Python literal, for which numpy takes ten times as long as for reading a small file."""
    return np.lib.format.descr_to_dtype(ast.literal_eval(description.decode("latin1")))


def load_array(path: Path) -> np.ndarray:
    """Raises `UserError` for a file that is missing or is no array of plain records."""
    try:
        with path.open("rb") as stream:
            usual = _usual_npy(stream.read(_MOST_NPY_HEADER))
            if usual is None:
                stream.seek(0)
                return np.load(stream, allow_pickle=False)
            stream.seek(len(usual[0]))
            array = np.fromfile(stream, _type_of(usual[1]), int(usual[2]))
            if len(array) < int(usual[2]):
                raise EOFError(f"{len(array)} of {int(usual[2])} records")
            return array
    except FileNotFoundError:
        raise UserError("a file named by its manifest is missing", where=str(path), fix=REWRITE) from None
    except NPY_ERRORS as error:
        raise UserError("not a readable .npy file", where=str(path), got=str(error), fix=REWRITE) from None


def array_of(content: bytes, path: str | Path) -> np.ndarray:
    """As `load_array`, of what was read already; not to be written to."""
    try:
        usual = _usual_npy(content[:_MOST_NPY_HEADER])
        if usual is None:
            return np.load(BytesIO(content), allow_pickle=False)
        return np.frombuffer(content, _type_of(usual[1]), int(usual[2]), len(usual[0]))
    except NPY_ERRORS as error:
        raise UserError("not a readable .npy file", where=str(path), got=str(error), fix=REWRITE) from None


def _usual_npy(start: bytes) -> re.Match[bytes] | None:
    usual = _USUAL_NPY.match(start)
    return usual if usual is not None and int.from_bytes(usual[0][8:10], "little") == len(usual[0]) - 10 else None


def row_crc(tokens: np.ndarray, segments: np.ndarray) -> int:
    """CRC32 of a row: its tokens' bytes (int32) followed by its segments' bytes."""
    return crc32(np.ascontiguousarray(segments), crc32(np.ascontiguousarray(tokens)))


def row_crcs(
    tokens: np.ndarray, segments: np.ndarray, lengths: Sequence[int], segment_counts: Sequence[int]
) -> list[int]:
    """`row_crc` of each of several rows laid end to end: so many of the tokens (int32 [n]) and of the segments in each."""
    token_bytes, segment_bytes = (np.ascontiguousarray(part).view(np.uint8).data for part in (tokens, segments))
    crcs, token, segment = [], 0, 0
    for length, count in zip(lengths, segment_counts, strict=True):
        token_end, segment_end = token + length * TOKEN_BYTES, segment + count * segments.itemsize
        crcs.append(crc32(segment_bytes[segment:segment_end], crc32(token_bytes[token:token_end])))
        token, segment = token_end, segment_end
    return crcs


def check_row(prefix: Path, row: int, tokens: np.ndarray, segments: np.ndarray, expected: int) -> None:
    """Raises `UserError` naming file and row (or document) when it is not what was written."""
    check_crc(prefix, row, row_crc(tokens, segments), expected)


def check_crc(prefix: Path, row: int, found: int, expected: int) -> None:
    """As `check_row`, of the CRC."""
    if found != expected:
        raise UserError(
            "a packed row or a document is damaged",
            where=f"{suffixed(prefix, '.bin')}, row {row}",
            expected=f"CRC32 {expected:08x}",
            got=f"{found:08x}",
            fix="delete the .json of that file and run the command that wrote it (`nextstate pack` or `tokenize`) again",
        )


def read_manifest(prefix: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a published file. Raises `UserError` when there is none or it is of another kind."""
    path = Path(f"{prefix}.json")
    manifest = read_json(path)
    check_seal(path, manifest)
    found = manifest.get("kind")
    if kind is not None and found != kind:
        raise UserError("not the kind of file that was asked for", where=str(path), expected=kind, got=str(found))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            "the file was written by another version of the format",
            where=str(path),
            expected=str(FORMAT_VERSION),
            got=str(manifest.get("format_version")),
            fix="write it again with this version",
        )
    return manifest


def published_names(folder: str | Path) -> list[str]:
    """Names `NNNNNN` of the published files of a folder, in order."""
    if not os.path.isdir(folder):
        raise UserError("no such folder", where=str(folder))
    names = (name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json"))
    return sorted(name for name in names if name.isdigit())


def published_prefixes(folder: str | Path) -> list[Path]:
    """Their prefixes."""
    return [Path(folder) / name for name in published_names(folder)]


def verify_outputs(prefix: str | Path, manifest: dict[str, Any]) -> None:
    """Read every piece and compare its checksum with the manifest; raises `UserError` naming the damaged one."""
    for name in manifest["outputs"]:
        verify_output(Path(prefix).with_name(name), manifest)


def verify_output(path: Path, manifest: dict[str, Any]) -> None:
    """Compare one piece with its manifest."""
    if not path.is_file():
        raise UserError("a file named by its manifest is missing", where=str(path), fix=REWRITE)
    check_piece(path, checksum_file(path), manifest)


def check_piece(path: str | Path, found: str, manifest: dict[str, Any]) -> None:
    """`found`: its checksum."""
    expected = manifest["outputs"].get(os.path.basename(path))
    if found != expected:
        raise UserError(
            "a file is damaged: its checksum is not the manifest's",
            where=str(path),
            expected=str(expected),
            got=found,
            fix=REWRITE,
        )
