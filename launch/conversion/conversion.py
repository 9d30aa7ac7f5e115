"""What `nextstate convert` does: options to actions, tokenizers beside the weights, the certificate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.conversion.options import ConvertConfig
from model.checkpoint.manifest import CheckpointManifest, latest_checkpoint
from model.config import ModelConfig, count_parameters
from model.conversion import actions, surgery, vision
from model.conversion.actions import Options, Outcome
from model.conversion.compare import compare
from model.conversion.hugging_face import model_config
from model.conversion.mappings import VISION_LAYOUT
from model.conversion.record import RECORD_FOLDER, write_json
from model.conversion.writer import Result, Written
from model.errors import UserError
from model.vocabulary import Vocabulary

CERTIFICATE_NAME = "parity.json"
TOKENIZER_FOLDER = "text_tokenizer"
MODES = {"auto": "logits", "logits": "logits", "keys": "keys"}  # of the certificate
# Both sides in float32 and room to work in.
BYTES_A_PARAMETER = 10

Extra = Callable[[Path, Written], None]


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Run the configured action; the command's answer."""
    if config.action == "verify":
        return verify(config)
    source, target = Path(config.source or "."), Path(config.target or ".")
    actions.refuse_existing(target)
    answer: dict[str, Any] = {"action": config.action, "target": str(target), "layout": config.layout}
    if config.layout == VISION_LAYOUT:
        return answer | convert_vision(config, source, target)
    extras = Extras(config, source)
    options = read_options(config, extras)
    if config.action == "init":
        assert config.model is not None, "validated"
        outcome = actions.initialize(target, config.model, options)
    elif config.action == "from_hf":
        outcome = actions.from_published(source, target, config.model, config.layout, options)
    elif config.action == "to_hf":
        outcome = actions.to_published(source, target, config.layout or "", options)
    elif config.action == "reshard":
        outcome = actions.reshard(source, target, options)
    else:
        assert config.model is not None, "validated"
        chosen = surgery.SurgeryOptions(**asdict(config.surgery))
        outcome = surgery.operate(source, target, config.model, config.layout, options, chosen)
    outcome.notes += extras.notes
    return answer | figures(outcome) | extras.answer


def read_options(config: ConvertConfig, extras: Extra | None) -> Options:
    return Options(
        dtype=config.dtype,
        tensor=config.tensor,
        pipeline=config.pipeline,
        shard_bytes=int(config.shard_gigabytes * 1e9),
        threads=config.threads,
        seed=config.seed,
        untie=config.untie,
        ignore=tuple(config.ignore),
        extras=extras,
    )


def figures(outcome: Outcome) -> dict[str, Any]:
    layout = {"layout": outcome.layout} if outcome.layout else {}
    return layout | {"dtype": outcome.config.dtype, **_sizes(outcome.result), "notes": outcome.notes}


def _sizes(result: Result) -> dict[str, Any]:
    return {"bytes": result.num_bytes, "seconds": round(result.seconds, 3), "resumed_bytes": result.resumed_bytes}


