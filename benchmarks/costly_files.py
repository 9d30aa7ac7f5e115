"""Small files that could cost much: seconds and memory of the commands that read them.

    python -m benchmarks.costly_files
    python -m benchmarks.costly_files --only million_keys pax_600_mb

Makes shards of a million members, of headers of 600 MB, of compressed nothing, and of transcripts of 300 kB that are
hard to read, and lets `inspect` and `tokenize` read each. Prints one JSON object: size of the file, seconds, peak of
memory, exit code, and what was said. The same commands on a shard of one text come first: the price of Python's start.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.kills import NEXTSTATE, make_inputs

MILLION = 1_000_000
TRANSCRIPT_BYTES = 300_000
END = bytes(2 * tarfile.BLOCKSIZE)
VTT = "WEBVTT\n\n00:00.000 --> 00:01.000\n"
ASS = "[Script Info]\nScriptType: v4.00+\n\n[Events]\n"
ASS += "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
ASS += "Dialogue: 0,0:00:00.00,0:00:01.00,Default,,0,0,0,,"
PIECES = [
    "<",
    "&#",
    "<0:",
    "a\n",
    "00:00.000 --> 00:01.000\nx\n\n",
    "-->",
    "{\\p1}",
    "{",
    "\u7ea2",
    "<c.",
    "NOTE\n",
    "a ",
]


def header(kind: bytes, size: int, name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def member(name: str, content: bytes = b"") -> bytes:
    return header(tarfile.REGTYPE, len(content), name) + block(content)


def million(names: Callable[[int], str]) -> Callable[[], Iterator[bytes]]:
    def content() -> Iterator[bytes]:
        for start in range(0, MILLION, 1000):
            yield b"".join(member(names(number)) for number in range(start, start + 1000))
        yield END

    return content


def transcripts(head: str, extension: str) -> Callable[[], Iterator[bytes]]:
    def content() -> Iterator[bytes]:
        for number, piece in enumerate(PIECES):
            text = head + piece * (TRANSCRIPT_BYTES // len(piece.encode()))
            yield member(f"{number}.mp4", b"x") + member(f"{number}.{extension}", text.encode())
        yield END

    return content


def digits() -> Iterator[bytes]:
    yield header(tarfile.XHDTYPE, 1 << 20, "pax") + b"1" * (1 << 20) + member("a.txt", b"x") + END


def joined() -> Iterator[bytes]:
    for _ in range(20_000):
        yield member("a.txt", b"x") + END


def nothing() -> Iterator[bytes]:
    yield member("a.txt", b"x") + END
    for _ in range(4000):
        yield bytes(1 << 20)


PLAIN = {
    "one_text": lambda: iter([member("a.txt", b"x") + END]),
    "million_keys": million(lambda number: f"{number}.txt"),
    "million_parts_of_one": million(lambda number: f"a.{number}"),
    "million_files_apart": million(lambda number: f"{number % (MILLION // 2)}.{'txt' if number % 2 else 'jpg'}"),
    "pax_600_mb": lambda: iter([header(tarfile.XHDTYPE, 600_000_000, "pax")]),
    "pax_of_digits": digits,
    "webvtt_300_kb": transcripts(VTT, "vtt"),
    "ass_300_kb": transcripts(ASS, "ass"),
}
COMPRESSED = {"joined_20000": joined, "nothing_4_gb": nothing}


def make(name: str, path: Path) -> None:
    if name in COMPRESSED:
        with gzip.open(path, "wb", compresslevel=6) as stream:
            for piece in COMPRESSED[name]():
                stream.write(piece)
        return
    with path.open("wb") as stream:
        for piece in PLAIN[name]():
            stream.write(piece)
    if name == "pax_600_mb":
        os.truncate(path, 600_100_000)  # a hole


def measured(arguments: list[str]) -> dict[str, object]:
    """Seconds, and the largest process of the command: on Linux `wait4` has it."""
    started = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    with io.TextIOWrapper(process.stdout, errors="replace") as output:
        text = output.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_megabytes": usage.ru_maxrss // 1024,
        "exit_code": process.returncode,
        "traceback": "Traceback" in text,
        "said": " | ".join(text.strip().splitlines()[-4:])[-300:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*PLAIN, *COMPRESSED], help="names of files")
    options = parser.parse_args()
    answers: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="nextstate-costly-") as name:
        folder = Path(name)
        make_inputs(folder)
        for kind in options.only:
            path = folder / f"{kind}.tar"
            make(kind, path)
            tokenize = [f"input={path}", f"target={folder}/tokens_{kind}", f"text_tokenizer={folder}/text_tokenizer"]
            answers[kind] = answer = {
                "bytes": path.stat().st_size,
                "inspect": measured([*NEXTSTATE, "inspect", str(path)]),
                "tokenize": measured([*NEXTSTATE, "tokenize", *tokenize, "vocabulary.visual_size=64"]),
            }
            path.unlink()
            print(kind, json.dumps(answer), file=sys.stderr, flush=True)
    print(json.dumps(answers, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
