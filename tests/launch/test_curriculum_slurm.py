"""A small curriculum as a chain of jobs on a real Slurm: text, tokenizer, tokens, rows, training, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slow_stage import STEP_SECONDS
from slurm_cluster import SlurmCluster, wait_until
from slurm_runs import assert_same_weights, last_step, log_of, use_test_cluster, wait_for_log

from launch.cluster.job_folders import JobFolder
from launch.commands import curriculum
from launch.composition.compose import compose_config
from launch.curriculum.entries import CurriculumConfig, EntryConfig
from launch.local.ranks import run_local

STEPS = 10
TRAIN = [
    "model=toy",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.dropout=0.1",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "model.head_dim=16",
    "model.vocabulary.text_size=310",
    "stage=vision_tokenizer",
    f"stage.steps={STEPS}",
    "stage.sequence_length=64",
    "stage.global_batch_size=4",
    "stage.micro_batch_size=1",
    "stage.objective=next_token",
    "engine=slow_stage.SlowEngine",
    "stage.optimizer.warmup_steps=0",
    "parallel.data=2",
    "checkpoint.every_steps=3",
    "logging.wandb_mode=disabled",
]


def small_curriculum(run: Path) -> CurriculumConfig:
    """Two stages train the same thing: the test interrupts the second."""
    own = [f"run_folder={run}", "name=small"]

    def stage(name: str) -> EntryConfig:
        data = f"stage.data.datasets.general.path={run}/packed"
        return EntryConfig(
            command="train", overrides=[*TRAIN, *own, f"stage.name={name}", data], needs=["pack"], outputs=[name]
        )

    entries = {
        "corpus": EntryConfig(module="slurm_corpus", overrides=[f"{run}/corpus"], outputs=["corpus"]),
        "text_tokenizer": EntryConfig(
            command="train",
            needs=["corpus"],
            outputs=["text_tokenizer"],
            overrides=[
                *own,
                "stage=toy_text_tokenizer",
                f"stage.objective.corpora=['{run}/corpus/*.tar']",
                "stage.objective.size=310",
            ],
        ),
        "tokenize": EntryConfig(
            command="tokenize",
            needs=["text_tokenizer"],
            outputs=["tokens"],
            shares=2,
            overrides=[f"input={run}/corpus/*.tar", f"target={run}/tokens", f"text_tokenizer={run}/text_tokenizer"],
        ),
        "pack": EntryConfig(
            command="pack",
            needs=["tokenize"],
            outputs=["packed"],
            overrides=[f"tokens.text={run}/tokens", f"target={run}/packed", "sequence_length=64"],
        ),
        "one": stage("one"),
        "two": stage("two"),
        "report": EntryConfig(
            command="report", needs=["one", "two"], overrides=[f"run_folder={run}"], outputs=["report.json"]
        ),
    }
    config = CurriculumConfig(name="small", run_folder=str(run), entries=entries)
    use_test_cluster(config.cluster)
    config.cluster.environment[STEP_SECONDS] = "1.0"  # time for a signal in the middle
    config.validate()
    return config


def states(config: CurriculumConfig) -> dict[str, str]:
    config.action = "status"
    answer = curriculum.run(config)
    config.action = "run"
    return {entry["name"]: entry["state"] for entry in answer["entries"]}


def job_of(config: CurriculumConfig, name: str) -> str:
    record = JobFolder(Path(config.run_folder), name).read()
    assert record is not None
    return record.job_id


@pytest.fixture(scope="module")
def finished(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> CurriculumConfig:
    run = tmp_path_factory.mktemp("small")
    config = small_curriculum(run)
    answer = curriculum.run(config)
    assert list(answer["submitted"]) == list(config.entries)
    assert set(states(config).values()) <= {"queued", "running", "done"}
    assert curriculum.run(config)["submitted"] == {}  # everything is queued already
    job_id = job_of(config, "two")
    wait_until(lambda: last_step(run, "two") >= 4 or "failed" in states(config).values(), "step 4")
    assert "failed" not in states(config).values(), {name: log_of(run, name)[-1500:] for name in config.entries}
    slurm.call("scancel", "--signal=USR1", job_id)
    wait_for_log(run, "asks to be queued again", "two")
    slurm.hurry(job_id)
    last = job_of(config, "report")
    wait_until(lambda: slurm.job(last)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the chain's end", 120)
    return config


def test_the_chain_completes_and_a_rerun_submits_nothing(finished):
    assert set(states(finished).values()) == {"done"}, states(finished)
    assert curriculum.run(finished)["submitted"] == {}


def test_status_answers_with_one_entry_a_stage(finished, capsys):
    finished.action = "status"
    answer = curriculum.run(finished)
    finished.action = "run"
    entries = {entry["name"]: entry for entry in json.loads(json.dumps(answer))["entries"]}
    assert list(entries) == list(finished.entries)
    two = entries["two"]
    assert (two["step"], two["total"], two["state"]) == (STEPS, STEPS, "done")
    assert two["tokens"] == STEPS * 4 * 64
    assert two["restarts"] == 1
    assert two["job_ids"] == [job_of(finished, "two")]
    table = curriculum.render(answer).splitlines()
    titles = "entry state done tokens rate left seconds GiB jobs restarts figures"
    assert table[0].split() == titles.split()
    assert len(table) == 1 + len(finished.entries)


def test_an_interrupted_stage_of_the_chain_has_the_weights_of_an_unbroken_one(finished):
    """The same stage once more, here: another name would mean another order of the rows."""
    run = Path(finished.run_folder)
    replaced = ("run_folder=", "engine=")
    overrides = [one for one in finished.entries["two"].overrides if not one.startswith(replaced)]
    run_local(compose_config("train", [*overrides, f"run_folder={run}/unbroken"]))
    assert_same_weights(run / "unbroken" / "two", run / "two", STEPS)
