"""`nextstate evaluate`: accuracies of a checkpoint on tasks named by the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.storage.file_errors import check_writable, file_errors_are_user_errors
from launch.report.answers import publish_answer
from model.errors import Problems
from model.generation.decoding_config import STRATEGIES, DecodingConfig
from model.generation.settings import SamplingConfig
from training.inference.choice import check_choice
from training.inference.prompts import ComparisonConfig, InferenceOptions

if TYPE_CHECKING:
    from training.inference.baselines import Baseline
    from training.inference.evaluation import EvaluationModel, EvaluationTask

HELP = """Evaluate a checkpoint on tasks and keep the figures, with samples, as JSON and PNG files.

A task is a class with `prompts()` and `judge()`, named by its dotted path; its other keys are given to the class.
`seen` holds tasks on what training has shown; a baseline is a class with `answers()`, judged by the tasks that it names.

examples:
  nextstate evaluate checkpoint=runs/demo/sft out=runs/demo/evaluation/final.json \\
      tasks.t2i_accuracy.path=examples.shapes_world.tasks.T2IAccuracy tasks.t2i_accuracy.num_prompts=200
  nextstate evaluate evaluation=toy_untrained run_folder=runs/demo   the figure before training
  nextstate evaluate evaluation=toy_dida run_folder=runs/demo decoders=[ar,dida,sjd]   ways to decode images, compared"""

NUM_STRIPS = 3  # rollouts shown of each decoder, and pictures on their way


@dataclass
class Config:
    checkpoint: str = ""  # a stage folder (its newest checkpoint) or a checkpoint folder
    run_folder: str = "."  # base of `checkpoint` and `out`
    out: str = "evaluation/final.json"  # the figures; pictures go to `samples/NAME` beside it
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {path: package.Class, ...}
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same tasks on what training has shown
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {path: package.Class, tasks: [...]}
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_temperatures: dict[str, float] = field(default_factory=dict)  # task -> in place of sampling.image.temperature
    as_trained: bool = True  # where `sampling` sets a length at most, draw as reinforcement learning drew its answers
    answers: InferenceOptions = field(default_factory=InferenceOptions)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    decoders: list[str] = field(default_factory=list)  # strategies to compare, instead of `decoding.strategy` alone
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)  # of `decoders`
    rollouts: dict[str, Any] = field(default_factory=dict)  # of decoders: {path: CLASS, ...}; accuracy after each step
    untrained: bool = False  # fresh weights of the checkpoint's model instead of its own
    text_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    vision_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    seed: int = 0  # of the sampling
    batch_size: int = 256  # prompts answered at a time
    num_samples: int = 12  # answers of each task kept as pictures
    json: bool = False  # answer with one JSON object

    def validate(self) -> None:
        problems = Problems()
        problems.check(bool(self.checkpoint), "checkpoint", "is required", "checkpoint=<stage folder>")
        problems.check(
            bool(self.tasks), "tasks", "there is nothing to evaluate", "tasks.NAME.path=package.module.Class"
        )
        for key, entries in (("tasks", self.tasks), ("seen", self.seen), ("baselines", self.baselines)):
            for name, entry in entries.items():
                problems.check("path" in entry, f"{key}.{name}.path", "is required", f"{key}.{name}.path=package.Class")
                count = entry.get("num_prompts", 1)
                fine = isinstance(count, int) and count > 0
                problems.check(fine, f"{key}.{name}.num_prompts", f"must be positive, got {count}", "leave it out")
        for name, entry in self.baselines.items():
            unknown = [task for task in entry.get("tasks", []) if task not in self.tasks]
            problems.check(not unknown, f"baselines.{name}.tasks", f"there is no task {', '.join(map(str, unknown))}")
        problems.check(
            not self.rollouts or bool(self.rollouts.get("path")),
            "rollouts.path",
            "is required",
            "rollouts.path=package.Class, or rollouts={} for none",
        )
        problems.check(self.batch_size > 0, "batch_size", "must be positive")
        problems.check(self.num_samples >= 0, "num_samples", "must not be negative", "num_samples=0")
        for name, temperature in self.image_temperatures.items():
            key = f"image_temperatures.{name}"
            problems.check(name in self.tasks, key, f"there is no task {name}; tasks are {', '.join(self.tasks)}")
            problems.check(temperature >= 0, key, "must not be negative", f"{key}=0")
        problems.check(
            not (self.decoders and self.image_temperatures),
            "image_temperatures",
            "decoders are compared at one temperature",
            "sampling.image.temperature=0 image_temperatures={}",
        )
        self.sampling.validate(problems)
        self.answers.validate(problems, "answers")
        self.decoding.validate(problems, "decoding")
        self.comparison.validate(problems, "comparison")
        for name in self.decoders:
            problems.check(
                name in STRATEGIES, "decoders", f"unknown decoder {name!r}", f"decoders=[{','.join(STRATEGIES)}]"
            )
        problems.check(
            not self.decoders or "ar" in self.decoders, "decoders", "are compared with ar", "decoders=[ar,dida]"
        )
        problems.raise_if_any()

    def own_sampling(self) -> dict[str, SamplingConfig]:
        """Of the tasks with a temperature of their own: some have one right answer, others many."""
        image = self.sampling.image
        return {
            task: replace(self.sampling, image=replace(image, temperature=temperature))
            for task, temperature in self.image_temperatures.items()
        }


def run(config: Config) -> dict[str, Any]:
    """The answer: `metrics` by task, `num_prompts` (of the task with the fewest), details by task, samples.

    `seen` has the accuracy of each task on what training has shown; `baselines` what other answers reach.
    """
    config.validate()
    base = Path(config.run_folder)
    check_choice(
        base / config.checkpoint, text_tokenizer=config.text_tokenizer, vision_tokenizer=config.vision_tokenizer
    )
    tasks, seen, baselines = load_tasks(config.tasks), load_tasks(config.seen), load_baselines(config.baselines)
    rollouts = load_rollouts(config.rollouts)
    out = base / config.out
    check_writable(out.parent)
    from training.inference.model import InferenceModel

    model = InferenceModel.load(
        base / config.checkpoint,
        config.text_tokenizer,
        config.vision_tokenizer,
        config.answers,
        untrained=config.untrained,
    )
    if config.as_trained:
        config = replace(config, sampling=model.sampling_as_trained(config.sampling))
    with file_errors_are_user_errors(out.parent):
        if config.decoders:
            return publish_answer(out, compared(config, model, tasks, rollouts, base))
        return publish_answer(out, judged(config, model, tasks, seen, baselines))


def judged(
    config: Config,
    model: Any,
    tasks: dict[str, EvaluationTask],
    seen: dict[str, EvaluationTask],
    baselines: dict[str, Baseline],
) -> dict[str, Any]:
    """The answer without `decoders`."""
    from training.inference.evaluation import evaluate

    base = Path(config.run_folder)
    out = base / config.out
    model.decode_with(config.decoding)
    samples_folder = out.parent / "samples" / out.stem
    ask = partial(
        evaluate,
        model,
        sampling=config.sampling,
        own_sampling=config.own_sampling(),
        batch_size=config.batch_size,
        seed=config.seed,
    )
    results = ask(tasks, samples_folder=samples_folder, num_samples=config.num_samples)
    known = {
        name: {key: result[key] for key in ("accuracy", "count", "interval")} for name, result in ask(seen).items()
    }
    return {
        "checkpoint": str(base / config.checkpoint),
        "untrained": config.untrained,
        "metrics": {name: result["accuracy"] for name, result in results.items()},
        "num_prompts": min(result["count"] for result in results.values()),
        "samples": _below(out.parent, samples_folder, results),
        "tasks": results,
        "seen": known,
        "baselines": measure_baselines(config, tasks, baselines, model),
    }


def load_tasks(entries: dict[str, dict[str, Any]]) -> dict[str, EvaluationTask]:
    from training.inference.evaluation import load_task

    return {
        name: load_task(task["path"], {key: value for key, value in task.items() if key != "path"})
        for name, task in entries.items()
    }


def load_baselines(entries: dict[str, dict[str, Any]]) -> dict[str, Baseline]:
    from training.inference.baselines import load_baseline

    own_keys = ("path", "tasks", "num_prompts")
    return {
        name: load_baseline(
            entry["path"], {key: value for key, value in entry.items() if key not in own_keys}, f"baselines.{name}"
        )
        for name, entry in entries.items()
    }


def load_rollouts(entry: dict[str, Any]) -> Any:
    """The task that `rollouts` names, None where it names none."""
    return load_tasks({"rollouts": entry})["rollouts"] if entry else None


def measure_baselines(
    config: Config, tasks: dict[str, EvaluationTask], baselines: dict[str, Baseline], model: EvaluationModel
) -> dict[str, dict[str, Any]]:
    """task -> name -> accuracy and count, on the first `num_prompts` prompts of the task (all where it is not given)."""
    from training.inference.baselines import accuracy_of
    from training.inference.evaluation import EvaluationPrompt, pictures_of

    def asking(task: str) -> Callable[[Sequence[EvaluationPrompt]], list[Any]]:
        sampling = config.own_sampling().get(task, config.sampling)
        return lambda prompts: pictures_of(model, prompts, sampling, config.batch_size, config.seed)

    found: dict[str, dict[str, Any]] = {}
    for name, entry in config.baselines.items():
        for task in entry.get("tasks", []):
            prompts = list(tasks[task].prompts())[: entry.get("num_prompts")]
            found.setdefault(task, {})[name] = accuracy_of(baselines[name], tasks[task], prompts, asking(task))
    return found


def compared(config: Config, model: Any, tasks: dict[str, Any], rollouts: Any, base: Path) -> dict[str, Any]:
    """The answer for `decoders`: each one's figures, and its accuracies once more as metrics `DECODER_TASK`."""
    from training.inference.decoders import compare_decoders

    found = compare_decoders(
        model,
        tasks,
        config.sampling,
        {name: replace(config.decoding, strategy=name) for name in config.decoders},
        config.comparison,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    if rollouts is not None:
        for name, one in found.items():
            model.decode_with(replace(config.decoding, strategy=name))
            one["rollout"] = rolled_out(config, model, rollouts, base / config.out, name)
    if "dida" in found:
        model.decode_with(replace(config.decoding, strategy="dida"))
        found["dida"]["refinement"] = refined(config, model, tasks, base / config.out)
    accuracies = {f"{name}_{task}": value for name, one in found.items() for task, value in one["accuracies"].items()}
    return {
        "checkpoint": str(base / config.checkpoint),
        "untrained": config.untrained,
        "metrics": accuracies,
        "dida_steps": config.decoding.dida.steps,
        "decoders": found,
    }


def rolled_out(config: Config, model: Any, task: Any, out: Path, name: str) -> dict[str, Any]:
    """`accuracy_by_step`, and the frames of some rollouts as strips, whose names are relative to the answer's folder."""
    from training.inference.world_rollouts import accuracy_by_step, roll_out

    rollouts = task.rollouts()
    frames = roll_out(model, rollouts, config.sampling, config.seed)
    strips = save_strips(frames[:NUM_STRIPS], out, f"rollout_{name}")
    return {"accuracy_by_step": accuracy_by_step(rollouts, frames), "strips": strips}


def refined(config: Config, model: Any, tasks: dict[str, Any], out: Path) -> list[str]:
    """Strips of some pictures before each step and in the end, sampled as those of the statistics are."""
    from training.inference.decoders import statistics_prompts
    from training.inference.refinement import refine

    temperature = config.comparison.statistics_temperature
    sampling = replace(config.sampling, image=replace(config.sampling.image, temperature=temperature))
    return save_strips(refine(model, statistics_prompts(tasks, NUM_STRIPS), sampling, config.seed), out, "refined")


def save_strips(frames: Sequence[Sequence[Any]], out: Path, name: str) -> list[str]:
    """Pictures beside one another, a file for each list of them; names relative to the folder of the answer `out`."""
    from PIL import Image

    from training.inference.world_rollouts import strip

    folder = out.parent / "samples" / out.stem
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}_{number}.png" for number in range(len(frames))]
    for own, file in zip(frames, files, strict=True):
        Image.fromarray(strip(own)).save(file)
    return [str(file.relative_to(out.parent)) for file in files]


