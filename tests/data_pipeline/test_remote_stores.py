"""Shards in s3 and gs: real servers of both on loopback, some of whose answers are lost on the way."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import random
import threading
import types
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipeline.sources import remote
from data_pipeline.sources.copies import Held, ShardCopies
from data_pipeline.sources.inputs import find_inputs
from data_pipeline.sources.remote import RemoteConfig, is_lasting
from launch.command_line import cli
from model.errors import UserError

NAMES = [f"bucket/films/x-{number:03d}.tar" for number in range(3)]


class Between:
    """Passes requests on to a server, and loses a share of the answers: 503, or a body that ends early.

    `refuses`: it answers 403 to everything, as a server does to a stranger. `reads` counts the bodies that were asked for.
    """

    def __init__(self, port: int):
        self.losing, self.refuses, self.lost, self.reads = 0.0, False, 0, 0
        draw, between = random.Random(1), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server = http.client.HTTPConnection("127.0.0.1", port)
                server.request(self.command, self.path, body or None, dict(self.headers))
                answer = server.getresponse()
                status, content = answer.status, answer.read()
                server.close()
                between.reads += "Range" in self.headers
                lost = draw.random() < between.losing
                between.lost += lost
                cut = lost and len(content) > 1000
                if between.refuses or (lost and not cut):
                    status, content = (403, b"no") if between.refuses else (503, b"later")
                self.send_response(status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(content[: len(content) // 2 if cut else None])
                self.close_connection = self.close_connection or cut

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        for method in ("HEAD", "POST", "PUT", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.do_GET)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    """Of the two servers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "GCSFS_"))]:
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks over gRPC, which the emulator has not
        from gcp_storage_emulator.server import create_server
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        for name in ("werkzeug", "gcp_storage_emulator", "api.object"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        gs = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        s3.start()
        gs.start()
        yield {"s3": s3.get_host_and_port()[1], "gs": gs._api._httpd.server_address[1]}
        s3.stop()
        gs.stop()


class Store:
    """A server with three shards, what stands before it, and how it is reached."""

    def __init__(self, protocol: str, port: int):
        self.protocol, self.between = protocol, Between(port)
        self.options: dict[str, Any] = {"endpoint_url": self.between.url}
        if protocol == "s3":
            self.options |= {"key": "mine", "secret": "mine", "config_kwargs": {"retries": {"max_attempts": 0}}}
        else:
            self.options |= {"token": "anon"}
        self.config = RemoteConfig(attempts=8, wait_seconds=0.001, options=self.options)
        self.contents = {name: os.urandom(20_000 + number) for number, name in enumerate(NAMES)}
        self.system = fsspec.filesystem(protocol, **self.options, skip_instance_cache=True)
        if protocol == "s3" and not self.system.exists("bucket"):
            self.system.mkdir("bucket")
        for name, content in self.contents.items():
            self.system.pipe(name, content)

    def find(self, pattern: str, notes: Path, config: RemoteConfig | None = None) -> list[Any]:
        return find_inputs([f"{self.protocol}://{pattern}"], "input", config or self.config, notes)

    def fetch(self, shards: list[Any], folder: Path, config: RemoteConfig | None = None) -> list[bytes | UserError]:
        with ShardCopies(folder, config or self.config).ahead(shards) as held:
            return [one.path.read_bytes() if isinstance(one, Held) else one for one in held]


@pytest.fixture(params=["s3", "gs"])
def store(request, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    async def no_wait(seconds: float) -> None:
        """Between the attempts of the library's own."""

    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=no_wait))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4_000)
    made = Store(request.param, ports[request.param])
    yield made
    made.between.close()


