"""The certificate of a conversion: is what was written the same model as what was read?"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.conversion.options import ConvertConfig
from model.checkpoint.manifest import latest_checkpoint, read_manifest
from model.config import ModelConfig, count_parameters
from model.conversion import actions, vision
from model.conversion.compare import compare
from model.conversion.hugging_face import model_config
from model.conversion.mappings import VISION_LAYOUT
from model.conversion.sources import listed
from model.conversion.writer import Written
from model.durable import TEMPORARY_MARK, replace_file
from model.errors import UserError
from model.vision_tokenizer.config import VisionTokenizerConfig

CERTIFICATE_NAME = "parity.json"
# Both sides in float32 and room to work in.
BYTES_A_PARAMETER = 10
# `verify=auto` runs models of this size at most: some seconds on a few cores, beside a conversion that takes one.
AUTO_PARAMETERS = 300_000_000
READ_BACK = "every tensor was read back after writing; conversion moves rows and changes none"


def certify_written(config: ConvertConfig, source: Path, folder: Path, written: Written) -> dict[str, Any]:
    """The certificate of `folder`, which is not published yet; written into it. Raises `UserError` if it fails."""
    if written.non_finite:
        raise UserError(
            "the model has weights that are not finite",
            where=str(source),
            got=f"{len(written.non_finite)} tensors: {listed(written.non_finite)}",
            fix="use another checkpoint; verify=none converts this one all the same",
        )
    certificate = None
    if config.action in ("from_hf", "to_hf"):
        certificate = _both_sides(config, source, folder)
    if certificate is None or isinstance(certificate, str):
        certificate = {
            "passed": True,
            "mode": "keys",
            "num_tensors": len(written.tensors),
            "tensors_crc32": written.tensors,
            "message": "; ".join(filter(None, (READ_BACK, certificate))),
        }
    publish_certificate(folder, certificate)
    return shown(certificate)


def _both_sides(config: ConvertConfig, source: Path, folder: Path) -> dict[str, Any] | str:
    """Both sides by independent code, or why not."""
    ours, theirs = (folder, source) if config.action == "from_hf" else (source, folder)
    manifest = read_manifest(latest_checkpoint(ours))
    vision_sizes = None
    if config.layout == VISION_LAYOUT:
        vision_sizes = VisionTokenizerConfig(**manifest["model"])
    reason = ""
    if vision_sizes is None:
        sizes = model_config(manifest["model"], str(ours))
        if not (theirs.is_dir() and (theirs / "config.json").is_file()):
            reason = "there is no config.json to compare the model with"
        elif config.verify == "auto":
            reason = too_large(sizes)
    if reason:
        return reason
    certificate = run_both(config, ours, theirs, folder / CERTIFICATE_NAME, vision_sizes)
    # The output's own name, not that of the folder where it is being made.
    target = str(config.target)
    side = "checkpoint" if config.action == "from_hf" else "published" if vision_sizes else "hugging_face"
    certificate[side] = target
    if config.dtype is not None:
        certificate["message"] = "; ".join(
            filter(None, (certificate["message"], f"weights of both sides rounded to {config.dtype}, as asked for"))
        )
    if not certificate["passed"]:
        raise UserError(
            "the certificate failed: both sides are not the same model",
            where=f"{source} and {target}",
            got=differences(certificate),
            fix="nothing was published; report this with both configurations",
        )
    return certificate


def run_both(
    config: ConvertConfig, ours: Path, theirs: Path, out: Path, vision_sizes: VisionTokenizerConfig | None
) -> dict[str, Any]:
    """The certificate of two folders by code that shares nothing with the conversion; said on stderr before it runs."""
    seed, cast = config.seed, config.dtype
    if vision_sizes is not None:
        from model.conversion.vision_parity import certify as certify_vision

        print("verify: codes and pixels of both sides (verify=none leaves this out)", file=sys.stderr)
        return certify_vision(ours, theirs, sizes=vision_sizes, cast=cast, seed=seed)
    from model.conversion.parity import certify

    mode = "keys" if config.verify == "keys" else "logits"
    sizes = model_config(read_manifest(latest_checkpoint(ours))["model"], str(ours))
    count = count_parameters(sizes, padded=True)["total"]
    what = f"logits of {config.num_tokens} tokens" if mode == "logits" else "tensors by name"
    hint = "keys compares tensors only" if mode == "logits" else "none leaves this out"
    print(
        f"verify: {what}, both sides, {count:,} parameters, at most {count * BYTES_A_PARAMETER / 1e9:.1f} GB "
        f"of memory (verify={hint})",
        file=sys.stderr,
        flush=True,
    )
    layout = config.layout or actions.identify(theirs, None)[0].name
    return certify(ours, theirs, layout, mode=mode, num_tokens=config.num_tokens, seed=seed, out=out, cast=cast)


def too_large(config: ModelConfig) -> str:
    """Why `verify=auto` does not run both sides as models, or ""."""
    import psutil

    count = count_parameters(config, padded=True)["total"]
    if count > AUTO_PARAMETERS:
        return f"no logits of {count:,} parameters: verify=logits runs them"
    if count * BYTES_A_PARAMETER > psutil.virtual_memory().available:
        return f"no logits: they need {count * BYTES_A_PARAMETER / 1e9:.1f} GB of memory"
    return ""


def differences(certificate: dict[str, Any]) -> str:
    """What is not equal in a certificate, in one line."""
    names = [name for name, one in certificate["tensors"].items() if not one["equal"]]
    parts = [f"{len(names)} tensors differ: {', '.join(names[:10])}"] if names else []
    if certificate["non_finite"]:
        parts.append(f"not finite: {listed(certificate['non_finite'], 10)}")
    logits, functions = certificate.get("logits"), certificate.get("functions")
    if logits:
        parts.append(
            f"logits differ by {logits['max_difference']:.3g} at most, argmax agrees at {logits['argmax_agreement']:.2%}"
        )
    if functions:
        parts.append(
            f"{functions['code_agreement']:.2%} of {functions['num_codes']} codes agree, pixels differ by "
            f"{functions['max_pixel_difference']:.3g} at most"
        )
    return "; ".join(parts)


def verify(config: ConvertConfig) -> dict[str, Any]:
    """Compare a checkpoint with an export; a difference is a `UserError` that names the tensors.

    First every byte through the tables, then, unless `verify=keys`, both sides as models. The certificate goes beside
    the export.
    """
    source, target = latest_checkpoint(config.source or "."), Path(config.target or ".")
    layout = config.layout or ""
    certificate = compare(source, target, layout, config.threads)
    problems = {name: certificate[name] for name in ("missing", "extra", "misshaped", "different") if certificate[name]}
    if problems:
        raise UserError(
            "the export is not the checkpoint",
            where=f"{source} and {target}",
            got="; ".join(f"{name}: {', '.join(names[:20])}" for name, names in problems.items()),
            fix="convert it again",
        )
    if config.verify in ("auto", "logits"):
        models = _models(replace(config, dtype=None), source, target)
        if models and not models["passed"]:
            raise UserError(
                "both sides hold the same tensors but are not the same model",
                where=f"{source} and {target}",
                got=differences(models),
                fix="compare their configurations",
            )
        certificate = certificate | models | {"tensors_crc32": certificate["tensors_crc32"]}
    publish_certificate(target if target.is_dir() else target.parent, certificate)
    answer = {"action": "verify", "source": str(source), "target": str(target), "layout": layout}
    return answer | {"parity": shown(certificate)}


def _models(config: ConvertConfig, source: Path, target: Path) -> dict[str, Any]:
    """Both sides as models; only a message where `verify=auto` finds them too large."""
    manifest = read_manifest(source)
    if config.layout == VISION_LAYOUT:
        sizes = VisionTokenizerConfig(**manifest["model"])
        vision.check_released(sizes, str(source))
        return run_both(config, source, target, target / CERTIFICATE_NAME, sizes)
    reason = too_large(model_config(manifest["model"], str(source))) if config.verify == "auto" else ""
    return {"message": reason} if reason else run_both(config, source, target, target / CERTIFICATE_NAME, None)


def publish_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    """Whole or not at all; what a killed process left half-written goes first."""
    for leftover in folder.glob(f"{CERTIFICATE_NAME}{TEMPORARY_MARK}*"):
        leftover.unlink(missing_ok=True)
    try:
        content = json.dumps(certificate, indent=1, ensure_ascii=False, allow_nan=False)
        replace_file(folder / CERTIFICATE_NAME, content + "\n")
    except OSError as error:
        raise UserError("the certificate cannot be written", where=str(folder), got=str(error)) from None


def shown(certificate: dict[str, Any]) -> dict[str, Any]:
    """Without the long tables."""
    return {name: value for name, value in certificate.items() if not name.startswith("tensors")}
