"""The IBQ tokenizer's released layout: our parameter names are the published ones, so the map is the identity.

The released loader reads `config.yaml` (arguments of its class) and `model.ckpt` (a bare state dict); an export has both,
and the same tensors as safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.small_files import read_yaml
from model.conversion.actions import PREFIX, Options, our_weights
from model.conversion.checks import check_tensors
from model.conversion.mappings import VISION_LAYOUT
from model.conversion.plan import Plan, Segment, Target, into_ranks, into_shards
from model.conversion.record import expect_recorded, read_record, write_manifest, write_record
from model.conversion.safetensors_file import SafetensorsFile
from model.conversion.sources import CheckpointSource, open_foreign
from model.conversion.tensors import TensorInfo
from model.conversion.writer import Result, Written, execute, refuse_existing
from model.errors import Problems, UserError
from model.vision_tokenizer.config import VisionTokenizerConfig

KIND = "vision_tokenizer"
CONFIG_NAME, WEIGHTS_NAME = "config.yaml", "model.ckpt"
# Fields of the released encoder and decoder, and of the released class around them.
NETWORK_FIELDS = (
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "dropout",
)
CLASS_FIELDS = ("n_embed", "embed_dim", "beta")
# Fields that only training sees. Every other field changes the function: the released code knows its default only
# (it takes `cosine_similarity` and never looks at it).
TRAINING_FIELDS = ("logit_scale",)
# Of the released network, with the only values that ours has.
FIXED_NETWORK = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False}


def expected_shapes(config: VisionTokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Every published key of this tokenizer and its shape."""
    return dict(_shapes(config))


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _shapes(config: VisionTokenizerConfig) -> Shapes:
    widths = [config.ch * mult for mult in config.ch_mult]
    kernels = config.encoder_kernel_sizes or [3] * len(widths)
    latent, code = config.z_channels, config.embed_dim
    yield from _convolution("encoder.conv_in", config.in_channels, config.ch, 3)
    for level, width in enumerate(widths):
        before = widths[level - 1] if level else config.ch
        yield from _level(f"encoder.down.{level}", before, width, config.num_res_blocks, config, level, kernels[level])
        if level < len(widths) - 1:
            yield from _convolution(f"encoder.down.{level}.downsample.conv", width, width, 3)
    yield from _middle("encoder.mid", widths[-1], config, kernels[-1])
    yield from _norm("encoder.norm_out", widths[-1])
    yield from _convolution("encoder.conv_out", widths[-1], latent, kernels[-1])
    yield from _convolution("decoder.conv_in", latent, widths[-1], 3)
    yield from _middle("decoder.mid", widths[-1], config, 3)
    for level, width in enumerate(widths):
        before = widths[min(level + 1, len(widths) - 1)]
        yield from _level(f"decoder.up.{level}", before, width, config.num_res_blocks + 1, config, level, 3)
        if level:
            yield from _convolution(f"decoder.up.{level}.upsample.conv", width, width, 3)
    yield from _norm("decoder.norm_out", widths[0])
    yield from _convolution("decoder.conv_out", widths[0], config.out_ch, 3)
    yield "quantize.embedding.weight", (config.n_embed, code)
    yield from _convolution("quant_conv", latent, code, 1)
    yield from _convolution("post_quant_conv", code, latent, 1)