def test_patterns_braces_bytes_and_the_cache_while_answers_are_lost(store: Store, tmp_path: Path) -> None:
    expected = [f"{store.protocol}://{name}" for name in NAMES]
    store.between.losing = 0.25
    for pattern in ("films/*.tar", "**/*.tar", "films/x-00[0-2].tar", "films/x-{000..002}.tar", "{films,films}/*.tar"):
        shards = store.find(f"bucket/{pattern}", tmp_path / "notes")
        assert [shard.url for shard in shards] == expected
    config = RemoteConfig(str(tmp_path / "cache"), 1.0, 8, 0.001, store.options)
    assert store.fetch(shards, tmp_path, config) == list(store.contents.values())
    assert store.between.lost >= 3
    before = store.between.reads
    assert store.fetch(shards, tmp_path, config) == list(store.contents.values())
    assert store.between.reads == before > 3 * 5  # blocks


def test_shards_that_vanish_or_change_are_named_and_the_others_come(store: Store, tmp_path: Path) -> None:
    shards = store.find("bucket/films/*.tar", tmp_path / "notes")
    other = fsspec.filesystem(store.protocol, **store.options, skip_instance_cache=True)  # as another process has it
    other.rm(NAMES[0])
    other.pipe(NAMES[1], b"?" * 20_001)  # of the same length
    gone, changed, good = store.fetch(shards, tmp_path / "copies")
    assert isinstance(gone, UserError)
    assert "no longer on its server" in str(gone)
    assert isinstance(changed, UserError)
    assert "has changed on its server" in str(changed)
    assert good == store.contents[NAMES[2]]
    assert list((tmp_path / "copies").iterdir()) == []
    other.pipe(NAMES[2], b"!" * 30_000)  # longer: its beginning is no shard
    assert "has changed" in str(store.fetch(shards[2:], tmp_path / "copies")[0])
    remote._open_system(shards[1].url, store.config)[0].invalidate_cache()  # what a new process begins with
    assert store.fetch(store.find("bucket/films/*.tar", tmp_path / "notes"), tmp_path / "copies") == [
        b"?" * 20_001,
        b"!" * 30_000,
    ]
    for pattern in ("bucket/films/x-{000..002}.tar", "bucket/none/*.tar", "elsewhere/*.tar", "elsewhere/x.tar"):
        with pytest.raises(UserError, match="no input shards"):
            store.find(pattern, tmp_path / "more")


def test_a_stranger_is_told_at_once(store: Store, tmp_path: Path, caplog, capsys) -> None:
    store.between.refuses = True
    options = ",".join(f"{name}: '{value}'" for name, value in store.options.items() if name != "config_kwargs")
    for name in ("films/*.tar", "films/x-000.tar"):
        command = [f'input="{store.protocol}://bucket/{name}"', f"target={tmp_path}/t", "text_tokenizer=none"]
        assert cli.main(["tokenize", *command, f"remote.options={{{options}}}"]) == 2
        told = capsys.readouterr().err
        assert told.count("error:") == 1
        assert "cannot be read from its server" in told
        assert "the credentials" in told
        assert "Traceback" not in told
    assert caplog.records == []  # no attempt was made again, no library wrote a traceback


def test_credentials_that_are_missing_are_told_at_once(ports: dict[str, int], tmp_path: Path, caplog) -> None:
    url = f"http://127.0.0.1:{ports['s3']}"
    for options in ({"endpoint_url": url}, {"endpoint_url": url, "profile": "nobody"}):
        with pytest.raises(UserError, match="check the URL, the credentials"):
            find_inputs(["s3://bucket/*.tar"], "input", RemoteConfig(options=options), tmp_path / "notes")
    assert caplog.records == []


def test_what_passes_by_itself_is_asked_again() -> None:
    from botocore.exceptions import ClientError, EndpointConnectionError
    from gcsfs.retry import HttpError

    def s3(status: int) -> ClientError:
        return ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

    temporary = [s3(503), s3(429), EndpointConnectionError(endpoint_url="x"), TimeoutError(), HttpError({"code": 500})]
    lasting = [s3(400), s3(403), HttpError({"code": 401}), OSError("Forbidden: b/x"), FileNotFoundError()]
    found = Counter((is_lasting(error), error in lasting) for error in [*temporary, *lasting])
    assert found == {(False, False): len(temporary), (True, True): len(lasting)}
