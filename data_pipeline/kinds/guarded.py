"""Decoding in a process of its own: what one file may cost is bounded, and what it breaks is not ours.

FFmpeg and Pillow are C: they cannot be interrupted, take memory as they like, and die of some files. The child that runs them
has limits on memory and on CPU time a file; when it dies, the sample is named and another child takes the next one. The child
gets what this process wrote and answers with sizes and bytes: nothing of the files is ever unpickled.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import psutil

from data_pipeline.kinds.base import MediaDecoder, Pixels
from data_pipeline.sources.samples import SampleError
from data_pipeline.video.sound import SAMPLE_RATE, read_sound

MEMORY_BYTES = 1 << 30  # beyond what the child has when it starts
# CPU time, so that a busy machine changes nothing: a file of 40 kB has a minute, an hour of film of 500 MB three hours.
CPU_SECONDS = 60.0
CPU_SECONDS_PER_MB = 20.0
_PATIENCE_SECONDS = 60.0  # between two looks at a child that does not answer
_MAX_IDLE_LOOKS = 5  # without CPU time in between, before it is taken for stuck


_SECONDS = struct.Struct("<d")  # of CPU, before what is asked for and the decoder

Piece = tuple[dict[str, Any], bytes]  # a head, and what it is of: a picture, a block of sound


class DecoderDiedError(Exception):
    """The child ended in the middle of a file, killed by somebody else or by the file."""


@dataclass(frozen=True)
class GuardedDecoder(MediaDecoder):
    """`MediaDecoder` whose work is done by this process's `DecoderProcess`."""

    def picture(self, data: bytes) -> Pixels:
        return _pixels(*self._ask("picture", data)[0][0])

    def film(self, data: bytes) -> tuple[list[Pixels], float]:
        frames, seconds = self._ask("film", data)
        return [_pixels(*frame) for frame in frames], seconds

    def sound(self, data: bytes) -> np.ndarray:
        blocks, _ = self._ask("sound", data)
        return np.frombuffer(b"".join(content for _, content in blocks), np.int16)

    @functools.cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps(MediaDecoder(self.image, self.video, self.factor))

    def _ask(self, what: str, data: bytes) -> tuple[list[Piece], float]:
        process = decoder_process(os.getpid())
        try:
            return process.ask(self._pickled, what, data)
        except DecoderDiedError:  # the system's out-of-memory killer may have meant another process's file
            pass
        try:
            return process.ask(self._pickled, what, data)
        except DecoderDiedError as error:
            raise SampleError("decoder_died", str(error)) from error


@functools.cache
def decoder_process(pid: int) -> DecoderProcess:
    """The one child of the process `pid`, which is the caller's: a forked process has a child of its own."""
    process = DecoderProcess()
    atexit.register(process.close)
    return process


