"""`nextstate generate` with a model without a network: files, films, the trace, presets, refusals."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from toy_inference import TEXT_SIZE, TEXTS, GrayTokenizer, toy_model

from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from launch.commands import generate
from launch.composition.compose import compose_config
from launch.generation.sizes import PUBLISHED_AREA, PUBLISHED_GRIDS, grid_of_ratio, pixels_of, read_size
from model.errors import UserError
from model.generation.settings import PhaseSampling, SamplingConfig
from training.inference.loading import load_checkpoint
from training.inference.model import InferenceModel
from training.inference.prompts import InferenceOptions


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXTS, folder, TEXT_SIZE)
    return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())


@pytest.fixture
def toy(tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a picture `scene.png`; whatever checkpoint is named, a toy is loaded."""
    monkeypatch.setattr(
        InferenceModel, "load", lambda checkpoint, text, vision, options: toy_model(tokenizer, **vars(options))
    )
    monkeypatch.setattr(generate, "check_choice", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(GrayTokenizer().decode(np.arange(6).reshape(1, 2, 3))[0]).save("scene.png")
    return tmp_path


def settings(**values: Any) -> generate.Config:
    config = generate.Config(checkpoint="somewhere", **values)
    config.sampling.max_new_tokens = 40
    return config


def test_pictures_trace_and_seeds(toy: Path) -> None:
    answer = generate.run(settings(prompt="a red circle", image_size=[16, 24], num=2))
    assert [entry["pictures"] for entry in answer["answers"]] == [["000_0_0.png"], ["000_1_0.png"]]
    assert json.loads(Path("generated/generated.json").read_text()) == answer
    assert "000_1_0.png" in generate.render(answer)
    trace = json.loads(Path("generated/trace.json").read_text())
    first, second = trace["answers"]
    assert first["asked"]["text"] == "a red circle"
    assert (first["seed"], first["index"], second["index"]) == (0, 0, 1)
    assert first["ids"] != second["ids"]
    assert len(first["ids"]) == 13  # BOI 2 * 3 IMG, 3 codes EOL 3 codes, EOI
    assert (
        first["forwards"] == 1 + 1 + 5
    )  # the prompt, the header, the codes but the last with what is forced behind them
    assert trace["settings"]["sampling"]["max_new_tokens"] == 40
    # Any answer alone, by its number.
    generate.run(settings(prompt="a red circle", image_size=[16, 24], first_index=1, out="again"))
    assert json.loads(Path("again/trace.json").read_text())["answers"][0]["ids"] == second["ids"]
    assert Path("again/000_0_0.png").read_bytes() == Path("generated/000_1_0.png").read_bytes()


def test_a_policy_answers_in_the_mode_that_it_was_trained_in(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = InferenceModel.load("somewhere", None, None, InferenceOptions())
    trained = SamplingConfig(guidance_scale=3.0, image=PhaseSampling(temperature=0.5), max_new_tokens=7)
    model.rollout = {"sampling": asdict(trained)}
    monkeypatch.setattr(InferenceModel, "load", lambda *_: model)

    def sampling_of(config: generate.Config) -> dict[str, Any]:
        generate.run(config)
        return json.loads(Path("generated/trace.json").read_text())["settings"]["sampling"]

    asked: dict[str, Any] = {"prompt": "a red circle", "image_size": [16, 24]}
    assert sampling_of(settings(**asked)) == asdict(trained) | {"max_new_tokens": 40}
    assert sampling_of(settings(**asked, as_trained=False)) == asdict(SamplingConfig(max_new_tokens=40))
    greedy = settings(**asked)
    greedy.sampling.image.temperature = 0.0
    assert sampling_of(greedy)["guidance_scale"] == 1.0


def test_a_rollout_is_a_strip_and_a_film(toy: Path) -> None:
    Path("asked.jsonl").write_text(
        '{"parts": [{"image": "scene.png"}, {"text": "it moves"}], "states": 3, "words": ["up", "up", "up"]}\n\n'
        '{"text": "make it blue", "images": ["scene.png", "scene.png"], "format": "x2i", "image_size": "3:2"}\n'
    )
    config = settings(prompts_file="asked.jsonl", format="interleaved", image_area=6 * 64, frames_per_second=4)
    rollout, edit = generate.run(config)["answers"]
    assert rollout["pictures"] == [f"000_0_{number}.png" for number in range(3)]
    assert [part.get("text", "picture") for part in rollout["parts"]] == ["up", "picture"] * 3
    assert np.asarray(Image.open("generated/000_0_strip.png")).shape == (16, 4 * 24 + 3 * 2, 3)
    with av.open(io.BytesIO(Path("generated/000_0.mp4").read_bytes())) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 4
    for name, frame in zip(["scene.png", *(f"generated/{name}" for name in rollout["pictures"])], frames, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(Image.open(name)).astype(int)).mean() < 4
    assert np.asarray(Image.open("generated/001_0_0.png")).shape == (16, 24, 3)
    assert edit["images"] == ["scene.png", "scene.png"]


def test_what_is_new_is_told_as_it_comes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(parts=[{"image": "scene.png"}, {"text": "and"}], format="story", stream=True, image_size="3:2")
    config.image_area, config.sampling.max_new_tokens = 6 * 64, 80
    answer = generate.run(config)["answers"][0]
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(event.get("text", "") for event in told) == answer["text_answer"]
    rows = [event for event in told if "codes" in event]
    assert [event["row"] for event in rows] == [0, 1] * len(answer["pictures"])
    assert all(len(event["codes"]) == 3 for event in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either prompt or prompts_file"),
        ({"prompt": "a", "prompts_file": "b"}, "either prompt or prompts_file"),
        ({"prompt": "a", "image_size": "big"}, "not a size"),
        ({"prompt": "a", "image_size": [48, 0]}, "not a size"),
        ({"prompt": "a", "image_size": [12, 8]}, "not a whole number of visual tokens"),
        ({"prompt": "a", "image_size": 8000}, "outside of what the model is asked for"),
        ({"prompt": "a", "image_size": 480}, "leaves no room for a picture of this size"),
        ({"prompt": "word " * 3000, "image_size": 16}, "leaves no room"),
        ({"prompt": "a", "format": "t3i"}, "unknown format 't3i'"),
        ({"prompt": "a", "format": "x2i"}, "x2i needs source pictures"),
        ({"prompt": "a", "images": ["scene.png"]}, "t2i draws from words alone"),
        ({"prompt": "a", "states": 2}, "a world rollout continues frames and words"),
        ({"prompt": "a", "format": "interleaved", "words": ["up"]}, "words are said before the states"),
        ({"parts": [{"picture": "a"}]}, "not a list of texts and images"),
        ({"prompts_file": "nowhere.txt"}, "cannot be read"),
        ({"prompts_file": "empty.txt"}, "holds no prompt"),
        ({"prompts_file": "broken.jsonl"}, "not a JSON object"),
        ({"prompts_file": "deep.jsonl"}, "not a JSON object"),
        ({"prompts_file": "odd.jsonl"}, "unknown key 'txt'"),
        ({"prompts_file": "half.jsonl"}, "not Unicode"),
        ({"prompt": "\ud800"}, "not Unicode"),
        ({"prompt": "a", "format": "x2i", "images": ["a\0.png"]}, "source picture cannot be read"),
        ({"prompts_file": "states.jsonl"}, "a value of states that does not fit"),
        ({"prompt": "a", "format": "x2i", "images": ["broken.jsonl"]}, "source picture cannot be read"),
        ({"prompt": "a", "format": "x2i", "images": ["bomb.png"]}, "image_too_large"),
        ({"prompt": "a", "format": "x2i", "images": ["cut.png"]}, "corrupt_image"),
    ],
)
def test_refusals(values: dict[str, Any], message: str, toy: Path) -> None:
    Path("empty.txt").write_text("\n")
    Path("broken.jsonl").write_text("{text")
    Path("deep.jsonl").write_text("[" * 100_000)
    Path("odd.jsonl").write_text('{"txt": "a"}')
    Path("states.jsonl").write_text('{"text": "a", "states": true}')
    Path("half.jsonl").write_text('{"parts": [{"text": "\\ud800"}], "format": "interleaved"}')
    whole = Path("scene.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("bomb.png").write_bytes(claims(60_000, 60_000, whole))
    with pytest.raises(UserError, match=message):
        generate.run(settings(**values))


def claims(width: int, height: int, png: bytes) -> bytes:
    """A PNG whose header says another size than it has."""
    import zlib

    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def test_a_published_folder_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match="nextstate convert from_hf"):
        load_checkpoint(tmp_path)


# configs/ of github.com/baaivision/Emu3.5: guidance, max_new_tokens, area, text (k, p, T), image (k, p, T).
PUBLISHED = {
    "t2i": (5.0, 5120, 1048576, (1024, 0.9, 1.0), (5120, 1.0, 1.0)),
    "x2i": (3.0, 5120, 1048576, (1024, 0.9, 1.0), (5120, 1.0, 1.0)),
    "howto": (3.0, 32768, 518400, (200, 0.8, 0.7), (10240, 1.0, 1.0)),
    "story": (3.0, 32768, 518400, (1024, 0.9, 1.0), (10240, 1.0, 1.0)),
    "explore": (3.0, 32768, 518400, (200, 0.5, 0.7), (5120, 1.0, 1.0)),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_presets_are_the_published_settings(task: str) -> None:
    config = compose_config("generate", ["checkpoint=c", "prompt=p", f"preset=emu35_{task}"])
    sampling = config.sampling
    phases = [(phase.top_k, phase.top_p, phase.temperature) for phase in (sampling.text, sampling.image)]
    found = (sampling.guidance_scale, sampling.max_new_tokens, config.image_area, *phases)
    assert found == PUBLISHED[task]
    assert config.format == task
    if task == "t2i":
        assert pixels_of(read_size(config.image_size), config.image_area, 16) == (55 * 16, 73 * 16)


@pytest.mark.parametrize("wrong", ["generate preset=emu35_t3i", "serve preset=emu35_t3i", "evaluate evaluation=toyy"])
def test_a_preset_that_does_not_exist_is_refused(wrong: str) -> None:
    command, override = wrong.split()
    with pytest.raises(UserError, match=r"there is no (preset|evaluation) named"):
        compose_config(command, ["checkpoint=c", override])


def test_ratios_have_the_published_grids() -> None:
    for ratio, grid in PUBLISHED_GRIDS.items():
        size = read_size(ratio)
        assert size is not None
        assert pixels_of(size, PUBLISHED_AREA, 16) == (grid[0] * 16, grid[1] * 16)
        if ratio not in ("16:9", "9:16"):  # 48 x 85 would be nearer; the released table has 47 x 85
            assert grid_of_ratio(ratio, 4096) == grid
    assert read_size("auto") == (0, 0)
    assert pixels_of("21:9", 384, 8) == (8, 24)  # 6 tokens
    assert all(read_size(odd) is None for odd in ("0:1", "1:", [1], [8, 0], -1, 1.5, True and "x", [True, True]))
