"""Chats of the user's own: lines to samples to documents, exactly as the released templates have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_samples import VOCABULARY as PACKED_VOCABULARY
from packed_samples import text, write_sources
from PIL import Image
from test_document_layout import BUILDER, TOKENIZER, VOCABULARY, check, codes

from data_pipeline.documents.builder import Picture, Text, Thought, Turn, describe
from data_pipeline.documents.prompts import GENERAL, TASKS, label, source_and_task
from data_pipeline.documents.templates import DocumentLayout, LayoutConfig
from data_pipeline.kinds.base import MediaDecoder
from data_pipeline.kinds.registry import KindSet, read_shard
from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.sources.image import ImageConfig
from data_pipeline.sources.samples import BadSample, SampleError
from data_pipeline.storage.segments import TASK_SHIFT, Flag, tasks_of
from data_pipeline.video.keyframes import VideoConfig
from launch.command_line import cli
from training.config import TrainConfig
from training.objectives.next_token import NextToken

KIND = KindSet(["chat"])["chat"]
PNG = b"a picture"
# `configs/` of github.com/baaivision/Emu3.5 at 8fcf1da: what stands before the response, by task, with and without pictures.
RELEASED = {
    "t2i": "<bos> You are a helpful assistant for t2i task. USER: Q ASSISTANT: <bss>",
    "x2i": "<bos> You are a helpful assistant for x2i task. USER: <image 2*2> <image 1*1> Q ASSISTANT: <bss>",
    "howto": "<bos> You are a helpful assistant for howto task. Please generate a response with interleaved text and images. "
    "USER: Q <image 2*2> <image 1*1> ASSISTANT: <bss>",
    "story": "<bos> You are a helpful assistant for story task. USER: Q <image 2*2> <image 1*1> ASSISTANT: <bss>",
    "explore": "<bos> You are a helpful assistant for explore task. USER: Q <image 2*2> <image 1*1> ASSISTANT: <bss>",
    "vla": "<bos> You are a helpful assistant for vla task. USER: Q <image 2*2> <image 1*1> ASSISTANT: <bss>",
}


def image(number: int) -> dict[str, str]:
    return {"type": "image", "image": f"image_{number}.png"}


def words(text: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": text}


def document(metadata: dict, files: list[str], dropout: float = 0.0):
    """The document of a sample whose n-th picture has codes [2, 2] or [1, 1] in turn."""
    sample = KindSet(["chat"]).sample("k", dict.fromkeys(files, PNG) | {"json": json.dumps(metadata).encode()})

    class Shapes:
        def picture(self, data):
            return Picture(np.empty(0))

        def frames(self, data):
            return [Picture(np.empty(0)) for _ in range(3)]

    count = iter(range(99))
    parts = [
        Picture(codes(*((2, 2), (1, 1))[next(count) % 2])) if isinstance(part, Picture) else part
        for part in KIND.prepare(sample, Shapes())
    ]
    layout = DocumentLayout(BUILDER, "chat", LayoutConfig(condition_dropout_probability=dropout), "chats", 0)
    made = layout.build(KIND, "k", parts, sample.metadata)
    check(made)
    return made


def shown(made) -> str:
    return describe(made.tokens, VOCABULARY, TOKENIZER)


def with_loss(made) -> str:
    learnt = np.repeat((made.segments["flags"] & Flag.NO_LOSS) == 0, made.segments["length"])
    return describe(made.tokens[learnt], VOCABULARY, TOKENIZER)


@pytest.mark.parametrize("task", TASKS)
def test_documents_are_those_of_the_released_templates(task):
    pictures = [] if task == "t2i" else [image(0), image(1)]
    answer = [words("the whole", "global_thought"), words("step"), words("one picture", "image_thought"), image(2)]
    messages = [{"role": "user", "content": [words("Q"), *pictures]}, {"role": "assistant", "content": answer}]
    files = ["image_0.png", "image_1.png", "image_2.png"] if pictures else ["image_2.png"]
    made = document({"task": task, "messages": messages}, files)
    response = "<bog> the whole <eog> step <boc> one picture <eoc> <image 2*2> <ess> <eos>"
    assert shown(made) == f"{RELEASED[task]} {response}"
    assert with_loss(made) == response
    sources = [Picture(codes(2, 2)), Picture(codes(1, 1))] if pictures else []
    prompt = BUILDER.chat_prompt(task, "Q", sources)
    assert made.tokens[: len(prompt)].tolist() == prompt
    assert set(tasks_of(made.segments)) == {1 + TASKS.index(task)}


def test_turns_systems_and_videos_of_a_general_chat():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [words("see"), image(0), words("what?")]},
        {"role": "assistant", "content": "a cat", "supervised": False},
        {"role": "user", "content": [{"type": "video", "video": "video_0.mp4"}, words("and here?")]},
        {"role": "assistant", "content": "a dog"},
    ]
    made = document({"messages": messages}, ["image_0.png", "video_0.mp4"])
    assert shown(made) == (
        "<bos> Be brief. USER: see <image 2*2> what? ASSISTANT: <bss> a cat <ess> "
        "USER: <image 1*1> <image 2*2> <image 1*1> and here? ASSISTANT: <bss> a dog <ess> <eos>"
    )
    assert with_loss(made) == "a dog <ess> <eos>"


def test_condition_dropout_leaves_words_out_and_keeps_pictures():
    messages = [
        {"role": "user", "content": [image(0), words("make it blue")]},
        {"role": "assistant", "content": [image(1)]},
        {"role": "user", "content": "and red"},
        {"role": "assistant", "content": [image(2)]},
    ]
    files = [f"image_{number}.png" for number in range(3)]
    made = document({"task": "x2i", "messages": messages}, files, dropout=1.0)
    assert shown(made) == (
        "<bos> You are a helpful assistant. USER: <image 2*2> ASSISTANT: <bss> <image 1*1> <ess> "
        "USER:  ASSISTANT: <bss> <image 2*2> <ess> <eos>"
    )
    prompt = BUILDER.unconditional_prompt([Picture(codes(2, 2))])
    assert made.tokens[: len(prompt)].tolist() == prompt
    assert set(tasks_of(made.segments)) == {2}  # its losses stay its task's


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.booleans(), max_size=3)), min_size=1, max_size=4))
def test_loss_lies_on_supervised_answers_and_nowhere_else(turns):
    """Brute force: the tokens of each answer, one turn after another."""
    made_turns, learnt = [], []
    for number, (supervised, pieces) in enumerate(turns):
        answer = [Thought(f"t{number}") if thought else Text(f"a{number}") for thought in pieces]
        made_turns.append(Turn([Text(f"q{number}")], answer, supervised))
        if supervised:
            for part in answer:
                ids = TOKENIZER.encode(part.text)
                learnt += [VOCABULARY.bog, *ids, VOCABULARY.eog] if isinstance(part, Thought) else ids
            learnt.append(VOCABULARY.ess)
    if turns[-1][0]:
        learnt.append(VOCABULARY.eos)
    made = BUILDER.conversation(7, GENERAL, made_turns)
    has_loss = np.repeat((made.segments["flags"] & Flag.NO_LOSS) == 0, made.segments["length"])
    assert made.tokens[has_loss].tolist() == learnt


GOOD = [{"role": "user", "content": [words("Q"), image(0)]}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("metadata", "files", "reason"),
    [
        ({}, [], "no_messages"),
        ({"messages": []}, [], "no_messages"),
        ({"messages": ["hello"]}, [], "bad_message"),
        ({"messages": [{"role": "user", "content": []}, GOOD[1]]}, [], "bad_message"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, GOOD[1]]}, [], "bad_message"),
        ({"messages": [{"role": "user", "content": [words("x", "global_thought")]}, GOOD[1]]}, [], "bad_message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, [], "unknown_role"),
        ({"messages": GOOD, "task": "paint"}, ["image_0.png"], "unknown_task"),
        ({"messages": GOOD[:1]}, ["image_0.png"], "turns_out_of_order"),
        ({"messages": GOOD[::-1]}, ["image_0.png"], "turns_out_of_order"),
        ({"messages": [{"role": "system", "content": "x"}]}, [], "turns_out_of_order"),
        ({"messages": [GOOD[0], GOOD[1] | {"supervised": False}]}, ["image_0.png"], "no_supervised_turn"),
        ({"messages": [GOOD[0], GOOD[1] | {"supervised": "yes"}]}, ["image_0.png"], "bad_message"),
        ({"messages": GOOD}, [], "missing_media"),
        ({"messages": GOOD}, ["image_0.png", "image_1.png"], "unused_media"),
        ({"messages": [GOOD[0], {"role": "assistant", "content": [image(0)]}]}, ["image_0.png"], "repeated_media"),
    ],
)
def test_bad_chats_have_a_reason(metadata, files, reason):
    parts = dict.fromkeys(files, PNG) | {"json": json.dumps(metadata).encode()}
    with pytest.raises(SampleError) as caught:
        KindSet(["chat"]).sample("k", parts)
    assert caught.value.reason == reason


def test_a_chat_has_no_document_of_pretraining():
    with pytest.raises(SampleError, match="chat_only"):
        DocumentLayout(BUILDER, "pretrain", LayoutConfig(), "s", 0).build(KIND, "k", [Text("a")], {"messages": GOOD})


def test_lines_become_shards_that_the_pipeline_reads(tmp_path: Path, capsys):
    for number in range(2):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "outside.png").write_bytes(b"")
    media = tmp_path / "media"
    media.mkdir()
    for number in range(2):
        (tmp_path / f"{number}.png").rename(media / f"{number}.png")
    lines = [
        {
            "messages": [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": "red"}],
            "images": ["0.png"],
        },
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "task": "story"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "image", "path": "1.png"}, words("Q")]},
                GOOD[1],
            ],
            "images": [{"path": "0.png"}],
        },
        {"messages": [{"role": "user", "content": "<image><image>"}, GOOD[1]], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "Q"}, GOOD[1]], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "<image>"}, GOOD[1]], "images": ["../outside.png"]},
        {"messages": [{"role": "user", "content": "<image>"}, GOOD[1]], "images": ["2.png"]},
        {"messages": [{"role": "judge", "content": "Q"}, GOOD[1]]},
        [],
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n\n")
    call = [
        "chats",
        f"input={tmp_path}/lines.jsonl",
        f"media={media}",
        f"target={tmp_path}/raw",
        "samples_per_shard=2",
        "json=true",
    ]
    assert cli.main(call) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_samples"], answer["num_shards"]) == (3, 2)
    assert answer["rejected"] == {
        "missing_media": 2,
        "unused_media": 1,
        "media_outside": 1,
        "unknown_role": 1,
        "bad_line": 1,
        "no_json": 1,
    }
    rejected = [json.loads(line) for line in (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()]
    assert [one["line"] for one in rejected] == [4, 5, 6, 7, 8, 9, 10]
    samples = [sample for shard in sorted((tmp_path / "raw").glob("*.tar")) for sample in read_shard(shard)]
    assert not [sample for sample in samples if isinstance(sample, BadSample)]
    decoder = MediaDecoder(ImageConfig(), VideoConfig(), 8)
    prepared = [[getattr(part, "text", "picture") for part in KIND.prepare(sample, decoder)] for sample in samples]
    assert prepared == [
        ["", "picture", "what is it?", "red"],
        ["hi", "hello"],
        ["", "picture", "", "picture", "Q", "A"],
    ]
    assert [sample.metadata["task"] for sample in samples] == [GENERAL, "story", GENERAL]
    assert cli.main(call) == 2
    assert "holds shards already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": {"type": "text"}}]},
        {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]},
        {"messages": [{"role": "user", "content": "half a pair: \ud800"}, {"role": "assistant", "content": "x"}]},
        {"images": ["a\0.png"]},
        {"images": ["\ud800.png"]},
        {"images": ["circle.png"]},
    ],
)
def test_whatever_a_line_holds_it_is_rejected_alone(tmp_path: Path, change, capsys):
    (tmp_path / "circle.png").symlink_to("circle.png")
    turns = [
        {"role": "user", "content": "<image>" if "images" in change else "x"},
        {"role": "assistant", "content": "x"},
    ]
    lines = [
        json.dumps({"messages": turns} | change),
        json.dumps({"messages": [turns[1] | {"role": "user"}, turns[1]]}),
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    target = tmp_path / "raw"
    assert (
        cli.main(["chats", f"input={tmp_path}/chats.jsonl", f"media={tmp_path}", f"target={target}", "json=true"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_samples"], sum(answer["rejected"].values())) == (1, 1)


def test_pairs_become_edits(tmp_path: Path, capsys):
    for number in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    lines = [
        {"instruction": "make it blue", "sources": ["0.png"], "target": "1.png"},
        {"sources": [], "target": "1.png"},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    call = ["chats", f"input={tmp_path}/lines.jsonl", f"media={tmp_path}", f"target={tmp_path}/raw", "format=x2i"]
    assert cli.main(call) == 0
    assert "rejected, bad_line: 1" in capsys.readouterr().out
    (sample,) = read_shard(tmp_path / "raw" / "000000.tar")
    made = document(sample.metadata, ["image_0.png", "image_1.png"])
    expected = RELEASED["x2i"].replace(" <image 1*1>", "").replace("Q", "make it blue")
    assert shown(made) == f"{expected} <image 1*1> <ess> <eos>"


def test_losses_are_told_apart_by_task_through_packing(tmp_path: Path):
    """Brute force: the labels of every row, counted by what their document's segments say."""

    def one(length: int, task: int):
        return [(kind, size, task << TASK_SHIFT) for kind, size, _ in text(length, splittable=False)]

    sources = {
        "chats": [one(6 + number % 5, number % 3) for number in range(30)],
        "plain": [text(9, splittable=False)] * 20,
    }
    pack(write_sources(tmp_path / "tokens", sources), tmp_path / "packed", PackConfig(sequence_length=64))
    manifest = json.loads((tmp_path / "packed" / "dataset.json").read_text())
    assert manifest["tasks"] == {
        "chats as t2i": sum(8 + n % 5 for n in range(1, 30, 3)),
        "chats as x2i": sum(8 + n % 5 for n in range(2, 30, 3)),
    }
    weights = {"text": 1.0, "visual": 1.0, "structure": 1.0}
    rows = PackedDataSource(
        {"all": str(tmp_path / "packed")},
        {"all": 1.0},
        seed=0,
        sequence_length=64,
        global_batch_size=1,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        loss_weights=weights,
        document_attention="document",
        vocabulary=PACKED_VOCABULARY,
        prefetch_batches=0,
        stage="sft",
    )
    objective = NextToken(TrainConfig(), NextToken.Options())
    objective.source_names = rows.source_names
    assert rows.source_names == ["chats", "chats as t2i", "chats as x2i", "plain"]
    batches = [batch for sample in range(manifest["num_rows"]) for batch in rows.batch(sample)]
    rows.close()
    totals = objective.totals(batches)
    # A document of n tokens has n - 1 labels; as loss of a label the number of its task.
    counts = {
        "": 20 * 10 + sum(7 + n % 5 for n in range(0, 30, 3)),
        "t2i": sum(7 + n % 5 for n in range(1, 30, 3)),
        "x2i": sum(7 + n % 5 for n in range(2, 30, 3)),
    }
    assert totals[-4:].tolist() == [counts[""] - 200, counts["t2i"], counts["x2i"], 200]
    sums = np.zeros(objective.num_sums)
    sums[-4:] = [0, counts["t2i"], 2 * counts["x2i"], 600]
    metrics = objective.result(totals, sums, 0.0).metrics
    assert metrics["loss_by_task"] == {"t2i": 1.0, "x2i": 2.0}
    assert metrics["loss_by_source"] == pytest.approx(
        {"chats": (counts["t2i"] + 2 * counts["x2i"]) / sum((*counts.values(), -200)), "plain": 3.0}
    )
    assert metrics["tokens_by_source"] == {"chats": sum(counts.values()) - 200, "plain": 200}


def test_labels_name_a_source_and_a_task():
    for task in range(9):
        name = label("my as chats", task)
        assert source_and_task(name)[0] == "my as chats"
    assert label("chats", 2) == "chats as x2i"
    assert source_and_task("known as nobody") == ("known as nobody", "")
