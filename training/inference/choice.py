"""Which checkpoint and which tokenizers are meant, and whether they will do. No torch: a mistake is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.documents.tokenizers import load_text_tokenizer, read_description, sole_tokenizer_file
from model.checkpoint.checksums import size_damage
from model.checkpoint.manifest import FIX, MANIFEST_NAME, CheckpointManifest, latest_checkpoint
from model.conversion.hugging_face import model_config
from model.errors import UserError
from model.generation.decoding_config import TRAINED_WITH, not_trained_for
from model.vision_tokenizer.config import check_checkpoint_kind


def check_choice(
    checkpoint: Path | str,
    strategy: str = "ar",
    sizes: Sequence[tuple[int, int] | str] = (),
    **tokenizers: Path | str | None,
) -> None:
    """Refuses what `load_checkpoint` would refuse after torch is imported, as far as folders and manifests say it.

    `strategy`: that images are decoded with; `sizes`: of pictures, (height, width) in pixels, 0 where the model chooses, or a ratio.
    `tokenizers` are the folders of `text_tokenizer` and `vision_tokenizer`; None: those that the checkpoint names.
    """
    check_not_published(Path(checkpoint))
    folder = latest_checkpoint(checkpoint)
    manifest = CheckpointManifest.read(folder)
    check_kind(manifest, folder)
    check_sizes(manifest, folder)
    for name, given in tokenizers.items():
        place = tokenizer_folder(manifest, folder, name, given)
        if not place.exists():
            raise UserError(
                f"the {name} {'is not there' if given is not None else 'that the checkpoint names is not there'}",
                where=str(folder),
                expected=str(place),
                fix=f"bring it back, or {name}=FOLDER says where it is now",
            )
        LOOKED_AT[name](place)
    objective = TRAINED_WITH.get(strategy)
    if objective is not None and manifest.values.get(objective) is None:
        raise not_trained_for(strategy, objective)
    if sizes:
        check_pixels(tokenizer_folder(manifest, folder, "vision_tokenizer", tokenizers.get("vision_tokenizer")), sizes)


def check_pixels(vision_tokenizer: Path, sizes: Sequence[tuple[int, int] | str]) -> None:
    """A ratio always finds a size."""
    model = CheckpointManifest.read(latest_checkpoint(vision_tokenizer)).model
    if not (model and isinstance(model.get("ch_mult"), list)):
        return  # loading it says what is wrong
    for size in sizes:
        if not isinstance(size, str):
            check_whole_tokens(*size, 2 ** (len(model["ch_mult"]) - 1))


def check_whole_tokens(height: int, width: int, factor: int) -> None:
    if height % factor or width % factor:
        raise UserError(
            "the image size is not a whole number of visual tokens",
            expected=f"multiples of {factor} pixels",
            got=f"{height} x {width}",
            fix=f"image_size={max(1, round(height / factor)) * factor}",
        )


def check_text_tokenizer(place: Path) -> None:
    """Reads no tokenizer: a large one takes a second."""
    if place.is_dir() and read_description(place) is None and sole_tokenizer_file(place) is None:
        load_text_tokenizer(place)  # says what is wrong


def check_vision_tokenizer(place: Path) -> None:
    checkpoint = latest_checkpoint(place)
    check_checkpoint_kind(CheckpointManifest.read(checkpoint).kind, checkpoint)


LOOKED_AT = {"text_tokenizer": check_text_tokenizer, "vision_tokenizer": check_vision_tokenizer}


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
    model_config(manifest.model, str(folder))


def check_sizes(manifest: CheckpointManifest, folder: Path) -> None:
    """Of the checkpoint's files; whoever reads them looks at their checksums too."""
    for name, file in manifest.values.get("files", {}).items():
        damage = size_damage(folder / name, file["bytes"])
        if damage:
            raise UserError("a file of the checkpoint is damaged", where=str(folder / name), got=damage, fix=FIX)


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
