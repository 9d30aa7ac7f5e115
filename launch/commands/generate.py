"""`nextstate generate`: pictures and text from prompts, and world rollouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import check_writable, file_errors_are_user_errors
from launch.generation.questions import Question, are_parts, check_question, read_questions
from launch.generation.sizes import PUBLISHED_AREA, read_size
from launch.report.answers import publish_answer
from model.errors import Problems
from model.generation.decoding_config import DecodingConfig
from model.generation.settings import SamplingConfig
from training.inference.choice import check_choice
from training.inference.prompts import FORMATS, InferenceOptions

HELP = """Generate pictures and text from prompts with a trained checkpoint, and roll worlds on.

format=t2i draws a caption, format=x2i edits source images by an instruction; howto, story, explore and vla are answered
with text and pictures (answers.max_images bounds them); format=interleaved continues pictures and text: there a prompt's
source images come before its words, or parts=[...] gives both in order. states=N rolls a world on by N states, with
words=[...] said before them, and writes a strip and a film. preset=NAME has the published settings of a task.
A prompts file holds one prompt a line, or, as .jsonl, objects with the keys text and images (paths), or parts, and what
differs of format, image_size, states and words. trace.json says how each answer came about.

examples:
  nextstate generate checkpoint=runs/demo/sft prompt="a red circle at top left" image_size=48 num=4 out=pictures
  nextstate generate checkpoint=runs/demo/sft format=x2i prompt="make the circle blue" images=[scene.png] image_size=48
  nextstate generate checkpoint=runs/demo/sft prompts_file=captions.txt image_size=[48,48] sampling.image.temperature=0
  nextstate generate checkpoint=runs/demo/sft format=interleaved images=[scene.png] states=8 words=["it moves right"]
  nextstate generate checkpoint=runs/emu35/sft_2 preset=emu35_t2i prompt="a lighthouse at dusk" image_size="16:9"
  nextstate generate checkpoint=runs/emu35/sft_2 preset=emu35_howto prompt="How do I fold a crane?" stream=true"""


@dataclass
class Config:
    checkpoint: str = ""  # a stage folder (its newest checkpoint) or a checkpoint folder
    prompt: str | None = None  # one prompt
    parts: list[Any] = field(default_factory=list)  # text and pictures in order: [{image: a.png}, {text: it moves}]
    prompts_file: str | None = None  # instead of `prompt`: .txt with one a line, or .jsonl
    format: str = "t2i"  # t2i | x2i | interleaved | howto | story | explore | vla
    images: list[str] = field(default_factory=list)  # source pictures of `prompt`
    image_size: Any = 0  # pixels: of a square, [height, width], or "width:height" of `image_area`; 0: the model chooses
    image_area: int = PUBLISHED_AREA  # pixels of a picture whose size is given as a ratio
    states: int = 0  # next states of a world rollout; 0: none
    words: list[str] = field(default_factory=list)  # of a rollout: said before its first states
    frames_per_second: int = 2  # of a rollout's film
    num: int = 1  # answers for each prompt
    out: str = "generated"  # folder of the pictures, of generated.json and of trace.json
    stream: bool = False  # tell text and finished rows as they come: a JSON object a line
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    as_trained: bool = True  # where `sampling` sets a length at most, draw as reinforcement learning drew its answers
    answers: InferenceOptions = field(default_factory=InferenceOptions)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)  # how pictures are decoded
    text_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    vision_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    seed: int = 0  # of the sampling
    first_index: int = 0  # number of the first answer: (seed, number) decides its draws
    json: bool = False  # answer with one JSON object

    def validate(self) -> None:
        problems = Problems()
        problems.check(bool(self.checkpoint), "checkpoint", "is required", "checkpoint=<stage folder>")
        given = [self.prompt is not None or bool(self.parts), self.prompts_file is not None]
        problems.check(
            sum(given) == 1, "prompt", "give either prompt or prompts_file", 'prompt="a red circle at top left"'
        )
        problems.check(not (self.parts and self.prompt is not None), "parts", "stand in place of prompt")
        problems.check(not (self.parts and self.images), "parts", "stand in place of images too")
        problems.check(
            are_parts(self.parts), "parts", f"not a list of texts and images: {self.parts}", "parts=[{text: hello}]"
        )
        problems.check(self.format in FORMATS, "format", f"unknown format {self.format!r}", f"format={FORMATS[0]}")
        problems.check(
            read_size(self.image_size) is not None, "image_size", f"not a size: {self.image_size!r}", "image_size=48"
        )
        for name in ("num", "image_area", "frames_per_second"):
            problems.check(getattr(self, name) > 0, name, "must be positive", f"{name}=1")
        problems.check(self.states >= 0, "states", "must not be negative", "states=8")
        problems.check(0 <= self.first_index < 1 << 31, "first_index", "must be in [0, 2**31)", "first_index=0")
        self.sampling.validate(problems)
        self.answers.validate(problems, "answers")
        self.decoding.validate(problems, "decoding")
        self.decoding.validate_read(problems, "decoding")
        problems.raise_if_any()


def run(config: Config) -> dict[str, Any]:
    """Writes `out/NNN_M_K.png` (prompt, answer, picture), `out/generated.json`, which is the answer, and `trace.json`."""
    config.validate()
    questions = questions_of(config)
    check_choice(
        config.checkpoint,
        config.decoding.strategy,
        [question.image_size for question in questions],
        text_tokenizer=config.text_tokenizer,
        vision_tokenizer=config.vision_tokenizer,
    )
    check_writable(Path(config.out))
    prompts = prompts_of(questions)
    from launch.generation.sizes import pixels_of
    from training.inference.answering import answer_all
    from training.inference.model import InferenceModel

    model = InferenceModel.load(config.checkpoint, config.text_tokenizer, config.vision_tokenizer, config.answers)
    model.decode_with(config.decoding)
    if config.as_trained:
        config = replace(config, sampling=model.sampling_as_trained(config.sampling))
    for question, prompt in zip(questions, prompts, strict=True):
        prompt.image_size = pixels_of(question.image_size, config.image_area, model.vision_tokenizer.factor)
    answerings = begin_all(config, model, questions, prompts)
    answer_all(
        model, answerings, config.sampling, config.seed, _streamed(config, answerings) if config.stream else None
    )
    with file_errors_are_user_errors(config.out):
        return write_answers(config, model, questions, prompts, answerings)


def questions_of(config: Config) -> list[Question]:
    size = read_size(config.image_size)
    assert size is not None, "validated"
    base = Question(
        config.prompt or "",
        list(config.images),
        [dict(part) for part in config.parts],
        config.format,
        size,
        config.states,
        list(config.words),
    )
    if config.prompts_file is not None:
        return read_questions(Path(config.prompts_file), base)
    check_question(base)
    return [base]


def prompts_of(questions: list[Question]) -> list[Any]:
    from launch.generation.questions import prompt_of

    return [prompt_of(question) for question in questions]


def begin_all(config: Config, model: Any, questions: list[Question], prompts: list[Any]) -> list[Any]:
    """`num` answers under way for each question, in order."""
    from training.inference.answering import begin, begin_rollouts

    found = []
    for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        draws = [config.first_index + index * config.num + answer for answer in range(config.num)]
        copies = [prompt] * config.num
        if question.states:
            found += begin_rollouts(model, copies, config.sampling, draws, question.states, question.words)
        else:
            found += begin(model, copies, config.sampling, draws)
    return found


def write_answers(
    config: Config, model: Any, questions: list[Question], prompts: list[Any], answerings: list[Any]
) -> dict[str, Any]:
    from launch.generation.files import save_answer, trace_of

    folder = Path(config.out)
    answers, traces = [], []
    publish_answer(folder / "generated.json", {"folder": str(folder), "answers": []})  # the former ones are replaced
    for index, one in enumerate(answerings):
        number, answer = divmod(index, config.num)
        question, prompt = questions[number], prompts[number]
        shown = [part for part in (*prompt.parts, *prompt.images) if not isinstance(part, str)]
        written = save_answer(model, one, folder, f"{number:03d}_{answer}", shown, config.frames_per_second)
        asked = asdict(question) | {"pixels": list(prompt.image_size)}
        entry = {"text": question.text, "images": question.images, "answer": answer} | written
        answers.append(entry | {"text_answer": one.text, "finished": one.finished})
        traces.append({"asked": asked, "answer": answer} | written | trace_of(one, config.seed))
    settings = {"sampling": asdict(config.sampling), "answers": asdict(config.answers)}
    settings["decoding"] = asdict(config.decoding)
    trace = {"checkpoint": model.checkpoint or config.checkpoint, "settings": settings, "answers": traces}
    publish_answer(folder / "trace.json", trace)
    return publish_answer(folder / "generated.json", {"folder": str(folder), "answers": answers})


def _streamed(config: Config, answerings: list[Any]) -> Any:
    """A watch that writes what is new as a JSON object a line: {"prompt", "answer", "text"} or {..., "row", "codes"}."""
    import json

    from training.inference.observing import Refined, TextPiece

    places = {id(one): divmod(index, config.num) for index, one in enumerate(answerings)}

    def tell(one: Any, event: Any) -> None:
        prompt, answer = places[id(one)]
        told: dict[str, Any] = {"prompt": prompt, "answer": answer}
        if isinstance(event, TextPiece):
            told["text"] = event.text
        elif isinstance(event, Refined):
            told |= {"picture": len(one.pictures), "step": event.step, "steps": event.num_steps}
            told["codes"] = event.codes.tolist()
        else:
            told |= {"picture": len(one.pictures), "row": len(event.codes) - 1, "grid": list(event.grid)}
            told["codes"] = event.codes[-1].tolist()
        print(json.dumps(told, ensure_ascii=False), flush=True)

    return tell


def render(answer: dict[str, Any]) -> str:
    lines = [f"{len(answer['answers'])} answers in {answer['folder']}"]
    for entry in answer["answers"]:
        shown = ", ".join([*entry["pictures"], *(entry[key] for key in ("strip", "movie") if key in entry)])
        text = f" {entry['text_answer']!r}" if entry["text_answer"] else ""
        cut = "" if entry["finished"] else " (cut short by its length limit)"
        lines.append(f"  {entry['text']!r}: {shown or 'no picture'}{text}{cut}")
    return "\n".join(lines)