class DecoderProcess:
    """Starts the child when it is needed, and again after it died. One file at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._answers = select.poll()  # of the pipe: `Connection.poll` makes one for each look

    def ask(self, decoder: bytes, what: str, data: bytes) -> tuple[list[Piece], float]:
        """Pictures or sound, and the seconds until a film's end. Raises `SampleError`, `DecoderDiedError`.

        `decoder`: a pickled `MediaDecoder`.
        """
        with self._lock:
            if self._pipe is None:
                self._start()
            assert self._pipe is not None
            try:
                seconds = CPU_SECONDS + CPU_SECONDS_PER_MB * len(data) / 1e6
                self._pipe.send_bytes(_SECONDS.pack(seconds) + what.encode() + b"\0" + decoder)
                self._pipe.send_bytes(data)
                return self._answer()
            except (EOFError, OSError) as error:
                raise self._death() from error
            except BaseException as error:
                if not isinstance(error, SampleError):  # an answer is half read
                    self._end()
                raise

    def _answer(self) -> tuple[list[Piece], float]:
        pieces: list[Piece] = []
        while True:
            head = json.loads(self._receive())
            if "reason" in head:
                raise SampleError(head["reason"], head["detail"])
            if "seconds" in head:
                return pieces, head["seconds"]
            pieces.append((head, self._receive()))

    def _receive(self) -> bytes:
        assert self._pipe is not None
        assert self._child is not None
        idle_looks, before = 0, -1.0
        while not self._answers.poll(_PATIENCE_SECONDS * 1000):
            used = _cpu_seconds(self._child.pid)
            idle_looks, before = (idle_looks + 1 if used == before else 0), used
            if idle_looks == _MAX_IDLE_LOOKS:
                self._end()
                raise SampleError("decoding_took_too_long", "the decoder waits for something")
        return self._pipe.recv_bytes()

    def _death(self) -> Exception:
        assert self._child is not None
        code = self._child.wait()
        self._end()
        if code == -signal.SIGXCPU:
            return SampleError("decoding_took_too_long", "of CPU time; see data_pipeline/kinds/guarded.py")
        return DecoderDiedError(f"signal {-code}" if code < 0 else f"exit code {code}")

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        program = f"from data_pipeline.kinds.guarded import serve; serve({theirs.fileno()})"
        self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()  # so that the child's end is seen
        self._answers = select.poll()
        self._answers.register(self._pipe, select.POLLIN)
        try:
            self._pipe.recv_bytes()
        except (EOFError, OSError) as error:  # no file is at fault: this is a defect
            code = self._child.wait()
            self._end()
            raise RuntimeError(
                f"the process that decodes pictures and video did not start: exit code {code}"
            ) from error

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._child = self._pipe = None

    def close(self) -> None:
        with self._lock:
            self._end()


@functools.lru_cache(maxsize=16)
def _decoder_of(pickled: bytes) -> MediaDecoder:
    """As the parent wrote it; one object for all files."""
    decoder: MediaDecoder = pickle.loads(pickled)  # noqa: S301 - of this program, through its own pipe
    return decoder


def _pixels(head: dict[str, Any], content: bytes) -> Pixels:
    pixels = np.frombuffer(content, np.uint8).reshape(head["shape"])
    return Pixels(pixels, tuple(head["original_size"]), head["time_ms"])


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return -1.0
    return float(times.user + times.system)


def serve(descriptor: int) -> None:
    """In the child: decode until the pipe closes."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(descriptor) as pipe:
        pipe.send_bytes(b"ready")
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)  # libraries write there about every file; reasons go through the pipe
        while True:
            try:
                request = pipe.recv_bytes()
                data = pipe.recv_bytes()
            except (EOFError, OSError):
                return
            what, _, decoder = request[_SECONDS.size :].partition(b"\0")
            _limit_cpu(*_SECONDS.unpack_from(request))
            for message in _messages(_decoder_of(decoder), what.decode(), data):
                pipe.send_bytes(message)


def _messages(decoder: MediaDecoder, what: str, data: bytes) -> Iterator[bytes]:
    try:
        if what == "sound":
            yield from _sound(data)
            return
        pictures, length = decoder.film(data) if what == "film" else ([decoder.picture(data)], 0.0)
    except SampleError as error:
        yield _head(reason=error.reason, detail=error.detail)
        return
    except MemoryError:
        yield _head(reason="too_much_memory", detail=f"more than {MEMORY_BYTES:,} bytes")
        return
    except Exception as error:
        yield _head(reason=f"unexpected_{type(error).__name__}", detail=str(error)[:500])
        return
    for picture in pictures:
        yield _head(shape=picture.pixels.shape, original_size=picture.original_size, time_ms=picture.time_ms)
        yield picture.pixels.tobytes()
    yield _head(seconds=length)


def _sound(data: bytes) -> Iterator[bytes]:
    """Block by block: that of a long film is not held here."""
    num_samples = 0
    for block in read_sound(data):
        num_samples += len(block)
        yield _head(samples=len(block))
        yield block.tobytes()
    yield _head(seconds=num_samples / SAMPLE_RATE)


def _head(**values: Any) -> bytes:
    return json.dumps(values).encode()


def _limit_cpu(seconds: float) -> None:
    """From now on; the kernel ends the process after it by SIGXCPU."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
