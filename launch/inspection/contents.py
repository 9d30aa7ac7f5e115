"""What is in a file or folder of the project: raw shards, token files, packed files, checkpoints, model presets."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.documents.tokenizers import read_description
from launch.inspection.below import find_below
from model.checkpoint.checksums import size_damage
from model.checkpoint.manifest import read_manifest
from model.config import FLOP_CONVENTION, ModelConfig, count_flops, count_parameters
from model.errors import UserError
from model.vocabulary import Vocabulary


def inspect_model(config: ModelConfig) -> dict[str, Any]:
    """Sizes of a model from its configuration alone. Nothing is built."""
    vocabulary = Vocabulary.from_config(config.vocabulary)
    return {
        "kind": "model",
        "name": config.name,
        "parameters": {**count_parameters(config), "padded": count_parameters(config, padded=True)["total"]},
        "vocabulary": vocabulary.describe(),
        "max_sequence_length": config.max_sequence_length,
        "flops_per_token": {
            "convention": FLOP_CONVENTION,
            "document_tokens": config.max_sequence_length,
            **flops_per_token(config),
        },
        "dtype": config.dtype,
    }


def flops_per_token(config: ModelConfig) -> dict[str, int]:
    """Of the forward pass over one document of the longest sequence, rounded."""
    length = config.max_sequence_length
    return {name: round(value / length) for name, value in count_flops(config, [0, length]).items()}


def inspect_path(path: Path, num_samples: int, text_tokenizer: Path | None) -> dict[str, Any]:
    """Finds out what `path` is and describes it. Raises `UserError` when it is nothing of ours."""
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return inspect_raw(path, num_samples)
    checkpoint = find_checkpoint(path)
    if checkpoint:
        return inspect_checkpoint(checkpoint)
    prefixes = find_prefixes(path)
    if prefixes:
        return inspect_tokens(path, prefixes, num_samples, text_tokenizer)
    from model.conversion.foreign import describe_foreign, looks_foreign

    if path.exists() and looks_foreign(path):
        return describe_foreign(path, None, num_samples)
    description = read_description(path) if path.is_dir() else None
    if description is not None:
        return {"kind": "text_tokenizer", "path": str(path)} | {
            name: value for name, value in description.items() if isinstance(value, str | int) and name != "kind"
        }
    below = find_below(path) if path.is_dir() else {}
    if below:
        return {"kind": "folder", "path": str(path), "inspect_one_of": below}
    raise UserError(
        "nothing here that can be inspected" if path.exists() else "there is no such file or folder",
        got=str(path),
        expected="a .tar shard, a token or packed file (or its folder), a checkpoint of ours or a published one",
        fix="nextstate inspect --help shows examples",
    )


def inspect_any_checkpoint(path: Path, model: ModelConfig | None, num_samples: int) -> dict[str, Any]:
    """A checkpoint, ours or a published one; with `model`, also what does not fit that configuration."""
    from model.conversion.foreign import describe_foreign

    folder = find_checkpoint(path)
    if folder is None:
        return describe_foreign(path, model, num_samples)
    answer = inspect_checkpoint(folder)
    if model is not None:
        answer["mismatches"] = checkpoint_mismatches(folder, model)
    return answer


def checkpoint_mismatches(folder: Path, model: ModelConfig) -> list[str]:
    """Fields in which a checkpoint's own record of its model differs from `model`."""
    recorded = read_manifest(folder).get("model") or {}
    return [
        f"model.{name}: {value!r}, but the checkpoint has {recorded.get(name)!r}"
        for name, value in asdict(model).items()
        if name != "name" and recorded.get(name) != value
    ]


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint folder that `path` is, or the newest complete one of the stage folder that it is."""
    if (path / "manifest.json").exists():
        return path
    steps = sorted((path / "checkpoints").glob("step_*/manifest.json"))
    return steps[-1].parent if steps else None


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Read from the manifest; no weights are opened. Files that are not there or not whole are `damaged`."""
    manifest = read_manifest(folder)
    sizes = {name: size_damage(folder / name, file["bytes"]) for name, file in manifest["files"].items()}
    shapes: dict[str, list[int]] = {key: value["global_shape"] for key, value in manifest.get("keys", {}).items()}
    weights = {key: shape for key, shape in shapes.items() if key.startswith("model/")}
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "trained": manifest.get("kind"),
        "step": manifest.get("step"),
        "consumed_samples": manifest.get("consumed_samples"),
        "layout": manifest.get("layout"),
        "num_tensors": len(shapes),
        "num_parameters": sum(product(shape) for shape in weights.values()),
        "bytes": sum(int(file["bytes"]) for file in manifest.get("files", {}).values()),
        "data_fingerprint": manifest.get("data_fingerprint"),
        "model": manifest.get("model"),
        **damage([f"{name}: {told}" for name, told in sizes.items() if told]),
    }


def damage(lines: list[str]) -> dict[str, Any]:
    """For an answer: what is damaged, and that the command then ends with 2."""
    return {"damaged": lines, "exit_code": 2} if lines else {}


