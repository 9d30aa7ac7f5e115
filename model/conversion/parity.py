"""The parity certificate: a checkpoint of ours and a published layout hold the same weights and say the same.

Names and arrangements come from `model.reference`, not from the tables that converted the weights: a mistake there
shows here.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import reference
from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.config import ModelConfig, count_parameters
from model.conversion.hugging_face import model_config, read_config, refuse_rope
from model.conversion.sources import open_foreign
from model.durable import write_json
from model.errors import UserError
from model.vocabulary import Vocabulary

CERTIFICATE_NAME = "parity.json"
MODES = ("logits", "keys")
MAX_LOGIT_DIFFERENCE = 1e-4  # float32, against another implementation
# model_type of config.json of the architectures that transformers runs as we do.
IN_TRANSFORMERS = {"qwen3": "Qwen3ForCausalLM"}
WITHOUT_HEAD_NORMS = "emu3"
WORKING_BYTES = 1 << 29  # of activations and of the libraries, beside the weights


def certify(
    checkpoint: Path,
    hf_folder: Path,
    layout: str,
    *,
    mode: str = "logits",
    num_tokens: int = 256,
    seed: int = 0,
    out: Path | None = None,
    cast: str | None = None,
) -> dict[str, Any]:
    """Compare a checkpoint of ours with a folder of the published layout; the certificate, also written to a file.

    The file is `out`, by default `parity.json` beside the checkpoint.

    Every tensor is compared bitwise, and one with infinities or NaN is named. With `cast` (`bfloat16`) the weights of
    both sides are rounded to that dtype first, for a conversion that was asked to. With mode `logits`, random tokens
    run through both sides in float32: ours as it trains, theirs in transformers where it has the architecture, else
    in the plain reference. A model that does not fit in memory gets mode `keys`, and `message` says so. `passed` is
    true when all tensors are equal and finite, logits differ by 1e-4 at most and every argmax agrees. Raises `UserError` when one
    of the sides cannot be read.
    """
    assert mode in MODES, mode
    folder, hf_folder = latest_checkpoint(checkpoint), Path(hf_folder)
    values = read_config(hf_folder)
    if values is None:
        raise UserError("there is no config.json to compare with", where=str(hf_folder))
    refuse_rope(values, hf_folder)
    with CheckpointReader(folder) as reader:
        config = model_config(reader.manifest["model"], str(folder))
        theirs = _Foreign(hf_folder, values, config, cast)
        ours = reference.weights_of_checkpoint(reader, config)
        try:
            tensors = _compare_tensors(ours, theirs, config)
            non_finite = [name for name, one in tensors.items() if not one.pop("finite")]
            mode, message = _choose_mode(mode, layout, config)
            if non_finite:
                mode, message = "keys", "no logits: there are weights that are not finite"
            logits = {}
            if mode == "logits":
                logits = _compare_logits(reader, config, theirs, num_tokens, seed)
        finally:
            theirs.close()
    num_different = sum(not one["equal"] for one in tensors.values())
    same_logits = not logits or (logits["max_difference"] <= MAX_LOGIT_DIFFERENCE and logits["argmax_agreement"] == 1.0)
    certificate = {
        "passed": num_different == 0 and not non_finite and same_logits,
        "mode": mode,
        "message": message,
        "layout": layout,
        "checkpoint": str(folder),
        "hugging_face": str(hf_folder),
        "logits": logits or None,
        "num_tensors": len(tensors),
        "num_different": num_different,
        "non_finite": non_finite,
        "tensors": tensors,
    }
    _write(out or folder / CERTIFICATE_NAME, certificate)
    return certificate


class _Foreign:
    """The other side's tensors by name."""

    def __init__(self, folder: Path, values: dict[str, Any], config: ModelConfig, cast: str | None):
        self.folder, self.values = folder, values
        self.cast = getattr(torch, cast) if cast else None
        self.source = open_foreign(folder)
        self.num_ids = Vocabulary.from_config(config.vocabulary).size

    def close(self) -> None:
        self.source.close()

    def weight(self, name: str) -> torch.Tensor:
        """In its own dtype; rows of ids that we do not have are left out."""
        if name == "lm_head.weight" and self.values.get("tie_word_embeddings"):
            name = "model.embed_tokens.weight"
        if name not in self.source.tensors:
            raise UserError("a tensor is missing", where=str(self.folder), expected=name)
        info = self.source.tensors[name]
        rows = min(info.shape[0], self.num_ids) if "embed" in name or "lm_head" in name else info.shape[0]
        content = np.empty((rows, info.row_bytes), np.uint8)
        self.source.read_rows(name, 0, rows, content)
        dtype = getattr(torch, info.dtype)
        return torch.from_numpy(content.reshape(-1)).view(dtype).view(rows, *info.shape[1:])

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """As a conversion to another dtype leaves it."""
        return weight if self.cast is None else weight.to(self.cast)


