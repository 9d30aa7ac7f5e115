"""What data, file names and messages can do to a terminal: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.command_line import cli
from model.errors import escapes_shown, visible

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"
STEERING = set("\x1b\x07\x9b\u202e\r")


@given(st.lists(st.integers(0, 0x2FFF) | st.integers(0xDC80, 0xDCFF)))
def test_visible_text_steers_nothing_and_says_the_same(letters: list[int]) -> None:
    text = "".join(map(chr, letters))
    shown = visible(text)
    assert all(unicodedata.category(letter) not in ("Cc", "Zl", "Zp", "Cs") or letter in "\n\t" for letter in shown)
    assert visible(shown) == shown
    assert json.loads(visible(json.dumps(text, ensure_ascii=False))) == text


@pytest.mark.parametrize("as_json", [False, True])
def test_messages_and_answers_show_escapes(tmp_path: Path, capfd: pytest.CaptureFixture[str], as_json: bool) -> None:
    """A file name of bytes that are no text, which no stream could write either."""
    name = os.fsdecode(os.fsencode(str(tmp_path / f"x{HOSTILE}")) + b"\xff")
    Path(name).mkdir()
    assert cli.main(["inspect", f'path="{name}"', f"json={as_json}"]) == 2
    output, errors = capfd.readouterr()
    assert "\\u001b]0;owned\\u0007" in errors
    assert "\\udcff" in errors
    assert not set(output + errors) & STEERING
    if as_json:
        assert name in json.loads(output)["error"]


def test_a_traceback_shows_escapes() -> None:
    code = f"from model.errors import escapes_shown\nwith escapes_shown():\n    raise ValueError({HOSTILE!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ValueError: \\u001b]0;owned" in ended.stderr
    assert not set(ended.stderr) & STEERING


def test_a_line_of_progress_goes_over_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    with escapes_shown():
        print("\rstep 1", end="")
        print("a\rb")
    assert capsys.readouterr().out == "\rstep 1a\\u000db\n"
