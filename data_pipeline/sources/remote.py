"""Shards behind a URL (s3, gs, http and what else fsspec knows): which ones there are, and their bytes, read patiently.

A read that fails is tried again from where it stopped, so that what is lost to a bad connection is one block. What a
server says for good (no such file, no permission) is told at once.
"""

from __future__ import annotations

import json
import logging
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from model.errors import Problems, UserError

BLOCK_BYTES = 8 << 20  # asked for at once
MAX_WAIT_SECONDS = 60.0  # between two attempts
LISTING_THREADS = 16  # questions at once for sizes of shards
# What a server or a library says that asking again does not change.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, TypeError)
# The same of botocore and google-auth, which need not be installed.
_LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
_TEMPORARY_STATUS = (408, 425, 429)  # of HTTP, below 500
_SAME_VERSIONS = (
    "http://",
    "https://",
    "s3://",
    "gs://",
    "gcs://",
)  # lists and answers about one file say the same version
_STATUS_OF_OTHER_CONTENT = (412, 416)  # it is not the version that was asked for; it ends before the range
_EXTRA = "pip install 'nextstate[remote]'"
_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass
class RemoteConfig:
    """How shards behind a URL are read."""

    cache: str | None = None  # a folder where copies stay for later runs; null: they go when they are tokenized
    cache_gigabytes: float = 100.0  # copies that were read longest ago make room
    attempts: int = 8  # reads in a row that may fail
    wait_seconds: float = 0.5  # before the second attempt; twice as long before each later one, at most a minute
    options: dict[str, Any] = field(default_factory=dict)  # of the file system, as fsspec has them: {anon: true}

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(self.attempts > 0, f"{key}.attempts", "must be positive", f"{key}.attempts=8")
        for name in ("cache_gigabytes", "wait_seconds"):
            problems.check(getattr(self, name) >= 0, f"{key}.{name}", "must not be negative", f"{key}.{name}=1")


@dataclass(frozen=True, order=True)
class RemoteShard:
    """A shard as its server describes it."""

    url: str
    num_bytes: int
    version: str = ""  # what the server calls this content: an ETag, a generation, the time of its last change

    @property
    def name(self) -> str:
        return posixpath.basename(urlsplit(str(self)).path)

    def __str__(self) -> str:
        """The URL without what is secret or changes: user and password, a signature behind `?`."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_remote(name: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def find_remote(names: Sequence[str], key: str, config: RemoteConfig, notes: Path) -> list[RemoteShard]:
    """The shards that URLs and patterns of URLs (`*`, `**`, `[0-9]`) mean, in order, each once.

    What is asked of single shards is noted in `notes`, a line each, as it is answered: a list that was cut short goes on
    there. Raises `UserError` for a URL without a shard: one that did not arrive is not left out without a word.
    """
    known = _read_notes(notes)
    shards: dict[str, RemoteShard] = {}
    unknown: list[str] = []
    for name in names:
        if _is_pattern(name):
            found = _glob(name, config)
            if not found:
                raise _no_shard(key, name)
        else:
            found = {name: {}}
        for url, info in found.items():
            if info.get("size") is not None:
                shards[url] = _described(url, info)
            elif url in known:
                shards[url] = known[url]
            else:
                unknown.append(url)
    if unknown:
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.open("a", encoding="utf-8") as stream, ThreadPoolExecutor(LISTING_THREADS) as threads:
            for shard in threads.map(lambda url: _ask(url, key, config), dict.fromkeys(unknown)):
                shards[shard.url] = shard
                stream.write(json.dumps(asdict(shard)) + "\n")
                stream.flush()
    return sorted(shards.values())


def read_blocks(shard: RemoteShard, config: RemoteConfig) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the whole shard. An offset of 0 may come again: its server cannot go on in the middle.

    Raises `UserError` where the server cannot be read, or has other content than it had when it was asked for the size;
    `FileNotFoundError` where it has none any more.
    """
    patience = _Patience(str(shard), config)
    system, path = _open_system(shard.url, config)
    position, furthest, in_one_go = 0, 0, False
    while position < shard.num_bytes:
        try:
            # Exactly the blocks that are asked for. HTTP needs no question for the size then.
            size = {"size": shard.num_bytes} if shard.url.startswith("http") else {}
            block_bytes = 0 if in_one_go else BLOCK_BYTES
            with system.open(path, "rb", block_size=block_bytes, cache_type="none", **size) as stream:
                if in_one_go:
                    position = 0
                elif position:
                    stream.seek(position)
                while position < shard.num_bytes:
                    block = stream.read(min(BLOCK_BYTES, shard.num_bytes - position))
                    if not block:
                        _check_unchanged(shard, system, path, patience)
                        raise OSError(f"it ends after {position} of {shard.num_bytes} bytes")
                    yield position, block
                    position += len(block)
                    if position > furthest:  # reading the same again is no progress
                        furthest = position
                        patience.reset()
        except Exception as error:
            if isinstance(error, ValueError) and "range" in str(error) and not in_one_go:
                in_one_go = True  # the server gives whole files only
            elif _status(error) in _STATUS_OF_OTHER_CONTENT:
                raise _changed(shard, str(error)) from error
            else:
                patience.wait_after(error)
    _check_unchanged(shard, system, path, patience)


def _check_unchanged(shard: RemoteShard, system: Any, path: str, patience: _Patience) -> None:
    """Blocks of two versions are no shard, nor are the first bytes of a longer one. What the listing said is not asked."""
    system.invalidate_cache(path)
    now = _described(shard.url, patience.call(lambda: system.info(path)))
    versions = {shard.version, now.version} - {""} if shard.url.startswith(_SAME_VERSIONS) else set()
    if now.num_bytes != shard.num_bytes or len(versions) > 1:
        raise _changed(shard, f"{now.num_bytes} bytes, version {now.version or 'unknown'}")