def _compare_tensors(ours: reference.GetWeight, theirs: _Foreign, config: ModelConfig) -> dict[str, dict[str, Any]]:
    """By their names: checksum (crc32 of the bytes in one dtype) of both sides, whether they are equal and finite."""
    found = {}
    for name in reference.weight_names(config.num_layers):
        if ("q_norm" in name or "k_norm" in name) and name not in theirs.source.tensors:
            continue
        mine, other = ours(name), theirs.weight(name)
        same = mine.shape == other.shape
        mine = theirs.rounded(mine)
        other = theirs.rounded(other).to(mine.dtype)
        sums = [_checksum(mine), _checksum(other)]
        found[name] = {
            "shape": list(mine.shape),
            "ours": sums[0],
            "theirs": sums[1],
            "equal": same and sums[0] == sums[1],
            "finite": bool(torch.isfinite(mine).all()),
        }
    return found


def _checksum(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content.data):08x}"


def _choose_mode(mode: str, layout: str, config: ModelConfig) -> tuple[str, str]:
    """The mode that is possible, and why it is not the one asked for."""
    if mode == "keys":
        return mode, ""
    if layout == WITHOUT_HEAD_NORMS:
        return ("keys", "this layout has no norms of queries and keys: it is another function, logits cannot agree")
    import psutil

    # One side after the other, each with its weights in float32 and the largest of them a second time.
    needed = int(count_parameters(config, padded=True)["total"] * 4 * 1.3) + WORKING_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        return "keys", (
            f"logits need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: only the tensors were compared"
        )
    return mode, ""


def _compare_logits(
    reader: CheckpointReader, config: ModelConfig, theirs: _Foreign, num_tokens: int, seed: int
) -> dict[str, Any]:
    num_tokens = min(num_tokens, config.max_sequence_length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, theirs.num_ids, (num_tokens,), generator=generator)
    expected, against = _their_logits(theirs, tokens)
    gc.collect()  # one side's weights go before the other's come
    got = _our_logits(reader, config, tokens, theirs.rounded)
    expected = expected[:, : got.shape[1]]
    difference = (got - expected).abs()
    agreement = (got.argmax(-1) == expected.argmax(-1)).double().mean()
    return {
        "against": against,
        "num_tokens": num_tokens,
        "seed": seed,
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.double().mean()),
        "argmax_agreement": float(agreement),
        "standard_deviation": float(expected.std()),
    }


@torch.no_grad()
def _their_logits(theirs: _Foreign, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Logits [T, V] and who computed them."""
    name = IN_TRANSFORMERS.get(theirs.values.get("model_type", ""))
    if name:
        try:
            import transformers
        except ImportError:
            name = None
    if not name:
        sizes = reference.Sizes.from_hugging_face(theirs.values)
        return reference.logits(lambda name: theirs.rounded(theirs.weight(name)), sizes, tokens), "model.reference"
    # The class by name: a folder cannot bring code of its own.
    model = getattr(transformers, name).from_pretrained(
        theirs.folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    for parameter in model.parameters():
        parameter.data = theirs.rounded(parameter.data).float()
    return model.eval()(tokens[None]).logits[0], f"transformers {transformers.__version__} {name}"


@torch.no_grad()
def _our_logits(
    reader: CheckpointReader, config: ModelConfig, tokens: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Logits [T, V] over the real ids of the model that trains, in this process alone."""
    from model.backbone.attention_plan import packed_documents
    from model.backbone.packed_attention import prepare_attention
    from model.backbone.transformer import build_model
    from model.parallel import cpu_backend, groups
    from model.parallel.sharding import load_weights

    opened = not groups.is_initialized()
    if opened:
        groups.initialize(rank=0, world_size=1)
    try:
        model = build_model(replace(config, dtype="float32"), sequence_parallel=False).eval()
        load_weights(model, reader)
        for parameter in model.parameters():
            parameter.data = rounded(parameter.data).float()
        device = torch.device("cuda" if cpu_backend.has_accelerator() else "cpu")
        tokens = tokens.to(device)
        packed = prepare_attention(
            packed_documents(np.array([0, len(tokens)])),
            torch.arange(len(tokens), device=device),
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
        )
        logits = model.to(device)(tokens[None], None, None, packed_seq_params=packed)[0]
        result: torch.Tensor = logits[:, : Vocabulary.from_config(config.vocabulary).size].float().cpu()
        return result
    finally:
        if opened:
            groups.destroy()


def _write(path: Path, certificate: dict[str, Any]) -> None:
    try:
        write_json(path, certificate)
    except OSError as error:
        raise UserError("the certificate cannot be written", where=str(path), got=str(error)) from None
