"""The typed records of JSON files: known fields have their types, all else is kept."""

import pytest

from model.checkpoint.manifest import CheckpointManifest, TokenizerReference
from model.errors import UserError
from training.contracts.summary import StageSummary
from training.objectives import next_token
from training.reliability.json_lines import read_json_lines
from training.reliability.watchdog import Heartbeat, read_heartbeats


def test_a_summary_keeps_everything_and_types_what_it_knows():
    values = {"name": "sft", "steps": 3, "loss_last": 2, "psnr_db": 30.5, "skipped_windows": [[0, 8]]}
    summary = StageSummary.of(values)
    assert (summary.name, summary.steps, summary.loss_last, summary.tokens) == ("sft", 3, 2, None)
    assert summary.values == values


@pytest.mark.parametrize(
    "values", [None, [], "text", {"steps": "3"}, {"steps": 1.5}, {"steps": True}, {"loss_last": "nan"}, {"name": 1}]
)
def test_a_summary_of_other_types_is_refused(values):
    with pytest.raises(ValueError, match=r"cannot be|expected"):
        StageSummary.of(values)


def test_a_manifest_names_its_tokenizers_and_its_damage():
    record = {"path": "tokenizers/text", "fingerprint": "f0"}
    values = {
        "format_version": 1,
        "keys": {},
        "kind": "transformer",
        "text_tokenizer": record,
        "vision_tokenizer": "f1",
    }
    manifest = CheckpointManifest.of(values | {"extra": 1}, "here")
    assert manifest.tokenizer("text_tokenizer") == TokenizerReference("tokenizers/text", "f0")
    assert manifest.tokenizer("vision_tokenizer") == TokenizerReference("vision_tokenizer", "f1")
    assert CheckpointManifest.of({}, "here").tokenizer("text_tokenizer") is None
    assert manifest.values["extra"] == 1
    assert (manifest.image_format, manifest.step) == ("emu35", None)
    with pytest.raises(UserError, match="manifest is damaged") as caught:
        CheckpointManifest.of(values | {"step": "ten"}, "here")
    assert (caught.value.where, "step" in caught.value.got) == ("here", True)


def test_a_damaged_line_of_a_log_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n\xff\n[4]\n{"step": 3}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_an_empty_heartbeat_is_left_out(tmp_path):
    Heartbeat(tmp_path, 0).write()
    (tmp_path / "heartbeats" / "rank_00001.json").touch()
    assert [beat["rank"] for beat in read_heartbeats(tmp_path, 3)] == [0]


def test_a_checkpoint_knows_its_tokenizers_by_place_and_fingerprint(tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    manifests = {
        "old": {"text_tokenizer": "f0", "vision_tokenizer": None},
        "new": {"text_tokenizer": "f0", "vision_tokenizer": "f1"}
        | {"tokenizer_paths": {"text_tokenizer": str(run / "text_7"), "vision_tokenizer": str(elsewhere)}},
    }
    monkeypatch.setattr(next_token, "read_dataset_manifest", manifests.get)
    assert next_token.tokenizers_of(["old"], run) == {"text_tokenizer": "f0", "vision_tokenizer": None}
    said = next_token.tokenizers_of(["new", "old"], run)
    assert said["text_tokenizer"] == {"path": "text_7", "fingerprint": "f0"}  # moves with the run
    assert said["vision_tokenizer"] == {"path": str(elsewhere), "fingerprint": "f1"}
    manifest = CheckpointManifest.of(said, tmp_path)
    checkpoint = run / "stage" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    assert manifest.tokenizer_place("vision_tokenizer", checkpoint) == elsewhere
    (run / "vision_tokenizer").mkdir()
    assert (
        manifest.tokenizer_place("vision_tokenizer", checkpoint) == run / "vision_tokenizer"
    )  # elsewhere is not there
    elsewhere.mkdir()
    assert manifest.tokenizer_place("vision_tokenizer", checkpoint) == elsewhere
    text = run / "text_7"
    text.mkdir()
    for made in (checkpoint, run / "merged"):  # a conversion's lies in the run folder itself
        assert manifest.tokenizer_place("text_tokenizer", made) == text
    (checkpoint / "vision_tokenizer").mkdir()
    assert manifest.tokenizer_place("vision_tokenizer", checkpoint) == checkpoint / "vision_tokenizer"