class Extras:
    """Adds the text tokenizer and the certificate to a folder that is about to be published."""

    def __init__(self, config: ConvertConfig, source: Path):
        self.config, self.source = config, source
        self.notes: list[str] = []
        self.answer: dict[str, Any] = {}

    def __call__(self, folder: Path, written: Written) -> None:
        if self.config.action == "to_hf":
            self._export_tokenizer(folder)
        elif self.config.action == "from_hf":
            self._import_tokenizer(folder)
        if self.config.action != "init" and self.config.verify != "none":
            self._certify(folder, written)

    def _export_tokenizer(self, folder: Path) -> None:
        """Its own file, the Hugging Face directory, and a copy in the record for the way back."""
        from data_pipeline.documents.tokenizer_export import export_text_tokenizer

        checkpoint = latest_checkpoint(self.source)
        manifest = CheckpointManifest.read(checkpoint)
        place = find_text_tokenizer(manifest, checkpoint, self.config.text_tokenizer)
        if place is None:
            self.notes.append("no text tokenizer was exported: text_tokenizer=FOLDER names one")
            return
        vocabulary = Vocabulary.from_config(model_config(manifest.model or {}, str(checkpoint)).vocabulary)
        exported = export_text_tokenizer(place, vocabulary, folder)
        recorded = manifest.tokenizer(TOKENIZER_FOLDER)
        if recorded is not None and recorded.fingerprint != exported["fingerprint"]:
            raise UserError(
                "the text tokenizer is not the one that the checkpoint was trained with",
                where=str(place),
                expected=f"fingerprint {recorded.fingerprint}",
                got=exported["fingerprint"],
                fix="text_tokenizer=FOLDER of the right one",
            )
        copy = folder / RECORD_FOLDER / TOKENIZER_FOLDER
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.is_file():
                shutil.copyfile(path, copy / path.name)
        self.answer["text_tokenizer"] = exported

    def _import_tokenizer(self, folder: Path) -> None:
        kept = self.source / RECORD_FOLDER / TOKENIZER_FOLDER
        given = self.config.text_tokenizer
        if given is not None or kept.is_dir():
            place = Path(given) if given is not None else kept
            if not place.is_dir():
                raise UserError("the text tokenizer is not a folder", where=str(place))
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            shutil.copytree(place, folder / TOKENIZER_FOLDER)

    def _certify(self, folder: Path, written: Written) -> None:
        """Written into the folder before it is published: what fails is never published."""
        config = self.config
        if config.action not in ("from_hf", "to_hf") or not self._certify_both_sides(folder):
            certificate = {
                "passed": True,
                "mode": "keys",
                "num_tensors": len(written.tensors),
                "tensors_crc32": written.tensors,
                "message": "every tensor was read back after writing; conversion moves rows and changes none",
            }
            self._publish_certificate(folder, certificate)

    def _certify_both_sides(self, folder: Path) -> bool:
        """Compare source and output by independent code; False where that would need more memory than there is."""
        config = self.config
        source = self.source
        ours, theirs = (folder, source) if config.action == "from_hf" else (source, folder)
        sizes = model_config(CheckpointManifest.read(latest_checkpoint(ours)).model or {}, str(ours))
        has_config = theirs.is_dir() and (theirs / "config.json").is_file()
        if not has_config or (config.verify == "auto" and not fits_memory(sizes)):
            return False
        from model.conversion.parity import certify

        certificate = certify(
            ours,
            theirs,
            config.layout or self._detected(theirs),
            mode=MODES[config.verify],
            num_tokens=config.num_tokens,
            seed=config.seed,
            out=folder / CERTIFICATE_NAME,
        )
        # The output's own name, not that of the folder where it is being made.
        target = str(config.target)
        certificate |= {"checkpoint": target} if config.action == "from_hf" else {"hugging_face": target}
        if config.dtype is not None and certificate["mode"] == "logits":
            certificate["message"] += f"; the weights were cast to {config.dtype} on purpose"
        elif not certificate["passed"]:
            raise UserError(
                "the certificate failed: both sides are not the same model",
                where=f"{source} and {target}",
                got=differences(certificate),
                fix="nothing was published; report this with both configurations",
            )
        self._publish_certificate(folder, certificate)
        return True

    @staticmethod
    def _detected(folder: Path) -> str:
        return actions.identify(folder, None)[0].name

    def _publish_certificate(self, folder: Path, certificate: dict[str, Any]) -> None:
        write_json(folder / CERTIFICATE_NAME, certificate)
        self.answer["parity"] = {name: value for name, value in certificate.items() if not name.startswith("tensors")}


def differences(certificate: dict[str, Any]) -> str:
    """What is not equal in a certificate, in one line."""
    names = [name for name, one in certificate["tensors"].items() if not one["equal"]]
    logits = certificate["logits"] or {}
    parts = [f"{len(names)} tensors differ: {', '.join(names[:10])}"] if names else []
    if logits:
        parts.append(
            f"logits differ by {logits['max_difference']:.3g} at most, argmax agrees at {logits['argmax_agreement']:.2%}"
        )
    return "; ".join(parts)


def find_text_tokenizer(manifest: CheckpointManifest, checkpoint: Path, given: str | None) -> Path | None:
    """Where the checkpoint's text tokenizer is; None when it records none or it is gone."""
    if given is not None:
        if not Path(given).exists():
            raise UserError("the text tokenizer does not exist", where=given)
        return Path(given)
    if (checkpoint / TOKENIZER_FOLDER).is_dir():
        return checkpoint / TOKENIZER_FOLDER
    recorded = manifest.tokenizer(TOKENIZER_FOLDER)
    if recorded is None:
        return None
    # Run folder / stage / checkpoints / step; a converted checkpoint may stand anywhere.
    above = checkpoint.absolute().parents
    folder = above[min(2, len(above) - 1)] / recorded.path
    return folder if folder.exists() else None


def fits_memory(config: ModelConfig) -> bool:
    import psutil

    needed = count_parameters(config, padded=True)["total"] * BYTES_A_PARAMETER
    return needed < psutil.virtual_memory().available


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
    if layout != VISION_LAYOUT and config.verify in ("auto", "logits"):
        from model.conversion.parity import certify

        models = certify(
            source,
            target,
            layout,
            mode="logits",
            num_tokens=config.num_tokens,
            seed=config.seed,
            out=target / CERTIFICATE_NAME,
        )
        certificate = certificate | models | {"tensors_crc32": certificate["tensors_crc32"]}
        if not models["passed"]:
            raise UserError(
                "both sides hold the same tensors but are not the same model",
                where=f"{source} and {target}",
                got=differences(models),
                fix="compare config.json with the checkpoint's manifest",
            )
    write_json(target / CERTIFICATE_NAME, certificate)
    shown = {name: value for name, value in certificate.items() if not name.startswith("tensors")}
    return {"action": "verify", "source": str(source), "target": str(target), "layout": layout, "parity": shown}


def convert_vision(config: ConvertConfig, source: Path, target: Path) -> dict[str, Any]:
    options = read_options(config, None)
    if config.action == "to_hf":
        result = vision.to_published(source, target, options)
    elif config.action == "from_hf":
        result = vision.from_published(source, target, config.vision_tokenizer, options)
    else:
        raise UserError(f"layout={VISION_LAYOUT} has no action {config.action}", expected="to_hf, from_hf or verify")
    return _sizes(result)