def _below(folder: Path, samples_folder: Path, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All tasks' samples, taken out of `results`, with file names relative to `folder`."""
    prefix = samples_folder.relative_to(folder)
    samples = [sample for result in results.values() for sample in result.pop("samples")]
    for sample in samples:
        for key in ("prompt_images", "images", "wanted_images"):
            sample[key] = [str(prefix / name) for name in sample[key]]
    return samples


def _right(decoder: dict[str, Any]) -> str:
    """A decoder's accuracies and how far they are from ar's on the same prompts; ar's own alone."""
    told = {task: f"{task} {value:.3f}" for task, value in decoder["accuracies"].items()}
    for task, difference in decoder.get("difference_from_ar", {}).items():
        between = ", 95% {:+.3f} to {:+.3f}".format(*difference["interval"]) if difference["interval"] else ""
        told[task] += f" (to ar {difference['mean']:+.3f}{between})"
    return ", ".join(told.values())


def render(answer: dict[str, Any]) -> str:
    lines = [f"checkpoint: {answer['checkpoint']}" + (" (fresh weights)" if answer["untrained"] else "")]
    for name, one in answer.get("decoders", {}).items():
        lines.append(
            f"{name}: {_right(one)}; joint {one['joint']:.3f}, entropy ratio {one['entropy_ratio']:.3f}, "
            f"{one['num_forwards']:.1f} forward passes and {one['seconds']:.3f} s an answer"
        )
    for name, task in answer.get("tasks", {}).items():
        # A mean of graded scores is no proportion and has no such interval.
        interval = " (95% {:.3f} to {:.3f})".format(*task["interval"]) if task["interval"] else ""
        lines.append(f"{name}: {task['accuracy']:.3f}{interval} of {task['count']}, {task['seconds']:.1f} s")
        if name in answer["seen"]:
            lines.append("  seen in training: {accuracy:.3f} of {count}".format(**answer["seen"][name]))
        for baseline, figures in answer["baselines"].get(name, {}).items():
            lines.append(f"  {baseline.replace('_', ' ')}: {figures['accuracy']:.3f} of {figures['count']}")
    return "\n".join(lines)
