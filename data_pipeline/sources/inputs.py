"""Input shards, on this machine or behind a URL: which ones, and how a manifest knows them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from data_pipeline.sources.patterns import expanded, find_shards
from data_pipeline.sources.remote import RemoteConfig, RemoteShard, find_remote, is_remote
from data_pipeline.storage.format import checksum_file

Shard: TypeAlias = Path | RemoteShard


def find_inputs(patterns: Sequence[str], key: str, config: RemoteConfig, notes: Path) -> list[Shard]:
    """The shards that paths and URLs mean (`find_shards`, `find_remote`), each once: local ones by path, then the others."""
    urls = [name for pattern in patterns if is_remote(pattern) for name in expanded(pattern, key)]
    local = [pattern for pattern in patterns if not is_remote(pattern)]
    return [*find_shards(local, key), *(find_remote(urls, key, config, notes) if urls else [])]


def num_bytes_of(shard: Shard) -> int:
    return shard.num_bytes if isinstance(shard, RemoteShard) else os.stat(shard).st_size


def describe_input(shard: Shard, copy: Path) -> dict[str, Any]:
    """What a manifest says of a shard; `copy`: its bytes on this machine."""
    content = {"name": shard.name, "checksum": checksum_file(copy), "bytes": num_bytes_of(shard)}
    if isinstance(shard, RemoteShard):
        return content | {"url": str(shard), "version": shard.version}
    return content | {"modified_ns": shard.stat().st_mtime_ns}


def is_unchanged(shard: Shard, recorded: dict[str, Any]) -> bool:
    """Does the shard still hold what a manifest recorded?

    On this machine the same size and time of change stand for the same content; else the checksum decides. Behind a URL
    the size and what the server calls the version, if it does.
    """
    if recorded.get("name") != shard.name or recorded.get("bytes") != num_bytes_of(shard):
        return False
    if isinstance(shard, RemoteShard):
        return not shard.version or recorded.get("version") in (shard.version, "")
    if recorded.get("modified_ns") == shard.stat().st_mtime_ns:
        return True
    return recorded.get("checksum") == checksum_file(shard)
