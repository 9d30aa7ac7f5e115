"""`nextstate generate`: pictures and text from prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.report.answers import publish_answer
from model.errors import Problems, UserError
from model.generation.settings import SamplingConfig
from training.inference.prompts import FORMATS, InferenceOptions

HELP = """Generate pictures and text from prompts with a trained checkpoint.

format=t2i draws a caption, format=x2i edits source images by an instruction, format=interleaved continues pictures
and text: there a prompt's source images come before its words. A prompts file holds one prompt a line, or, as
.jsonl, objects with the keys text and images (paths).

examples:
  nextstate generate checkpoint=runs/demo/sft prompt="a red circle at top left" image_size=48 num=4 out=pictures
  nextstate generate checkpoint=runs/demo/sft format=x2i prompt="make the circle blue" images=[scene.png] image_size=48
  nextstate generate checkpoint=runs/demo/sft prompts_file=captions.txt image_size=[48,48] sampling.image.temperature=0"""


@dataclass
class Config:
    checkpoint: str = ""  # a stage folder (its newest checkpoint) or a checkpoint folder
    prompt: str | None = None  # one prompt
    prompts_file: str | None = None  # instead of `prompt`: .txt with one a line, or .jsonl
    format: str = "t2i"  # t2i | x2i | interleaved
    images: list[str] = field(default_factory=list)  # source pictures of `prompt`
    image_size: Any = 0  # pixels: a number for a square, or [height, width]; 0: the model chooses
    num: int = 1  # answers for each prompt
    out: str = "generated"  # folder of the pictures and of generated.json
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    answers: InferenceOptions = field(default_factory=InferenceOptions)
    text_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    vision_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    seed: int = 0  # of the sampling
    json: bool = False  # answer with one JSON object

    def validate(self) -> None:
        problems = Problems()
        problems.check(bool(self.checkpoint), "checkpoint", "is required", "checkpoint=<stage folder>")
        problems.check(
            (self.prompt is None) != (self.prompts_file is None),
            "prompt",
            "give either prompt or prompts_file",
            'prompt="a red circle at top left"',
        )
        problems.check(self.format in FORMATS, "format", f"unknown format {self.format!r}", f"format={FORMATS[0]}")
        problems.check(
            self.format != "x2i" or bool(self.images) or self.prompts_file is not None,
            "images",
            "x2i needs source pictures",
            "images=[scene.png]",
        )
        problems.check(self.num > 0, "num", "must be positive", "num=1")
        problems.check(
            _size(self.image_size) is not None, "image_size", f"not a size: {self.image_size!r}", "image_size=48"
        )
        self.sampling.validate(problems)
        self.answers.validate(problems, "answers")
        problems.raise_if_any()


def run(config: Config) -> dict[str, Any]:
    """Writes `out/NNN_M_K.png` (prompt, answer, picture) and `out/generated.json`, which is the answer."""
    from PIL import Image

    from training.inference.model import InferenceModel

    config.validate()
    questions = read_questions(config)
    prompts = [make_prompt(config, question) for question in questions for _ in range(config.num)]
    model = InferenceModel.load(config.checkpoint, config.text_tokenizer, config.vision_tokenizer, config.answers)
    outputs = model.generate(prompts, config.sampling, config.seed)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    answers = []
    for index, output in enumerate(outputs):
        number, answer = divmod(index, config.num)
        names = [f"{number:03d}_{answer}_{picture}.png" for picture in range(len(output.images))]
        for name, image in zip(names, output.images, strict=True):
            Image.fromarray(image).save(folder / name)
        answers.append(
            questions[number]
            | {"answer": answer, "pictures": names, "text_answer": output.text, "finished": output.finished}
        )
    return publish_answer(folder / "generated.json", {"folder": str(folder), "answers": answers})


def read_questions(config: Config) -> list[dict[str, Any]]:
    """[{"text", "images": paths}] from `prompt` or the prompts file."""
    if config.prompts_file is None:
        return [{"text": config.prompt, "images": list(config.images)}]
    path = Path(config.prompts_file)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the prompts file cannot be read", where=str(path), got=str(error)) from error
    if path.suffix == ".jsonl":
        return [_read_object(path, number, line) for number, line in enumerate(lines, 1)]
    return [{"text": line, "images": list(config.images)} for line in lines]


def _read_object(path: Path, number: int, line: str) -> dict[str, Any]:
    import json

    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError("not a JSON object", where=f"{path}, prompt {number}", got=str(error)) from error
    known = isinstance(values, dict) and isinstance(values.get("text"), str) and set(values) <= {"text", "images"}
    if not known or not isinstance(values.get("images", []), list):
        raise UserError(
            "not a prompt",
            where=f"{path}, prompt {number}",
            expected='{"text": "...", "images": ["path", ...]}',
            got=line[:80],
        )
    return {"text": values["text"], "images": [str(path.parent / name) for name in values.get("images", [])]}


def make_prompt(config: Config, question: dict[str, Any]) -> Any:
    from training.inference.prompts import Prompt

    images = [load_image(Path(name)) for name in question["images"]]
    size = _size(config.image_size)
    assert size is not None, "validated"
    if config.format == "interleaved":
        words = [question["text"]] if question["text"] else []
        return Prompt("interleaved", parts=[*images, *words], image_size=size)
    return Prompt(config.format, question["text"], images, image_size=size)


def load_image(path: Path) -> Any:
    """uint8 [H, W, 3]."""
    from data_pipeline.sources.image import decode_image
    from data_pipeline.sources.samples import SampleError

    try:
        return decode_image(path.read_bytes())
    except (OSError, SampleError) as error:
        raise UserError("a source picture cannot be read", where=str(path), got=str(error)) from error


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) of `image_size`; None when it is not one."""
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    valid = all(isinstance(side, int) and side >= 0 for side in sides) and bool(sides[0]) == bool(sides[1])
    return (sides[0], sides[1]) if valid else None


def render(answer: dict[str, Any]) -> str:
    lines = [f"{len(answer['answers'])} answers in {answer['folder']}"]
    for entry in answer["answers"]:
        shown = ", ".join(entry["pictures"]) or "no picture"
        lines.append(f"  {entry['text']!r}: {shown}" + (f" {entry['text_answer']!r}" if entry["text_answer"] else ""))
    return "\n".join(lines)
