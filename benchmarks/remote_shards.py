"""Videos behind a server of which some reads fail: nothing lost, and how much memory it takes.

    python -m benchmarks.remote_shards [--videos 1000] [--failing 0.05]

A server on loopback answers that share of its requests with 503, with a connection that ends early, or not at all. The same
shards are tokenized from it and from the disk; the token files must be the same bytes. Small blocks (8 KiB), so that there are
many reads. The vision tokenizer is a stand-in, so what is measured is fetching, decoding and writing. Exit code 1 when
anything differs or the peak of this process, server included, is above 2 GiB. The child that decodes has a limit of its own, 1 GiB.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import socket
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import av
import numpy as np

from data_pipeline.documents.tokenizers import TextTokenizer, train_sentencepiece
from data_pipeline.sources import remote
from data_pipeline.sources.copies import Held, ShardCopies
from data_pipeline.sources.inputs import Shard, find_inputs
from data_pipeline.sources.remote import RemoteConfig
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from model.vocabulary import Vocabulary, VocabularyConfig

VIDEOS_A_SHARD = 50


class FailingServer:
    """The files of a folder over HTTP, with ranges and a page of links; a share of the answers fails, drawn from a seed.

    `requests` counts what was asked and how it ended. Without `ranges` files are sent whole, whatever is asked for.
    """

    def __init__(self, folder: Path, failing: float = 0.0, ranges: bool = True, seed: int = 0):
        self.requests = counts = Counter[str]()
        draw, failures, lock = random.Random(seed), ("status", "early_end", "silence"), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                with lock:
                    failure = draw.choice(failures) if draw.random() < failing else ""
                    counts[failure or "good"] += 1
                if failure == "status":
                    self.send_error(503)
                    return
                if failure == "silence":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                path = folder / self.path.strip("/")
                if path.is_dir():
                    names = sorted(entry.name for entry in path.iterdir())
                    self.send("".join(f'<a href="{name}">{name}</a>' for name in names).encode(), 200, {}, with_body)
                elif not path.is_file():
                    self.send_error(404)
                else:
                    self.send_file(path, with_body, failure)

            def send_file(self, path: Path, with_body: bool, failure: str) -> None:
                content, status = path.read_bytes(), 200
                headers = {"ETag": f'"{path.stat().st_mtime_ns}-{len(content)}"'}
                asked = self.headers.get("Range")
                if ranges and asked:
                    first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                    content, status = content[first : last + 1], 206
                self.send(content, status, headers, with_body, len(content) // 2 if failure else None)

            def send(
                self, content: bytes, status: int, headers: dict[str, str], with_body: bool, cut_at: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(content[:cut_at])
                if cut_at is not None:
                    self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                """Nothing: the benchmark counts."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FailingServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class StandIn:
    """A vision tokenizer that costs nothing: the code of a patch is its mean grey."""

    factor, codebook_size, fingerprint = 8, 64, "stand-in"

    def encode(self, images: np.ndarray) -> np.ndarray:
        count, height, width, _ = images.shape
        codes: np.ndarray = images.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4, 5))
        return codes.astype(np.int64) // 4


def make_video(number: int) -> bytes:
    """Three seconds of 96 x 64 pixels, another picture each second."""
    target, random_numbers = io.BytesIO(), np.random.default_rng(number)
    with av.open(target, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=8, options={"preset": "ultrafast", "g": "8"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 8)
        for _ in range(3):
            pixels = np.kron(random_numbers.integers(0, 256, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            for _ in range(8):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return target.getvalue()


def write_shards(folder: Path, num_videos: int) -> None:
    for first in range(0, num_videos, VIDEOS_A_SHARD):
        with tarfile.open(folder / f"{first // VIDEOS_A_SHARD:06d}.tar", "w") as archive:
            for number in range(first, min(first + VIDEOS_A_SHARD, num_videos)):
                for extension, content in (("mp4", make_video(number)), ("txt", f"film {number}".encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def tokenize(shards: list[Shard], target: Path, text: TextTokenizer, config: RemoteConfig) -> int:
    """Documents of all shards; token files in `target`."""
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=text.size, visual_size=64))
    tokenizer = ShardTokenizer(TokenizeConfig(source="films"), vocabulary, text, StandIn())
    num_documents = 0
    with ShardCopies(target / "remote", config).ahead(shards) as held:
        for number, (shard, copy) in enumerate(zip(shards, held, strict=True)):
            if not isinstance(copy, Held):
                raise copy
            result = tokenizer.tokenize(shard, target / f"{number:06d}", copy=copy.path)
            num_documents += result.manifest["num_documents"]
    return num_documents


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--failing", type=float, default=0.05)
    options = parser.parse_args()
    remote.BLOCK_BYTES = 8 << 10
    config = RemoteConfig(wait_seconds=0.05)
    with tempfile.TemporaryDirectory() as name, FailingServer(Path(name) / "raw", options.failing) as server:
        folder = Path(name)
        (folder / "raw").mkdir()
        write_shards(folder / "raw", options.videos)
        text = train_sentencepiece(["film number one two three 0 1 2 3 4 5 6 7 8 9"] * 20, folder / "text", 276)
        seconds, counts = {}, {}
        for place, pattern in (("disk", f"{folder}/raw/*.tar"), ("server", f"{server.url}/*.tar")):
            started = time.monotonic()
            shards = find_inputs([pattern], "input", config, folder / "notes.jsonl")
            counts[place] = tokenize(shards, folder / place, text, config)
            seconds[place] = time.monotonic() - started
        pieces = sorted(path.name for path in (folder / "disk").glob("*.bin"))
        same = all((folder / "disk" / one).read_bytes() == (folder / "server" / one).read_bytes() for one in pieces)
        left = list((folder / "server" / "remote").iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    failed = server.requests.total() - server.requests["good"]
    print(f"{server.requests.total()} requests, {failed} failed {dict(server.requests)}")
    print(f"documents: {counts['server']} of {options.videos}; token files the same: {same}; copies left: {len(left)}")
    print(f"seconds: {seconds['server']:.1f} from the server, {seconds['disk']:.1f} from the disk")
    print(f"peak memory: {peak:.2f} GiB")
    return 0 if same and counts["server"] == options.videos and peak <= 2 and pieces and not left else 1


if __name__ == "__main__":
    sys.exit(main())
