"""Which checkpoint and which tokenizers are meant, and whether they will do. No torch: a mistake is told at once."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest, latest_checkpoint
from model.errors import UserError


def check_choice(checkpoint: Path | str, **tokenizers: Path | str | None) -> None:
    """Refuses what `load_checkpoint` would refuse after torch is imported, as far as folders and manifests say it.

    `tokenizers` are the folders of `text_tokenizer` and `vision_tokenizer`; None: those that the checkpoint names.
    """
    check_not_published(Path(checkpoint))
    folder = latest_checkpoint(checkpoint)
    manifest = CheckpointManifest.read(folder)
    check_kind(manifest, folder)
    for name, given in tokenizers.items():
        place = tokenizer_folder(manifest, folder, name, given)
        if not place.exists():
            raise UserError(
                f"the {name} {'is not there' if given is not None else 'that the checkpoint names is not there'}",
                where=str(folder),
                expected=str(place),
                fix=f"bring it back, or {name}=FOLDER says where it is now",
            )


def check_not_published(folder: Path) -> None:
    """Refuses a folder in a published layout, which `convert from_hf` turns into a checkpoint."""
    ours = (folder / MANIFEST_NAME).exists()
    if not ours and (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        raise UserError(
            "this is a published checkpoint, not one of ours",
            where=str(folder),
            expected="a stage folder or a checkpoint folder",
            fix=f"nextstate convert from_hf source={folder} target=FOLDER, and then checkpoint=FOLDER",
        )


def check_kind(manifest: CheckpointManifest, folder: Path) -> None:
    if manifest.kind != "transformer":
        raise UserError(
            "this checkpoint cannot generate",
            where=str(folder),
            expected="a checkpoint of kind transformer",
            got=str(manifest.kind),
            fix="name the folder of a pretraining or fine-tuning stage",
        )
    if manifest.model is None:
        raise UserError("the checkpoint's manifest is damaged", where=str(folder), expected="its model")


def tokenizer_folder(manifest: CheckpointManifest, checkpoint: Path, name: str, given: Path | str | None) -> Path:
    """Where a tokenizer is: `given`, inside the checkpoint, or the recorded place below its run folder."""
    if given is not None:
        return Path(given)
    place = manifest.tokenizer_place(name, checkpoint)
    if place is None:
        raise UserError(
            f"the checkpoint does not say which {name} it was trained with", where=str(checkpoint), fix=f"{name}=FOLDER"
        )
    return place


def check_fingerprint(manifest: CheckpointManifest, checkpoint: Path, name: str, fingerprint: str) -> None:
    recorded = manifest.tokenizer(name)
    if recorded is not None and recorded.fingerprint != fingerprint:
        raise UserError(
            f"the {name} is not the one that the checkpoint was trained with",
            where=str(checkpoint),
            expected=f"fingerprint {recorded.fingerprint}",
            got=fingerprint,
            fix=f"{name}=FOLDER of the right one",
        )
