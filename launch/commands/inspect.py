"""`nextstate inspect`: what is in a shard, a token file, a packed file, a checkpoint, or a model preset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.config import ModelConfig
from model.errors import Problems, UserError

HELP = """Show what is in a raw shard, a token file, a packed file, a checkpoint, or a model preset.

What is cut or damaged is named, and the command then ends with 2.

examples:
  nextstate inspect runs/demo/corpora/shapes_image_text/000000.tar
  nextstate inspect runs/demo/tokens/low/shapes_video text_tokenizer=runs/demo/text_tokenizer
  nextstate inspect runs/demo/packed/pretrain_1/image_text
  nextstate inspect runs/demo/sft
  nextstate inspect runs/demo                          what there is to inspect below it
  nextstate inspect model=emu35_34b json=true
  nextstate inspect runs/demo/packed/sft/all text_tokenizer=runs/demo/text_tokenizer contains="a red circle"
  nextstate inspect runs/demo/packed/sft/all text_tokenizer=runs/demo/text_tokenizer overlap=prompts.txt
  nextstate inspect runs/demo/packed/sft/all page=rows.html first=100 num_samples=20 \\
      text_tokenizer=runs/demo/text_tokenizer vision_tokenizer=runs/demo/vision_tokenizer
  nextstate inspect checkpoint=Qwen3-32B model=emu35_34b   a published checkpoint, and where it does not fit"""

POSITIONAL = "path"


@dataclass
class Config:
    path: str | None = None  # a file or folder; exclusive with model and checkpoint
    checkpoint: str | None = None  # a checkpoint, ours or a published one; with model: compared with it
    model: ModelConfig | None = None  # a preset, chosen as model=NAME
    num_samples: int = 3  # samples that are shown in full
    text_tokenizer: str | None = None  # folder of the text tokenizer, to read the text of token files
    contains: str | None = None  # look for the documents that hold this text; with text_tokenizer
    document: int | None = None  # look for the document with this id
    overlap: str | None = None  # a file of prompts: look for those whose words stand in a document; with text_tokenizer
    overlap_words: int = 13  # as many in a row count as an overlap; all of a shorter prompt
    page: str | None = None  # write num_samples rows, or documents, as an HTML page to this file; with text_tokenizer
    first: int = 0  # row that the page begins with
    vision_tokenizer: str | None = None  # folder of the vision tokenizer: thumbnails of the pictures on the page
    json: bool = False  # print one JSON object on stdout

    def validate(self) -> None:
        problems = Problems()
        given = [self.path is not None, self.checkpoint is not None or self.model is not None]
        problems.check(given.count(True) == 1, "path", "give a path or a model, one of them", "nextstate inspect PATH")
        asked = [value is not None for value in (self.contains, self.document, self.overlap, self.page)]
        problems.check(not any(asked) or self.path is not None, "path", "is needed to look into documents")
        problems.check(asked.count(True) <= 1, "contains", "give one of contains, document, overlap and page")
        problems.check(self.contains != "", "contains", "must not be empty")
        reads = any(value is not None for value in (self.contains, self.overlap, self.page))
        problems.check(self.first >= 0, "first", "must not be negative", "first=0")
        problems.check(not reads or bool(self.text_tokenizer), "text_tokenizer", "is needed to read the text")
        problems.check(self.overlap_words > 0, "overlap_words", "must be positive", "overlap_words=13")
        problems.check(self.num_samples >= 0, "num_samples", "must not be negative", "num_samples=3")
        if self.model is not None:
            self.model.validate(problems)
        problems.raise_if_any()


@file_errors_are_user_errors("what is inspected")
def run(config: Config) -> dict[str, Any]:
    from launch.inspection.contents import inspect_any_checkpoint, inspect_model, inspect_path

    if config.checkpoint is not None:
        return inspect_any_checkpoint(Path(config.checkpoint), config.model, config.num_samples)
    if config.model is not None:
        return inspect_model(config.model)
    tokenizer = Path(config.text_tokenizer) if config.text_tokenizer else None
    path = Path(config.path or "")
    if all(value is None for value in (config.contains, config.document, config.overlap, config.page)):
        return inspect_path(path, config.num_samples, tokenizer)
    return look_for(config, path, tokenizer)


def look_for(config: Config, path: Path, tokenizer_path: Path | None) -> dict[str, Any]:
    from launch.inspection.contents import find_prefixes
    from launch.inspection.provenance import find_documents, find_overlap

    prefixes = find_prefixes(path)
    if not prefixes:
        raise UserError("there are no token or packed files", where=str(path))
    tokenizer = None
    if tokenizer_path:
        from data_pipeline.documents.tokenizers import load_text_tokenizer

        tokenizer = load_text_tokenizer(tokenizer_path)
    if config.page is not None:
        return show_rows(config, prefixes, tokenizer)
    if config.overlap is None:
        return find_documents(prefixes, tokenizer, config.contains, config.document)
    assert tokenizer is not None, "see validate"
    return find_overlap(prefixes, tokenizer, Path(config.overlap), config.overlap_words)


def show_rows(config: Config, prefixes: list[Path], tokenizer: Any) -> dict[str, Any]:
    from launch.inspection.row_page import write_rows

    vision = None
    if config.vision_tokenizer is not None:
        from model.vision_tokenizer import load_vision_tokenizer

        vision = load_vision_tokenizer(config.vision_tokenizer)
    return write_rows(prefixes, config.first, config.num_samples, Path(str(config.page)), tokenizer, vision)


def render(answer: dict[str, Any]) -> str:
    lines = []
    for key, value in answer.items():
        if key == "inspect_one_of":
            lines += [f"nextstate inspect {answer['path']}/{path}   {kind}" for path, kind in value.items()]
        elif key == "damaged":
            lines += [f"damaged: {one}" for one in value]
        elif key == "samples":
            lines += [f"sample {number}:\n{indented(one)}" for number, one in enumerate(value)]
        elif isinstance(value, dict):
            inner = ", ".join(
                f"{name} {count:,}" if isinstance(count, int) else f"{name} {count}" for name, count in value.items()
            )
            lines.append(f"{key + ':':<20} {inner}")
        elif value is not None:
            lines.append(f"{key + ':':<20} {value:,}" if isinstance(value, int) else f"{key + ':':<20} {value}")
    return "\n".join(lines)


def indented(sample: Any) -> str:
    if isinstance(sample, dict):
        sample = "\n".join(
            f"{name}: {inner}"
            for key, value in sample.items()
            for name, inner in (value.items() if isinstance(value, dict) else [(key, value)])
        )
    return "\n".join("  " + line for line in str(sample).splitlines())
