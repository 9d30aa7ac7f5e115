"""Scorers that judge real pictures: text read by RapidOCR, edits by SSIM, a CLIP model, a model behind a server."""

from __future__ import annotations

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from examples.shapes_world.scenes import scenes_wanted
from examples.shapes_world.world import Item, draw_array, make_scene
from model.errors import UserError
from training.rewards.base import Answer, scores_of
from training.rewards.calls import CallError
from training.rewards.ocr import likeness, overlap
from training.rewards.pixels import looks
from training.rewards.registry import make_reward
from training.rewards.vlm import mark_in


def written(*lines: tuple[str, int, int], size: int = 96) -> np.ndarray:
    """Each (text, left, top) in black on white."""
    picture = Image.new("RGB", (size, size), "white")
    for text, left, top in lines:
        ImageDraw.Draw(picture).text((left, top), text, fill="black", font=ImageFont.load_default(24))
    return np.asarray(picture)


def score(name: str, *answers: Answer, **options) -> list[float | None]:
    return scores_of(make_reward(name, options, "x"), answers).values


def test_text_is_read_and_text_too_much_costs():
    hello, more = written(("HELLO", 4, 8)), written(("HELLO", 4, 8), ("THERE", 4, 56))
    answers = [Answer("t2i", images=[picture], fields={"text": "HEL LO"}) for picture in (hello, more, None)]
    answers += [Answer("t2i", fields={"text": "HELLO"}), Answer("t2i", images=[hello])]
    right, spam, no_grid, nothing, unasked = score("text_rendering", *answers)
    assert right == 1.0
    assert spam == 0.5  # a reward by containment would give it all
    assert (no_grid, nothing, unasked) == (0.0, 0.0, None)
    boxes = [{"text": "HELLO", "box": [0.1, 0.03, 0.4, 0.9]}]
    there = Answer("t2i", images=[hello], fields={"text_boxes": boxes})
    elsewhere = Answer("t2i", images=[written(("HELLO", 4, 60))], fields={"text_boxes": boxes})
    twice = Answer("t2i", images=[more], fields={"text_boxes": boxes})
    placed, moved, crowded = score("text_layout", there, elsewhere, twice)
    assert placed > 0.6
    assert moved == 0.0
    assert crowded == pytest.approx(placed / 2, abs=0.1)


def test_one_line_is_read_without_looking_for_lines():
    hello, more = written(("HELLO", 4, 8)), written(("HELLO", 4, 8), ("THERE", 4, 56))
    line = Answer("t2i", images=[hello[4:40]], fields={"text": "HELLO"})
    assert score("text_rendering", line, one_line=True) == [1.0]
    both = Answer("t2i", images=[more], fields={"text": "HELLO THERE"})
    assert score("text_rendering", both) == [1.0]  # the reader that both share looks for lines again
    assert (
        make_reward("text_rendering", {}, "x").version != make_reward("text_rendering", {"one_line": True}, "x").version
    )


