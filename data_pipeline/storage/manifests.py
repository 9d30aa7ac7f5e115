"""The manifests of a folder, all at once; and notes of them, so that a start does not open 100,000 files.

Notes lie in `FOLDER/.manifests`, in parts of some thousand manifests. They are a copy that may be deleted at any time, and say
nothing that a manifest does not: a note holds for the manifest of that name, size and time of change which the listing of
the folder shows, every other manifest is read itself. A part has a checksum and is passed over when it is damaged.

Who has read many manifests writes a part of them. Parts are published whole, under the checksum of their content, and never
changed, so that any number of processes may write, and die, at once. A folder that cannot be written goes without.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.storage.atomic import remove_stale_temporaries
from data_pipeline.storage.format import CHECKSUM_KEY, checksum, read_manifest
from data_pipeline.storage.read_ahead import Readers
from model.durable import TEMPORARY_MARK, replace_file
from model.errors import UserError

NOTES_FOLDER = ".manifests"
_PART_PREFIX = "part-"
_NOTES_VERSION = 1
_MANIFESTS_AT_ONCE = 8192  # read and noted together
_LEAST_NOTED = 256  # fewer are read as fast as their notes are written
# A file that is changed twice within the file system's clock keeps its time: what changed lately is not noted.
_SETTLED_NS = 2_000_000_000
_MOST_SMALL_PARTS = 16  # with fewer than half of a part's manifests; more are joined
_THREADS = 8  # that read where each read waits: a network file system answers many as fast as one
_READ_BY_A_THREAD = 128  # manifests
_LOOKED_AT = 32  # manifests, for what a part's manifests have in common
_ABSENT = ""  # key of a note: those of the part's common keys that its manifest has not
_log = logging.getLogger(__name__)


class _Note(NamedTuple):
    """A manifest as what its part says of most, and the JSON text of what differs."""

    common: dict[str, Any]
    own: str

    def manifest(self) -> dict[str, Any]:
        own = json.loads(self.own)
        absent = own.pop(_ABSENT, ())
        whole = self.common | own
        for key in absent:
            del whole[key]
        return whole


@dataclass
class _Part:
    path: Path
    notes: dict[str, _Note] = field(default_factory=dict)  # by stamp, of those that hold


class Manifests:
    """The manifests of the published files `NNNNNN` of a folder, as it was listed when this was made.

    kind: "tokens" or "packed", where files of the other kind are to be refused. Raises `UserError` for a missing folder.
    """

    def __init__(self, folder: str | Path, kind: str | None = None):
        self.folder, self.kind = Path(folder), kind
        if not self.folder.is_dir():
            raise UserError("no such folder", where=str(folder))
        self._stamps: dict[str, str] = {}  # of each name: with size and time of change
        self._modified_ns: dict[str, int] = {}
        self._listed_ns = time.time_ns()
        self._list()
        self._notes: dict[str, _Note] = {}  # by name
        parts = self._read_parts()
        self._join(parts)

    @property
    def names(self) -> list[str]:
        """Of the files, in order."""
        return list(self._stamps)

    def modified_seconds(self, name: str) -> float:
        """When the manifest was published."""
        return self._modified_ns[name] / 1e9

    def each(
        self, names: Sequence[str] | None = None, *, may_be_gone: bool = False
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and manifest of every file, or of those named, in order.

        The manifests share what they have in common: their values are not to be changed. Raises `UserError` as
        `read_manifest` does; with `may_be_gone` those that went away since the listing are passed over.
        """
        names = self.names if names is None else names
        for first in range(0, len(names), _MANIFESTS_AT_ONCE):
            block = names[first : first + _MANIFESTS_AT_ONCE]
            read = self._read([name for name in block if name not in self._notes], may_be_gone)
            self._note(read)
            for name in block:
                if name in read:
                    yield name, read[name]
                elif name in self._notes:
                    manifest = self._notes[name].manifest()
                    is_other = self.kind is not None and manifest["kind"] != self.kind
                    yield name, read_manifest(self.folder / name, self.kind) if is_other else manifest

    def _list(self) -> None:
        found: dict[str, tuple[int, int]] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name
                if name.endswith(".json") and name[:-5].isdigit():
                    try:
                        status = entry.stat()
                        found[name[:-5]] = status.st_size, status.st_mtime_ns
                    except FileNotFoundError:  # a link that leads nowhere, or gone: reading it will tell
                        found[name[:-5]] = 0, self._listed_ns
        for name in sorted(found):
            size, self._modified_ns[name] = found[name]
            self._stamps[name] = f"{name} {size} {self._modified_ns[name]}"

    def _read(self, names: list[str], may_be_gone: bool) -> dict[str, dict[str, Any]]:
        """From the manifests themselves: by threads, if the first ones were waited for."""
        waited = _times_waited()
        found = self._read_some(names[:_READ_BY_A_THREAD], may_be_gone)
        rest = names[_READ_BY_A_THREAD:]
        if _times_waited() - waited < _READ_BY_A_THREAD // 2:
            return found | self._read_some(rest, may_be_gone)
        threads = Readers(_THREADS, "manifests")
        bounds = pairwise([*range(0, len(rest), _READ_BY_A_THREAD), len(rest)])
        coming = [threads.submit(self._read_some, rest[first:end], may_be_gone) for first, end in bounds]
        try:
            for some in coming:
                found |= some.result()
            return found
        finally:
            for some in coming:
                some.cancel()
            threads.close()

    def _read_some(self, names: Sequence[str], may_be_gone: bool) -> dict[str, dict[str, Any]]:
        found = {}
        for name in names:
            try:
                found[name] = read_manifest(f"{self.folder}/{name}", self.kind)
            except UserError:
                if not may_be_gone or os.path.lexists(self.folder / f"{name}.json"):
                    raise
        return found

    def _note(self, manifests: Mapping[str, dict[str, Any]]) -> None:
        """Publish a part, if these are many; an older manifest without a checksum of its own is read each time."""
        settled = self._listed_ns - _SETTLED_NS
        noted = {
            self._stamps[name]: manifest
            for name, manifest in manifests.items()
            if CHECKSUM_KEY in manifest and self._modified_ns.get(name, settled + 1) <= settled
        }
        if len(noted) >= _LEAST_NOTED:
            part = self._publish(noted)
            self._notes |= {stamp.partition(" ")[0]: note for stamp, note in part.notes.items()}

    def _publish(self, manifests: Mapping[str, dict[str, Any]]) -> _Part:
        """Write a part of the manifests of these stamps."""
        common, notes = _notes_of(manifests)
        head = json.dumps({"version": _NOTES_VERSION, "common": common})
        body = "\n".join([head, *(f"{stamp}\t{note.own}" for stamp, note in notes.items())]).encode()
        digest = checksum(body)
        path = self.folder / NOTES_FOLDER / f"{_PART_PREFIX}{digest}"
        try:
            path.parent.mkdir(exist_ok=True)
            remove_stale_temporaries(path.parent, _PART_PREFIX)
            replace_file(path, f"{digest}\n".encode() + body)
        except OSError as error:
            _log.info("%s: manifests are not noted: %s", path.parent, error)
        return _Part(path, notes)

    def _read_parts(self) -> list[_Part]:
        """What is noted of the manifests that were listed; each note counts in the first part that has it."""
        place = self.folder / NOTES_FOLDER
        try:
            names = sorted(name for name in os.listdir(place) if name.startswith(_PART_PREFIX))
        except OSError:
            return []
        wanted = {stamp: name for name, stamp in self._stamps.items()}
        parts = []
        for path in (place / name for name in names if TEMPORARY_MARK not in name):
            parts.append(_Part(path))
            for stamp, note in _notes_in(path):
                name = wanted.pop(stamp, None)
                if name is not None:
                    parts[-1].notes[stamp] = self._notes[name] = note
        return parts

    def _join(self, parts: Sequence[_Part]) -> None:
        """Write many small parts as few; what nothing holds of any more goes with them."""
        small = [part for part in parts if len(part.notes) < _MANIFESTS_AT_ONCE // 2]
        if len(small) <= _MOST_SMALL_PARTS or not os.access(self.folder / NOTES_FOLDER, os.W_OK):
            return
        notes = {stamp: note for part in small for stamp, note in part.notes.items()}
        stamps = sorted(notes)
        published = set()
        for first in range(0, len(stamps), _MANIFESTS_AT_ONCE):
            some = stamps[first : first + _MANIFESTS_AT_ONCE]
            published.add(self._publish({stamp: notes[stamp].manifest() for stamp in some}).path)
        for part in small:
            if part.path not in published:
                with contextlib.suppress(OSError):
                    part.path.unlink()


def _times_waited() -> int:
    """How often this thread gave the processor away so far, as a read does that is not answered from memory."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _notes_in(path: Path) -> Iterable[tuple[str, _Note]]:
    """Stamps and notes of a part; none of one that is damaged, of another version or was joined to others meanwhile."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        if digest.decode() != checksum(body):
            return
        head, *lines = body.decode().split("\n")
        values = json.loads(head)
        if values["version"] != _NOTES_VERSION:
            return
    except (OSError, ValueError, KeyError, TypeError):
        return
    for line in lines:
        stamp, _, own = line.partition("\t")
        yield stamp, _Note(values["common"], own)


def _notes_of(manifests: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, _Note]]:
    """What most of the manifests say under each key, and a note of each, by the same names."""
    encode = json.JSONEncoder().encode
    common = _common(list(manifests.values()))
    notes = {}
    for name, manifest in manifests.items():
        own = {key: value for key, value in manifest.items() if key not in common or value != common[key]}
        absent = [key for key in common if key not in manifest]
        notes[name] = _Note(common, encode(own | {_ABSENT: absent} if absent else own))
    return common, notes


def _common(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each key the value that some manifests, spread evenly, have most often."""
    counts: dict[str, Counter[str]] = {}
    for manifest in manifests[:: -(-len(manifests) // _LOOKED_AT)]:
        for key, value in manifest.items():
            counts.setdefault(key, Counter())[json.dumps(value)] += 1
    return {key: json.loads(found.most_common(1)[0][0]) for key, found in counts.items()}
