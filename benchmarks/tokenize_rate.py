"""How much of the bare tokenizers' rate `tokenize` keeps, from shards to published token files.

    python -m benchmarks.tokenize_rate [--rounds 3] [--pictures 128] [--texts 3000] [--device-milliseconds 5] [--encoder-channels 16]

Comparisons in one run, taking turns; rates are of wall time, and CPU seconds stand beside (children included), with the share of the
CPU time that the bare tokenizer takes of all:

- text by SentencePiece, tiktoken (with the pattern as Qwen publishes it) and Hugging Face: the library's own call over the same texts,
  in memory, one by one on one core, all in one call on two. The process is kept to as many cores, on both sides of a line;
- text beside datatrove: its DocumentTokenizer, from texts in memory to its files, unshuffled, with the same tokenizer of Hugging Face
  on one core;
- pictures on this CPU: the encoder of `ibq_small`, or with other channels and blocks, on one thread, over the same pictures already
  decoded, in the same batches;
- pictures on a device: an encoder that takes so many milliseconds a picture and none of this CPU, as an accelerator does.

Pictures are JPEG files of 256 x 256 pixels with a caption, brought to 128 x 128.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import psutil
import sentencepiece
import torch
import webdataset
from PIL import Image

from data_pipeline.documents.byte_pairs import QWEN_PATTERN
from data_pipeline.documents.tokenizers import TextTokenizer, load_text_tokenizer, train_sentencepiece
from data_pipeline.sources.image import ImageConfig, decode_image, smart_resize
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig, VisionTokenizer
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.wrapper import VisionTokenizer as Encoder
from model.vocabulary import Vocabulary, VocabularyConfig

SIDE, BATCH = 128, 128


class Device:
    """An encoder that computes elsewhere."""

    factor, codebook_size, fingerprint = 16, 1024, "device"

    def __init__(self, seconds_per_picture: float):
        self.seconds_per_picture = seconds_per_picture

    def encode(self, images: np.ndarray) -> np.ndarray:
        time.sleep(len(images) * self.seconds_per_picture)
        count, height, width, _ = images.shape
        return np.zeros((count, height // 16, width // 16), np.int64)


def make_encoder(channels: int, blocks: int) -> Encoder:
    """Random weights; by default of the sizes of `ibq_small`. The published tokenizer has 256 channels and 4 blocks."""
    torch.manual_seed(0)
    sizes = VisionTokenizerConfig(
        ch=channels,
        num_res_blocks=blocks,
        z_channels=32,
        embed_dim=32,
        n_embed=1024,
        norm_groups=8,
        attn_resolutions=[16],
    )
    model = IBQ(sizes)
    model.channels_last()
    return Encoder(model, "random weights")


def make_texts(count: int) -> list[str]:
    """Of 1,000 to 8,000 characters."""
    draw, text = random.Random(0), "\n".join(topics.values())
    spans = [(draw.randrange(len(text) - 8000), draw.randrange(1000, 8000)) for _ in range(count)]
    return [text[first : first + length].strip() for first, length in spans]


def make_picture(number: int) -> bytes:
    """A smooth picture with some noise: as large as a photo of that size."""
    noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def write_shard(path: Path, samples: list[dict[str, object]]) -> None:
    with webdataset.TarWriter(str(path)) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"{number:06d}", **sample})


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and of CPU."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    work()
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """Of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (one.cpu_times() for one in processes))


def compare(
    title: str, count: int, unit: str, rounds: int, bare: Callable[[], object], whole: Callable[[], object]
) -> None:
    whole()  # starts the child that decodes
    bare()
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "whole": []}
    for _ in range(rounds):
        found["bare"].append(measured(bare))
        found["whole"].append(measured(whole))
    (bare_wall, bare_cpu), (wall, cpu) = (
        tuple(statistics.median(one[kind] for one in times) for kind in (0, 1)) for times in found.values()
    )
    print(
        f"{title:<28}{count / bare_wall:>10,.0f}{count / wall:>10,.0f} {unit:<12}{bare_wall / wall:>8.1%}"
        f"{bare_cpu:>10.2f}{cpu:>10.2f}{bare_cpu / cpu:>8.0%}",
        flush=True,
    )


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Threads and processes that begin here have so many cores for themselves, as far as this process has them."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def train_huggingface(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(topics.values(), trainer)
    tokenizer.save(str(path))


def write_ranks(huggingface: Path, path: Path) -> None:
    """The same pieces as a file of tiktoken: each byte is written as a letter of its own there."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    byte_of = {chr(value): value for value in plain} | {chr(256 + number): value for number, value in enumerate(others)}
    pieces = json.loads(huggingface.read_text())["model"]["vocab"]
    ranks = sorted(pieces.items(), key=lambda item: int(item[1]))
    lines = (base64.b64encode(bytes(map(byte_of.__getitem__, piece))) + b" %d\n" % rank for piece, rank in ranks)
    path.write_bytes(b"".join(lines))


@dataclass
class TextLibrary:
    """A text tokenizer, and its library's own calls: of one text, and of all texts on so many cores."""

    name: str
    tokenizer: TextTokenizer
    one: Callable[[str], object]
    many: Callable[[list[str], int], object]


