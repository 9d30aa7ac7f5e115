"""Mutated media and transcripts end no job: a small, seeded run of `benchmarks/fuzz_data.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz_data


@pytest.mark.parametrize("what", ["media", "transcripts"])
def test_no_mutant_ends_a_job(tmp_path: Path, what: str) -> None:
    if what == "media":
        files, companion, count = fuzz_data.good_media(), {"txt": b"a caption"}, 150
    else:
        files, companion, count = fuzz_data.good_transcripts(), {"mp4": fuzz_data.clip("mp4", "libx264")}, 150
    unchanged = ({extension: data, **companion} for extension, data in files)
    whole = fuzz_data.run(unchanged, fuzz_data.make_worker(tmp_path / "whole"), tmp_path / "whole")
    assert dict(whole.reasons) == {"(a document)": len(files)}  # what is mutated is good
    stream = fuzz_data.samples(files, companion, count, seed=7)
    outcome = fuzz_data.run(stream, fuzz_data.make_worker(tmp_path), tmp_path)
    assert outcome.ended == []
    assert outcome.num_without_good == 0
    assert outcome.reasons.total() == count
    assert {"(a document)", "bad_transcript" if what == "transcripts" else "corrupt_image"} <= set(outcome.reasons)
    assert not {reason for reason in outcome.reasons if reason.startswith("unexpected_")}