def _changed(shard: RemoteShard, got: str) -> UserError:
    return UserError(
        "a shard has changed on its server since it was listed",
        where=str(shard),
        expected=f"{shard.num_bytes} bytes, version {shard.version or 'unknown'}",
        got=got,
        fix="nextstate tokenize repair, with the same arguments, asks anew",
    )


def _open_system(url: str, config: RemoteConfig) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL as that one wants it."""
    from fsspec.core import url_to_fs

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each error that it also raises

    def open_it() -> tuple[Any, str]:
        try:
            system, path = url_to_fs(url, **config.options)
        except (ImportError, ValueError) as error:  # a library that is missing; a protocol that nobody knows
            is_missing = isinstance(error, ImportError)
            raise UserError(
                "shards of this kind cannot be read",
                where=url,
                got=str(error),
                fix=_EXTRA if is_missing else "s3://, gs://, http:// or https://, or copy them first",
            ) from error
        return system, path

    return _Patience(url, config).call(open_it)  # credentials may be asked for


def _is_pattern(url: str) -> bool:
    return "*" in url or "[" in urlsplit(url).path  # a "?" begins a query


def _glob(pattern: str, config: RemoteConfig) -> dict[str, dict[str, Any]]:
    """URL -> what the listing says of it."""
    system, path = _open_system(pattern, config)
    # HTTP's listing passes over folders that it cannot read, unless it is told not to.
    options = {"on_error": "raise"} if pattern.startswith("http") else {}
    try:
        found = _Patience(pattern, config).call(lambda: system.glob(path, detail=True, **options))
    except FileNotFoundError:  # gcsfs, of a bucket
        return {}
    return {system.unstrip_protocol(name): info for name, info in found.items() if info.get("type") == "file"}


def _ask(url: str, key: str, config: RemoteConfig) -> RemoteShard:
    system, path = _open_system(url, config)
    try:
        info = _Patience(url, config).call(lambda: system.info(path))
    except FileNotFoundError:
        raise _no_shard(key, url) from None
    if info.get("size") is None or info.get("type") == "directory":
        raise UserError(
            "an input shard is no file of a known size", where=url, expected="a webdataset .tar file", got=str(info)
        )
    return _described(url, info)


def _described(url: str, info: dict[str, Any]) -> RemoteShard:
    names = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "mtime", "created")
    version = next((str(info[name]) for name in names if info.get(name)), "")
    return RemoteShard(url, int(info["size"]), version)


def _no_shard(key: str, name: str) -> UserError:
    return UserError(
        "no input shards",
        where=f"{key}={name}",
        expected="webdataset .tar files",
        got=f"the server has no file of the name or pattern {name}",
        fix="check the URL",
    )


def _read_notes(path: Path) -> dict[str, RemoteShard]:
    found = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            shard = RemoteShard(**json.loads(line))
        except (ValueError, TypeError):  # a line that was cut short is asked for again
            continue
        found[shard.url] = shard
    return found


class _Patience:
    """Waits longer and longer between attempts, and gives up after `attempts` in a row."""

    def __init__(self, what: str, config: RemoteConfig):
        self.what, self.config = what, config
        self.num_failures = 0

    def reset(self) -> None:
        self.num_failures = 0

    def call(self, question: Callable[[], Answer]) -> Answer:
        while True:
            try:
                return question()
            except Exception as error:
                self.wait_after(error)

    def wait_after(self, error: Exception) -> None:
        """Raises `UserError` when there is no use in waiting; `FileNotFoundError` as it is."""
        lasting = is_lasting(error)
        if isinstance(error, UserError) or (isinstance(error, FileNotFoundError) and lasting):
            raise error
        self.num_failures += 1
        if lasting or self.num_failures >= self.config.attempts:
            raise UserError(
                "a shard cannot be read from its server",
                where=self.what,
                got=f"{type(error).__name__}: {error}" + ("" if lasting else f" ({self.num_failures} times in a row)"),
                fix="check the URL, the credentials and remote.options"
                if lasting
                else "run the same command again when the server answers; remote.attempts=20 is more patient",
            ) from error
        longest = min(MAX_WAIT_SECONDS, self.config.wait_seconds * 2 ** (self.num_failures - 1))
        seconds = longest * random.uniform(0.5, 1.0)  # many readers do not come back at once
        _log.warning("%s: %s: %s; again in %.1f s", self.what, type(error).__name__, error, seconds)
        time.sleep(seconds)


def is_lasting(error: BaseException) -> bool:
    """Would asking again be answered the same?

    fsspec's HTTP calls every failed question for a file "not found"; the reason is the error's cause.
    """
    cause = error.__cause__ or error
    if isinstance(error, TimeoutError) or isinstance(cause, TimeoutError):
        return False
    if type(error).__name__ in _LASTING_NAMES:
        return True
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TEMPORARY_STATUS
    return isinstance(error, _LASTING) and not type(cause).__module__.startswith("aiohttp")


def _status(error: BaseException) -> int | None:
    """HTTP's, where aiohttp, gcsfs or botocore keep it; theirs is the reason for the error that a file system raises."""
    forbidden = str(error).startswith("Forbidden: ")  # gcsfs keeps no more of it
    one: BaseException | None = error
    while one is not None:
        response = getattr(one, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        code = getattr(one, "code", None) if type(one).__module__.startswith("gcsfs") else None
        for status in (told, getattr(one, "status", None), code):
            if isinstance(status, int) and status >= 400:
                return status
        one = one.__cause__ or one.__context__
    return 403 if forbidden else None