def text_libraries(folder: Path) -> list[TextLibrary]:
    import tiktoken.load
    from tokenizers import Tokenizer

    train_huggingface(folder / "huggingface.json")
    write_ranks(folder / "huggingface.json", folder / "bytes.tiktoken")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    ranks = tiktoken.load.load_tiktoken_bpe(str(folder / "bytes.tiktoken"))
    encoding = tiktoken.Encoding("bare", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    huggingface = Tokenizer.from_file(str(folder / "huggingface.json"))
    return [
        TextLibrary(
            "SentencePiece",
            load_text_tokenizer(folder / "tokenizer"),
            pieces.encode,
            lambda texts, count: pieces.encode(texts, num_threads=count),
        ),
        TextLibrary(
            "tiktoken",
            load_text_tokenizer(folder / "bytes.tiktoken"),
            encoding.encode_ordinary,
            lambda texts, count: encoding.encode_ordinary_batch(texts, num_threads=count),
        ),
        TextLibrary(
            "Hugging Face",
            load_text_tokenizer(folder / "huggingface.json"),
            lambda text: huggingface.encode(text).ids,
            lambda texts, count: [one.ids for one in huggingface.encode_batch_fast(texts)],
        ),
    ]


def datatrove_tokenizer(folder: Path, texts: list[str]) -> Callable[[], object]:
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()

    def work() -> None:
        documents = (Document(text, str(number)) for number, text in enumerate(texts))
        tokenizer = DocumentTokenizer(
            str(folder / "datatrove"), tokenizer_name_or_path=str(folder / "huggingface.json"), shuffle_documents=False
        )
        tokenizer.run(documents, 0, 1)

    return work


def tokenizer_of(text: TextTokenizer, vision: VisionTokenizer | None, num_threads: int = 1) -> ShardTokenizer:
    sizes = VocabularyConfig(text_size=text.size, reserved_size=32, visual_size=1024)
    config = TokenizeConfig("rate", image=ImageConfig(max_area=SIDE * SIDE))
    return ShardTokenizer(config, Vocabulary.from_config(sizes), text, vision, num_threads=num_threads)


def compare_texts(
    libraries: list[TextLibrary],
    texts: list[str],
    folder: Path,
    rounds: int,
    whole: Callable[[ShardTokenizer, str], Callable[[], object]],
) -> None:
    characters = sum(map(len, texts))

    def line(title: str, library: TextLibrary, bare: Callable[[], object], num_cores: int) -> None:
        with cores(num_cores):
            tokenizer = tokenizer_of(library.tokenizer, None, num_cores)
            compare(title, characters, "characters", rounds, bare, whole(tokenizer, "texts.tar"))

    for library in libraries:
        line(f"{library.name}, one core", library, lambda one=library.one: [one(text) for text in texts], 1)  # type: ignore[misc]
        line(f"{library.name}, two cores", library, lambda many=library.many: many(texts, 2), 2)  # type: ignore[misc]
    line("datatrove, one core", libraries[-1], datatrove_tokenizer(folder, texts), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--device-milliseconds", type=float, default=5.0)
    parser.add_argument("--encoder-channels", type=int, default=16)
    parser.add_argument("--encoder-blocks", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = train_sentencepiece(topics.values(), folder / "tokenizer", 4000)
        texts = make_texts(arguments.texts)
        write_shard(folder / "texts.tar", [{"txt": one} for one in texts])
        files = [make_picture(number) for number in range(arguments.pictures)]
        write_shard(folder / "pictures.tar", [{"jpg": one, "txt": "a picture"} for one in files])
        resized = [smart_resize(decode_image(one), ImageConfig(max_area=SIDE * SIDE), 16) for one in files]
        pixels = np.stack(resized)

        def whole(tokenizer: ShardTokenizer, shard: str) -> Callable[[], object]:
            def work() -> None:
                (folder / "out.json").unlink(missing_ok=True)
                manifest = tokenizer.tokenize(folder / shard, folder / "out").manifest
                assert not manifest["quarantined"], manifest["quarantined"]

            return work

        def bare(encoder: VisionTokenizer) -> Callable[[], object]:
            return lambda: [encoder.encode(pixels[first : first + BATCH]) for first in range(0, len(pixels), BATCH)]

        print(
            f"{'':<28}{'bare':>10}{'tokenize':>10} {'a second':<12}{'keeps':>8}{'CPU s':>10}{'CPU s':>10}{'share':>8}"
        )
        compare_texts(text_libraries(folder), texts, folder, arguments.rounds, whole)
        for title, encoder in (
            ("pictures on this CPU", make_encoder(arguments.encoder_channels, arguments.encoder_blocks)),
            ("pictures on a device", Device(arguments.device_milliseconds / 1e3)),
        ):
            compare(
                title,
                len(files),
                "pictures",
                arguments.rounds,
                bare(encoder),
                whole(tokenizer_of(text, encoder), "pictures.tar"),
            )


if __name__ == "__main__":
    main()