def product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def inspect_raw(path: Path, num_samples: int) -> dict[str, Any]:
    """Samples by kind and unreadable ones by reason; the first samples with the sizes of their parts."""
    from data_pipeline.kinds.registry import read_shard
    from data_pipeline.sources import BadSample

    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    damaged: dict[str, str] = {}  # the first thing that is said of each cut shard
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    for shard in shards:
        for sample in read_shard(shard):
            if isinstance(sample, BadSample):
                reasons[sample.reason] += 1
                if sample.reason == "truncated_tar":
                    place = f"in the sample {sample.key!r}" if sample.key else "before its first sample"
                    damaged.setdefault(shard.name, f"{shard.name}: cut or damaged {place}: {sample.detail}")
                continue
            kinds[str(sample.kind)] += 1
            if len(shown) < num_samples:
                parts = {name: describe_part(name, content) for name, content in sample.parts.items()}
                shown.append({"key": sample.key, "kind": str(sample.kind), "parts": parts})
    return {
        "kind": "raw",
        "path": str(path),
        "num_shards": len(shards),
        "num_samples": sum(kinds.values()),
        "by_kind": dict(kinds),
        "unreadable": dict(reasons),
        "samples": shown,
        **damage(list(damaged.values())),
    }


def describe_part(name: str, content: bytes) -> str:
    """Text as it is, pictures by their size in pixels, anything else by its bytes."""
    extension = name.rsplit(".", 1)[-1].lower()
    if extension in ("txt", "json", "vtt", "srt"):
        return content.decode("utf-8", "replace")[:300]
    if extension in ("png", "jpg", "jpeg", "webp"):
        from data_pipeline.sources.image import open_picture
        from data_pipeline.sources.samples import SampleError

        try:
            with open_picture(content) as image:
                return f"{image.format} {image.width}x{image.height}"
        except SampleError as error:
            return f"{len(content):,} bytes, {error.reason}"
    return f"{len(content):,} bytes"


def find_prefixes(path: Path) -> list[Path]:
    """Prefixes of the token or packed files that `path` names: a folder, a prefix, or one of its files."""
    if path.is_dir():
        return [file.with_suffix("") for file in sorted(path.glob("*.idx"))]
    name = path.name
    for suffix in (".seg.npy", ".crc.npy", ".signatures.npy", ".bin", ".idx", ".json"):
        name = name.removesuffix(suffix)
    prefix = path.with_name(name)
    return [prefix] if prefix.with_name(name + ".idx").exists() else []


def inspect_tokens(path: Path, prefixes: list[Path], num_samples: int, tokenizer_path: Path | None) -> dict[str, Any]:
    """Counts of the manifests, and the first documents or rows decoded to readable text and image sizes."""
    from data_pipeline.storage.format import read_manifest
    from data_pipeline.storage.packed_files import check_listed_shard
    from data_pipeline.storage.token_files import TokenFileReader

    manifests = [read_manifest(prefix) for prefix in prefixes]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        check_listed_shard(prefix, manifest)
    tokenizer = None
    if tokenizer_path:
        from data_pipeline.documents.tokenizers import load_text_tokenizer

        tokenizer = load_text_tokenizer(tokenizer_path)
    reader = TokenFileReader(prefixes[0])
    vocabulary = vocabulary_of(manifests[0])
    samples = [read_sample(reader, index, vocabulary, tokenizer) for index in range(min(num_samples, len(reader)))]
    counts: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    for manifest in manifests:
        counts.update(manifest.get("counts_by_class") or {})
        quarantined.update(manifest.get("quarantined") or {})
    first = manifests[0]
    return {
        "kind": first["kind"],
        "path": str(path),
        "num_shards": len(prefixes),
        "num_documents": sum(int(one.get("num_rows", one.get("num_documents", 0))) for one in manifests),
        "num_tokens": sum(int(one["num_tokens"]) for one in manifests),
        "sequence_length": first.get("sequence_length"),
        "counts_by_class": dict(counts),
        "quarantined": dict(quarantined),
        "sources": first.get("sources"),
        "samples": samples,
    }


def vocabulary_of(manifest: dict[str, Any]) -> Vocabulary:
    described = {name: value for name, value in manifest["vocabulary"].items() if name != "size"}
    return Vocabulary(**described)


def read_sample(reader: Any, index: int, vocabulary: Vocabulary, tokenizer: Any) -> str:
    """One document or row. With a text tokenizer as text, else as one item a segment."""
    from data_pipeline.storage.segments import Kind

    tokens, segments = reader.tokens(index), reader.segments(index)
    padding = sum(int(one["length"]) for one in segments if one["kind"] == Kind.PAD)
    real = tokens[: len(tokens) - padding]
    if tokenizer is not None:
        from data_pipeline.documents.builder import describe

        text = describe(real, vocabulary, tokenizer)
    else:
        text = " ".join(describe_segment(one) for one in segments if one["kind"] != Kind.PAD)
    return f"{text} [{len(real)} tokens, {padding} of padding]"


def describe_segment(segment: Any) -> str:
    from data_pipeline.storage.segments import Kind

    kind = Kind(int(segment["kind"]))
    size = f"{segment['grid_height']}*{segment['grid_width']}" if kind is Kind.IMAGE else str(segment["length"])
    return f"<{kind.name.lower()} {size}>"