def test_likeness_is_symmetric():
    assert likeness("kitten", "sitting") == likeness("sitting", "kitten") == pytest.approx(1 - 3 / 7)
    assert (likeness("", ""), likeness("a", ""), likeness("Ａ ｂ", "Ab")) == (1.0, 0.0, 1.0)
    assert overlap((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0.0


def test_edits_change_what_was_asked_and_nothing_else():
    source, target = (
        draw_array((Item("cross", "red", 0, 0), Item("circle", color, 2, 2)), 48) for color in ("blue", "red")
    )
    moved = draw_array((Item("cross", "red", 0, 1), Item("circle", "red", 2, 2)), 48)
    noise = np.random.default_rng(0).integers(0, 256, source.shape, np.uint8)
    coded = np.clip(target + np.random.default_rng(1).normal(0, 3, source.shape), 0, 255).astype(np.uint8)
    box = {"edit_boxes": [[2 / 3, 2 / 3, 1, 1]]}
    shown = (target, coded, source, moved, noise, None)
    asked = [Answer("x2i", prompt_images=[source], images=[picture], fields=box) for picture in shown]
    right, decoded, copied, spoiled, other, none = score("edit_fidelity", *asked)
    assert right > 0.5
    assert decoded > 0.6 * right
    assert copied == pytest.approx(0.0, abs=1e-6)
    assert spoiled < 0.9 * right
    assert other < 0.2
    assert none == 0.0
    larger = np.asarray(Image.fromarray(target).resize((96, 96), Image.Resampling.BICUBIC))
    assert score("edit_fidelity", Answer("x2i", "", [source], [larger], fields=box))[0] > 0.9 * right
    assert score(
        "edit_fidelity", Answer("x2i", images=[target], fields=box), Answer("x2i", "", [source], [target])
    ) == [None, None]


def test_the_next_state_keeps_its_things():
    first, wandered = ([Item("cross", "red", row, 0), Item("circle", "blue", 2, 2)] for row in (0, 1))
    lost, new = wandered[:1], [*wandered, Item("square", "green", 0, 2)]
    before = draw_array(make_scene(first), 48)
    answers = [
        Answer(
            "explore",
            prompt_images=[before],
            images=[draw_array(make_scene(scene), 48)],
            fields=scenes_wanted([wandered]),
        )
        for scene in (wandered, lost, new, first)
    ]
    reader = "examples.shapes_world.scenes.ShapesReader"
    assert score("permanence", *answers, reader=reader) == pytest.approx([1, 2 / 3, 4 / 5, 1])
    assert score("scene", *answers, reader=reader) == pytest.approx([1, 2 / 3, 4 / 5, 1 / 2])
    assert score("permanence", Answer("explore", images=[before]), reader=reader) == [None]


def test_looks_prefer_color_and_contrast():
    grey, scene = np.full((48, 48, 3), 128, np.uint8), draw_array((Item("cross", "red", 1, 1),), 48)
    assert looks(grey) == 0.0
    assert 0.2 < looks(scene) <= 1.0
    assert score("rule_aesthetic", Answer("t2i", images=[scene]), Answer("t2i")) == [looks(scene), 0.0]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights, saved as published ones are."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": len(vocabulary) - 1}
    text |= {"bos_token_id": len(vocabulary) - 2, "pad_token_id": len(vocabulary) - 1}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)  # a cosine near 0 would have no relative accuracy
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    preparation = {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


def test_clip_scores_are_those_of_transformers(clip_folder):
    import torch
    from transformers import AutoTokenizer, CLIPModel

    pictures = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8) for seed in range(3)]
    answers = [
        Answer("t2i", "a red cross", images=pictures[:1]),
        Answer("t2i", "a longer caption, which is cut where the model's positions end", images=pictures[1:]),
        Answer("t2i", "a", images=[None]),
    ]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    expected = []
    for answer in answers[:2]:
        tokens = tokenizer([answer.prompt], truncation=True, return_tensors="pt")
        pixels = torch.tensor(np.stack(answer.images)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            logits = model(**tokens, pixel_values=(pixels - 0.5) / 0.25).logits_per_text
        expected.append(float(logits.mean()))
    scale = model.logit_scale.exp().item()
    options = {"folder": str(clip_folder), "batch_size": 2}
    assert score("clip_preference", *answers, **options) == pytest.approx([*expected, -scale], rel=1e-4)
    assert score("clip_similarity", *answers, **options) == pytest.approx(
        [*(one / scale for one in expected), -1], rel=1e-4
    )


def test_a_folder_without_a_clip_model_is_refused(tmp_path, clip_folder):
    with pytest.raises(UserError, match="the CLIP model cannot be loaded"):
        make_reward("clip_similarity", {"folder": str(tmp_path)}, "x")
    (tmp_path / "preprocessor_config.json").write_text((clip_folder / "preprocessor_config.json").read_text())
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never opened")
    with pytest.raises(UserError, match="the CLIP model cannot be loaded"):
        make_reward("clip_similarity", {"folder": str(tmp_path)}, "x")


class ChatServer(BaseHTTPRequestHandler):
    """A chat completions server: its mark is the number of pictures it was shown. What is said first fails once."""

    seen: list[dict] = []  # noqa: RUF012
    replies: list[bytes] = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body | {"authorization": self.headers["Authorization"]})
        content = body["messages"][0]["content"]
        mark = sum(part["type"] == "image_url" for part in content)
        said = {"choices": [{"message": {"content": f'Sure. {{"score": {mark}}}'}}]}
        data = self.replies.pop(0) if self.replies else json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_model_behind_a_server_marks_answers(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), ChatServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("secret\n")
    picture = written(("A", 8, 8))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    options = {"url": url, "model": "judge", "token_file": str(tmp_path / "token"), "limits": {"backoff_seconds": 0.01}}
    judge = make_reward("vlm_judge", options, "x")
    ChatServer.replies[:] = [b'{"choices": []}']
    answers = [Answer("x2i", "add {braces}", [picture], [picture, None], "done"), Answer("t2i", "nothing came")]
    try:
        assert judge.score(answers) == [2.0, 1.0]
        assert dict(judge.faults) == {"reply without a mark": 1}
        ChatServer.replies[:] = [b"{}"] * 3
        assert judge.score(answers[:1]) == [None]
    finally:
        server.shutdown()
        server.server_close()
    first = ChatServer.seen[0]
    assert (first["authorization"], first["model"], first["temperature"]) == ("Bearer secret", "judge", 0)
    assert "add {braces}" in first["messages"][0]["content"][-1]["text"]
    judge.policy = dataclasses.replace(judge.policy, deadline_seconds=0.3)
    assert judge.score(answers[:1]) == [None]  # nobody is there any more


@pytest.mark.parametrize("text", ["", "7", '{"score": "7"}', '{"score": 11}', '{"score": NaN}', '{"score": true}'])
def test_a_reply_without_a_mark_is_no_mark(text):
    with pytest.raises(CallError):
        mark_in({"choices": [{"message": {"content": text}}]})