def _convolution(name: str, before: int, after: int, kernel: int) -> Shapes:
    yield f"{name}.weight", (after, before, kernel, kernel)
    yield f"{name}.bias", (after,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _block(name: str, before: int, after: int, kernel: int) -> Shapes:
    yield from _norm(f"{name}.norm1", before)
    yield from _convolution(f"{name}.conv1", before, after, kernel)
    yield from _norm(f"{name}.norm2", after)
    yield from _convolution(f"{name}.conv2", after, after, kernel)
    if before != after:
        yield from _convolution(f"{name}.nin_shortcut", before, after, 1)


def _attention(name: str, width: int) -> Shapes:
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _convolution(f"{name}.{part}", width, width, 1)


def _level(
    name: str, before: int, width: int, num_blocks: int, config: VisionTokenizerConfig, level: int, kernel: int
) -> Shapes:
    for block in range(num_blocks):
        yield from _block(f"{name}.block.{block}", width if block else before, width, kernel)
        if config.resolution // 2**level in config.attn_resolutions:
            yield from _attention(f"{name}.attn.{block}", width)


def _middle(name: str, width: int, config: VisionTokenizerConfig, kernel: int) -> Shapes:
    yield from _block(f"{name}.block_1", width, width, kernel)
    if config.mid_attention:
        yield from _attention(f"{name}.attn_1", width)
    yield from _block(f"{name}.block_2", width, width, kernel)


def to_published(source_path: Path, target: Path, options: Options) -> Result:
    """`config.yaml`, `model.ckpt` and safetensors of a tokenizer of ours."""
    refuse_existing(target)
    source = CheckpointSource(source_path)
    try:
        config = config_of(source)
        check_released(config, source.place)
        expected = expected_shapes(config)
        dtype = check_tensors(
            source.place, our_weights(source), {name: [shape] for name, shape in expected.items()}, options.dtype
        )
        targets = [
            Target(name, TensorInfo(shape, dtype), [Segment(source, PREFIX + name, 0, shape[0])])
            for name, shape in expected.items()
        ]
        into_shards(targets, options.shard_bytes)

        def finish(folder: Path, written: Written) -> None:
            write_class_config(folder / CONFIG_NAME, config)
            save_state_dict(folder, targets)
            write_record(folder, VISION_LAYOUT, source.manifest, written)
            if options.extras:
                options.extras(folder, written)

        what = {"action": "to_hf", "layout": VISION_LAYOUT, "dtype": dtype}
        return execute(Plan(what, targets, [source]), target, finish, threads=options.threads)
    finally:
        source.close()


def from_published(source_path: Path, target: Path, config: VisionTokenizerConfig | None, options: Options) -> Result:
    """A checkpoint of ours from the released files; `config` None reads `config.yaml` or the record of an export."""
    refuse_existing(target)
    source = open_foreign(source_path)
    try:
        folder = source_path if source_path.is_dir() else source_path.parent
        expect_recorded(source, read_record(folder), folder)
        config = config or find_config(source_path)
        problems = Problems()
        config.validate(problems, "vision_tokenizer")
        problems.raise_if_any()
        expected = expected_shapes(config)
        dtype = check_tensors(
            str(source_path), source.tensors, {name: [shape] for name, shape in expected.items()}, options.dtype
        )
        targets = [
            Target(PREFIX + name, TensorInfo(shape, dtype), [Segment(source, name, 0, shape[0])])
            for name, shape in expected.items()
        ]
        into_ranks(targets, 1, 1, 1)
        what = {"action": "from_hf", "layout": VISION_LAYOUT, "dtype": dtype}
        metadata = {
            "kind": KIND,
            "model": dataclasses.asdict(config),
            "step": 0,
            "consumed_samples": 0,
            "data_fingerprint": None,
            "layout": {"converted": True},
            "conversion": what,
        }

        def finish(folder: Path, written: Written) -> None:
            write_manifest(folder, metadata, targets, written)
            if options.extras:
                options.extras(folder, written)

        plan = Plan(what | {"metadata": metadata}, targets, [source])
        return execute(plan, target, finish, threads=options.threads)
    finally:
        source.close()


def config_of(source: CheckpointSource) -> VisionTokenizerConfig:
    if source.manifest.get("kind") != KIND:
        raise UserError(
            "this checkpoint is not a vision tokenizer",
            where=source.place,
            expected=f"kind {KIND}",
            got=f"kind {source.manifest.get('kind')}",
            fix="layout=emu35 or qwen3 for a language model",
        )
    try:
        config = VisionTokenizerConfig(**source.manifest["model"])
    except (KeyError, TypeError) as error:
        raise UserError(
            "the manifest does not describe a vision tokenizer", where=source.place, got=repr(error)
        ) from None
    return config


def check_released(config: VisionTokenizerConfig, place: str) -> None:
    """Refuse a tokenizer that the released code would run as another function."""
    published = VisionTokenizerConfig()
    known = (*NETWORK_FIELDS, *CLASS_FIELDS, *TRAINING_FIELDS)
    own = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in known and getattr(config, field.name) != getattr(published, field.name)
    ]
    if own:
        raise UserError(
            "the released code cannot run this tokenizer: it has structure of our own",
            where=place,
            expected=", ".join(f"{name}={getattr(published, name)}" for name in own),
            got=", ".join(f"{name}={getattr(config, name)}" for name in own),
        )


