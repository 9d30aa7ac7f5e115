"""What `nextstate convert` does: options to actions, tokenizers beside the weights, the certificate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import check_writable
from launch.conversion.certificate import certify_written, verify
from launch.conversion.options import ConvertConfig
from model.checkpoint.manifest import CheckpointManifest, latest_checkpoint
from model.conversion import actions, low_rank, surgery, vision
from model.conversion.actions import Options, Outcome
from model.conversion.hugging_face import model_config
from model.conversion.mappings import VISION_LAYOUT
from model.conversion.record import RECORD_FOLDER
from model.conversion.sources import listed
from model.conversion.writer import Result, Written, refuse_existing
from model.errors import UserError
from model.vocabulary import Vocabulary

TOKENIZER_FOLDER = "text_tokenizer"
# Beside a tokenizer's own file: its description (ours), settings and the list of visual tokens (released).
TOKENIZER_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "emu3_vision_tokens.txt")

Extra = Callable[[Path, Written], None]


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Run the configured action; the command's answer."""
    if config.action == "verify":
        return verify(config)
    if config.layout is None and config.vision_tokenizer is not None:
        config.layout = VISION_LAYOUT
    source, target = Path(config.source or "."), Path(config.target or ".")
    refuse_existing(target)
    check_writable(target.absolute().parent)
    answer: dict[str, Any] = {"action": config.action, "target": str(target), "layout": config.layout}
    if config.layout == VISION_LAYOUT:
        return answer | convert_vision(config, source, target)
    extras = Extras(config, source)
    options = read_options(config, extras)
    if config.action == "init":
        assert config.model is not None, "validated"
        outcome = actions.initialize(target, config.model, options)
    elif config.action == "from_hf":
        options = replace(options, text_tokenizer=extras.bind_tokenizer())
        outcome = actions.from_published(source, target, config.model, config.layout, options)
    elif config.action == "to_hf":
        outcome = actions.to_published(source, target, config.layout or "", options)
    elif config.action in ("reshard", "merge"):
        inside = latest_checkpoint(source) / TOKENIZER_FOLDER
        extras.tokenizer = inside if os.path.lexists(inside) else None
        rewrite = low_rank.merge if config.action == "merge" else actions.reshard
        outcome = rewrite(source, target, options)
    elif config.action == "to_peft":
        outcome = low_rank.to_peft(source, target, options)
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
        self.tokenizer: Path | None = None  # that goes into a checkpoint

    def __call__(self, folder: Path, written: Written) -> None:
        if self.config.layout != VISION_LAYOUT:
            if self.config.action == "to_hf":
                self._export_tokenizer(folder)
            elif self.tokenizer is not None:
                copy_tokenizer(self.tokenizer, folder / TOKENIZER_FOLDER)
        if self.config.verify == "none" and written.non_finite:
            self.notes.append(f"weights that are not finite: {listed(written.non_finite)}")
        if self.config.action not in ("init", "merge") and self.config.verify != "none":
            self.answer["parity"] = certify_written(self.config, self.source, folder, written)

    def bind_tokenizer(self) -> dict[str, Any] | None:
        """Find and load the tokenizer that goes into the checkpoint: what the manifest will say of it, None without one."""
        kept = self.source / RECORD_FOLDER / TOKENIZER_FOLDER
        given = self.config.text_tokenizer
        if given is None and not os.path.lexists(kept):
            return None
        from data_pipeline.documents.tokenizers import load_text_tokenizer

        self.tokenizer = Path(given) if given is not None else kept
        tokenizer_files(self.tokenizer)
        tokenizer = load_text_tokenizer(self.tokenizer)
        return {"path": TOKENIZER_FOLDER, "fingerprint": tokenizer.fingerprint, "size": tokenizer.size}

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
        copy_tokenizer(place, folder / RECORD_FOLDER / TOKENIZER_FOLDER)
        self.answer["text_tokenizer"] = exported


def copy_tokenizer(place: Path, target: Path) -> None:
    """The files that the tokenizer consists of, and no others (a released folder has programs beside them)."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in tokenizer_files(place):
        # The library's own file may have any name; in a folder it is known by this one.
        name = "tokenizer.json" if path.suffix == ".json" and not place.is_dir() else path.name
        shutil.copyfile(path, target / name, follow_symlinks=False)


def tokenizer_files(place: Path) -> list[Path]:
    """Refuses links: what they lead to may be any file of this machine."""
    from data_pipeline.documents.tokenizer_export import tokenizer_file

    if not place.exists():
        raise UserError("the text tokenizer does not exist", where=str(place))
    own = tokenizer_file(place)
    beside = [own.with_name(name) for name in TOKENIZER_COMPANIONS] if place.is_dir() else []
    files = [own, *(path for path in beside if path != own and os.path.lexists(path))]
    for path in (place, *files):
        if path.is_symlink():
            raise UserError(
                "the text tokenizer holds a symbolic link",
                where=str(path),
                expected="files and folders",
                got=f"a link to {os.readlink(path)}",
                fix="name a copy without links (cp -rL), if you know where they lead",
            )
    return files


def find_text_tokenizer(manifest: CheckpointManifest, checkpoint: Path, given: str | None) -> Path | None:
    """Where the checkpoint's text tokenizer is; None when it records none or it is gone."""
    if given is not None:
        if not Path(given).exists():
            raise UserError("the text tokenizer does not exist", where=given)
        return Path(given)
    place = manifest.tokenizer_place(TOKENIZER_FOLDER, checkpoint)
    return place if place is not None and place.exists() else None


def convert_vision(config: ConvertConfig, source: Path, target: Path) -> dict[str, Any]:
    extras = Extras(config, source)
    options = read_options(config, extras)
    if config.action == "to_hf":
        result = vision.to_published(source, target, options)
    elif config.action == "from_hf":
        result = vision.from_published(source, target, config.vision_tokenizer, options)
    else:
        raise UserError(f"layout={VISION_LAYOUT} has no action {config.action}", expected="to_hf, from_hf or verify")
    return _sizes(result) | {"notes": extras.notes} | extras.answer
