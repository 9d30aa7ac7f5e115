"""Two commands on one folder: the same configuration together, another one is told; files that cannot be had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.storage.file_errors import file_errors_are_user_errors
from data_pipeline.storage.folder_claim import claim_folder
from model.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from data_pipeline.storage.folder_claim import claim_folder
with claim_folder(Path(sys.argv[1]), "tokenize", sys.argv[2] or None):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path, configuration: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-c", HOLDER, str(folder), configuration]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_configuration_is_refused_and_the_same_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    holder = hold(folder, "one")
    try:
        with claim_folder(folder, "tokenize", "one"):
            pass
        for configuration in ("two", None):
            refused = pytest.raises(UserError, match=rf"another command[\s\S]*process {holder.pid} ")
            with refused, claim_folder(folder, "tokenize", configuration):
                pytest.fail("held by two")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with (
        claim_folder(folder, "tokenize", "two"),
        claim_folder(folder, "tokenize", "two"),
    ):  # the killed one is forgotten
        pass


def test_without_a_configuration_the_folder_is_held_alone(tmp_path: Path) -> None:
    with claim_folder(tmp_path, "pack"):
        for configuration in (None, "one"):
            started = time.monotonic()
            with pytest.raises(UserError, match="pack, process"), claim_folder(tmp_path, "pack", configuration):
                pytest.fail("held by two")
            assert time.monotonic() - started < 30
    with claim_folder(tmp_path, "pack"):
        pass


def test_what_the_system_says_of_files_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "missing", "No such file"),
    ):
        with pytest.raises(UserError, match=message) as caught, file_errors_are_user_errors("somewhere"):
            path.read_bytes()
        assert str(path) in str(caught.value)
    with pytest.raises(BrokenPipeError), file_errors_are_user_errors("somewhere"):
        raise BrokenPipeError(32, "the reader is gone")
    with pytest.raises(OSError, match="of a library"), file_errors_are_user_errors("somewhere"):
        raise OSError("of a library")
    for target in (tmp_path / "file" / "target", tmp_path / "loop" / "target"):
        with pytest.raises(UserError, match="cannot read or write"), claim_folder(target, "pack"):
            pytest.fail("no such folder can be")