def find_config(path: Path) -> VisionTokenizerConfig:
    """From the record of an export of ours, or from the released `config.yaml` beside the weights."""
    folder = path if path.is_dir() else path.parent
    record = read_record(folder)
    if record:
        return VisionTokenizerConfig(**record["checkpoint"]["model"])
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise UserError(
            "the tokenizer's sizes cannot be told",
            where=str(folder),
            expected=CONFIG_NAME,
            fix="vision_tokenizer=ibq_emu35 (or its sizes one by one)",
        )
    tree = read_class_config(file)
    known = {name: tree["ddconfig"][name] for name in NETWORK_FIELDS if name in tree["ddconfig"]}
    known |= {name: tree[name] for name in CLASS_FIELDS if name in tree}
    try:
        return VisionTokenizerConfig(**known)
    except TypeError as error:
        raise UserError("config.yaml is not that of an IBQ tokenizer", where=str(file), got=str(error)) from None


def released_network(path: Path, config: VisionTokenizerConfig) -> dict[str, Any]:
    """`ddconfig` of the `config.yaml` beside released weights; where there is none, what an export would say."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    result: dict[str, Any] = read_class_config(file)["ddconfig"] if file.is_file() else class_config(config)["ddconfig"]
    return result


def read_class_config(file: Path) -> dict[str, Any]:
    """Arguments of the released class. Raises `UserError` for a file that is none of it, or of another network."""
    tree: Any = read_yaml(file, "config.yaml")
    try:
        for level in ("model", "init_args", "params"):
            tree = tree.get(level, tree)
        network = tree["ddconfig"]
        other = [
            f"{name}={network[name]}" for name, value in FIXED_NETWORK.items() if network.get(name, value) != value
        ]
        if not isinstance(tree["n_embed"], int):
            raise TypeError(f"n_embed {tree['n_embed']!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            "config.yaml is not that of an IBQ tokenizer",
            where=str(file),
            expected="ddconfig, n_embed, embed_dim",
            got=f"{type(error).__name__}: {error}",
        ) from None
    if other:
        expected = ", ".join(f"{name}={value}" for name, value in FIXED_NETWORK.items())
        raise UserError(
            "this network has no place in our IBQ tokenizer", where=str(file), expected=expected, got=", ".join(other)
        )
    result: dict[str, Any] = tree
    return result


def class_config(config: VisionTokenizerConfig) -> dict[str, Any]:
    """What the released class is built with."""
    return {
        "ddconfig": {"double_z": False} | {name: getattr(config, name) for name in NETWORK_FIELDS},
        **{name: getattr(config, name) for name in CLASS_FIELDS},
        "cosine_similarity": False,  # the released code takes it and never looks at it
        "use_entropy_loss": False,
    }


def write_class_config(path: Path, config: VisionTokenizerConfig) -> None:
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.create(class_config(config))), encoding="utf-8")


def save_state_dict(folder: Path, targets: list[Target]) -> None:
    """`model.ckpt` from the tensors that are already in the folder; mapped from the disk, not held in memory."""
    import torch

    state = {}
    for target in targets:
        piece = target.pieces[0]
        file = SafetensorsFile(folder / piece.file)
        position = file.tensors[piece.stored_name].position
        file.close()
        raw = np.memmap(folder / piece.file, np.uint8, "c", position, (target.info.num_bytes,))
        dtype = getattr(torch, target.info.dtype)
        state[target.name] = torch.from_numpy(raw).view(dtype).view(target.info.shape)
    torch.save(state, folder / WEIGHTS_NAME)
