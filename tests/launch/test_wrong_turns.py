"""Wrong turns that would have been quiet, or told after hours: refused in one message, and nothing is started or written."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from handmade_checkpoints import publish_manifest
from hypothesis import given
from hypothesis import strategies as st
from tiny_stage import make_config, write_packed

from launch.cluster.scheduling import limit_seconds
from launch.command_line import cli
from launch.plan import places
from launch.plan.places import host
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vocabulary import Vocabulary

STAGE = [
    "stage=toy_pretrain_1",
    "stage.sequence_length=64",
    "parallel.tensor=1",
    "stage.data.datasets.text.path=WORLD/packed",
    "stage.data.datasets.interleaved.weight=0",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "model.head_dim=16",
    "model.vocabulary.text_size=64",
    "model.vocabulary.visual_size=64",
]
TRAIN = ["train", *STAGE]
SUBMIT = ["submit", "cluster=slurm", "cluster.num_accelerators=8", *STAGE]
JOB = ["submit", "cluster=slurm"]
TOKENIZE = ["tokenize", "input=WORLD/shards/*.tar", "text_tokenizer=WORLD/packed"]
GENERATE = [
    "generate",
    "checkpoint=WORLD/start",
    "prompt=x",
    "text_tokenizer=WORLD/text",
    "vision_tokenizer=WORLD/vision",
]
SERVE = ["serve", *[text for text in GENERATE[1:] if not text.startswith("prompt")]]
CHAIN = ["curriculum", "curriculum=demo"]
CONVERT = ["convert", "to_hf", "source=WORLD/start", "layout=emu35", "target=TARGET/x"]

# name: the command, what the message says
TURNS = {
    "an endless rate": ([*TRAIN, "stage.optimizer.learning_rate=inf"], "learning_rate: must be a finite number"),
    "an endless weight of the loss": ([*TRAIN, "stage.objective.loss_weights.text=inf"], "must be a finite number"),
    "weights that are all alike": ([*TRAIN, "model.init_std=0"], "model.init_std: must be positive"),
    "a negative spread": ([*TRAIN, "model.init_std=-1"], "model.init_std: must be positive"),
    "no rotation": ([*TRAIN, "model.rope_theta=0"], "model.rope_theta: must be positive"),
    "a norm of nothing": ([*TRAIN, "model.rms_norm_eps=0"], "model.rms_norm_eps: must be positive"),
    "nothing is read": ([*TRAIN, "stage.data.datasets.text.weight=0"], "every weight is 0 from step 0 on"),
    "nothing is read later": (
        [*TRAIN, *(f"stage.data.weight_changes.a.{key}" for key in ("from_step=50", "weights.text=0"))],
        "every weight is 0 from step 50 on",
    ),
    "weights that never change": (
        [*TRAIN, *(f"stage.data.weight_changes.a.{key}" for key in ("from_step=100", "weights.text=2"))],
        "100 is behind the stage's last step (99)",
    ),
    "a start of other sizes": (
        [*TRAIN, "stage.initialize_from=WORLD/start", "model.num_layers=3"],
        "a model of other sizes: model.num_layers: 2 -> 3",
    ),
    "a start of another vocabulary": (
        [*TRAIN, "stage.initialize_from=WORLD/other"],
        "model.vocabulary.visual_size: 128 -> 64",
    ),
    "the same rows twice": (
        [*TRAIN, "stage.data.datasets.again.path=WORLD/packed"],
        "stage.data.datasets.text and .again hold the same rows",
    ),
    "held out and trained on": ([*TRAIN, "stage.validation.v=WORLD/packed"], "stage.validation.v holds the rows of"),
    "held-out token files": ([*TRAIN, "stage.validation.v=WORLD/tokens"], "no finished packed dataset"),
    "too many epochs": (
        [*TRAIN, "stage.data.datasets.text.max_epochs=0.5"],
        "a dataset would be read more often than is allowed",
    ),
    "adapters of nothing": ([*TRAIN, "model.adapter.rank=4"], "model.adapter.rank=4 freezes all other weights"),
    "adapters wider than the layers": ([*TRAIN, "model.adapter.rank=64"], "64 is more than the layers are wide (32)"),
    "a scale of no adapters": ([*TRAIN, "model.adapter.alpha=32"], "has no effect without model.adapter.rank"),
    "a limit shorter than its warning": ([*SUBMIT, "cluster.time_limit=5"], "5 is over before the job may start"),
    "ranks that share accelerators": ([*SUBMIT, "cluster.tasks_per_node=16"], "would share 8 accelerators"),
    "no amount of memory": ([*SUBMIT, "cluster.memory=lots"], "'lots' is no amount of memory"),
    "an option that the script writes": ([*SUBMIT, "cluster.options.nodes=4"], "written by the script itself"),
    "one rank for all": ([*SUBMIT, "cluster.environment.RANK=0"], "for each rank another value"),
    "no interpreter": ([*SUBMIT, "cluster.python=/no/python"], "cluster.python=/no/python is not there"),
    "no image": (
        [*SUBMIT, "cluster.container=apptainer", "cluster.container_image=no.sif"],
        "cluster.container_image=no.sif is not there",
    ),
    "nothing to mount": (
        [*SUBMIT, "cluster.container=pyxis", "cluster.container_image=a", "cluster.container_mounts=[/no:/a]"],
        "cluster.container_mounts=/no is not there",
    ),
    "a job of no checkpoint": (
        [*JOB, "command=generate", 'arguments=["checkpoint=no","prompt=x"]'],
        "no complete checkpoint found",
    ),
    "a job of a wrong value": ([*JOB, "command=pack", 'arguments=["max_similarity=inf"]'], "must be a finite number"),
    "a job of no tokens": ([*JOB, "command=pack", 'arguments=["tokens.a=no","target=x"]'], "tokens.a=no"),
    "a job of no shards": (
        [*JOB, "command=tokenize", 'arguments=["input=no.tar","target=x","text_tokenizer=t"]'],
        "no.tar",
    ),
    "a job that submits": ([*JOB, "command=submit"], "a job that submits a job"),
    "a job on more than a node": ([*JOB, "command=report", "num_accelerators=9"], "one node, which has 8, got 9"),
    "a chain of other sizes": ([*CHAIN, "set.sft.model.num_layers=2"], "sft begins with the weights of pretrain_2"),
    "a chain of other rows": ([*CHAIN, "set.pack_sft.sequence_length=300"], "pack_sft packs it in rows of 300"),
    "tokens among their shards": ([*TOKENIZE, "target=WORLD/shards"], "the target is a folder of the shards"),
    "speech of no engine": ([*TOKENIZE, "target=TARGET/x", "asr.threads=4"], "asr.threads: has no effect without"),
    "one folder under two names": (
        ["pack", "tokens.a=WORLD/tokens", "tokens.b=WORLD/shards/../tokens", "target=TARGET/x"],
        "is that of b too",
    ),
    "half a visual token": ([*GENERATE, "image_size=47", "out=TARGET/x"], "multiples of 8 pixels"),
    "a server of half a visual token": ([*SERVE, "image_size=47"], "multiples of 8 pixels"),
    "an untrained strategy": ([*GENERATE, "decoding.strategy=verified"], "not trained for decoding.strategy=verified"),
    "a server of an untrained strategy": (
        [*SERVE, "decoding.strategy=diagonal"],
        "a stage with the objective diagonal",
    ),
    "steps of another strategy": ([*GENERATE, "decoding.dida.steps=4"], "decoding.dida: has no effect with"),
    "only causal steps": (
        [*GENERATE, "decoding.strategy=dida", "decoding.dida.steps=4", "decoding.dida.causal_steps=4"],
        "decoding.dida.causal_steps: must be at least 0 and below decoding.dida.steps=4",
    ),
    "plausible codes in no step": (
        [*SERVE, "decoding.strategy=dida", "decoding.dida.plausible=0.5"],
        "decoding.dida.plausible: has no effect with decoding.dida.causal_steps=0",
    ),
    "a window of another strategy": ([*SERVE, "decoding.window=4"], "decoding.window: has no effect with"),
    "a task of no prompts": (
        ["evaluate", "checkpoint=WORLD/start", "run_folder=.", "tasks={a: {path: a.B, num_prompts: 0}}"],
        "tasks.a.num_prompts: must be positive, got 0",
    ),
    "ranks of an export": ([*CONVERT, "tensor=2"], "tensor: has no effect with to_hf"),
    "tensors that an export ignores": ([*CONVERT, "ignore=[a]"], "ignore: has no effect with to_hf"),
    "another model for an export": ([*CONVERT, "model=toy"], "model: has no effect with to_hf"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Packed rows; manifests of a transformer, of one with another vocabulary, and of a vision tokenizer; a shard."""
    folder = tmp_path_factory.mktemp("world")
    model = make_config(folder, write_packed(folder)).model
    vocabulary = Vocabulary.from_config(model.vocabulary).describe()
    others = {"start": vocabulary, "other": vocabulary | {"visual_size": 128}}
    manifests = {
        name: {"kind": "transformer", "model": asdict(model), "vocabulary": said} for name, said in others.items()
    }
    manifests["vision"] = {"kind": "vision_tokenizer", "model": asdict(VisionTokenizerConfig(ch_mult=[1, 1, 1, 1]))}
    for name, manifest in manifests.items():
        (folder / name).mkdir()
        publish_manifest(folder / name, {"format_version": 1, "keys": {}} | manifest)
    for name in ("shards/0.tar", "text/tokenizer.model"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", TURNS)
def test_a_wrong_turn_is_told_before_anything_starts(name, world, tmp_path, capsys, monkeypatch):
    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(places, "this_machine", lambda: host(16e9, 4))
    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("launch.local.ranks.run_local", started)
    call, message = TURNS[name]
    words = [word.replace("WORLD", str(world)).replace("TARGET", str(tmp_path)) for word in call]
    own = [f"run_folder={tmp_path / 'run'}"] if call[0] in ("train", "submit", "curriculum") else []
    assert cli.main([*words, *own, "json=true"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]
    assert list(tmp_path.iterdir()) == []


def test_what_the_wrong_turns_are_wrong_turns_of_is_right(world, tmp_path, monkeypatch):
    """Without the one wrong key each command goes on, so that it is that key which is refused."""

    class StartedError(Exception):
        pass

    def started(*_: object, **__: object) -> None:
        raise StartedError

    monkeypatch.setattr(places, "this_machine", lambda: host(16e9, 4))
    monkeypatch.setattr("launch.local.ranks.run_local", started)
    monkeypatch.setattr("launch.cluster.submission.submit", started)
    for call in (TRAIN, [*TRAIN, "stage.initialize_from=WORLD/start", "model.adapter.rank=4"], SUBMIT):
        words = [word.replace("WORLD", str(world)) for word in call]
        with pytest.raises(StartedError):
            cli.main([*words, f"run_folder={tmp_path / 'run'}"])


@given(st.integers(0, 40), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_time_limits_are_read_as_slurm_reads_them(days, hours, minutes, seconds):
    whole = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert limit_seconds(f"{days}-{hours}:{minutes:02}:{seconds:02}") == whole
    assert limit_seconds(f"{days * 24 + hours}:{minutes:02}:{seconds:02}") == whole
    assert limit_seconds(f"{whole // 60}:{seconds:02}") == whole
    assert limit_seconds(f"{whole // 60}") == whole - seconds
    assert limit_seconds(f"{days}-{hours}") == whole - minutes * 60 - seconds
    assert limit_seconds("UNLIMITED") == limit_seconds("soon") == float("inf")
