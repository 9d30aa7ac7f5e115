"""Commands in README, docs and help texts are true.

Blocks marked ```console run are executed; of every other `nextstate` line the configuration is composed, so that a key,
a group or a command that no longer exists is found.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
from documented_files import FENCE, write_shown_files

from launch.command_line import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def commands(text: str) -> list[tuple[str, bool]]:
    """(command line, to be executed?) of every `$ ` line of the console blocks."""
    found = []
    for language, marks, body in FENCE.findall(text):
        if language == "console":
            lines = [line[2:] for line in body.splitlines() if line.startswith("$ ")]
            found += [(line, "run" in marks.split()) for line in lines]
    return found


def documented(executed: bool) -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        for line, marked in commands(page.read_text(encoding="utf-8"))
        if marked == executed and line.startswith("nextstate ")
    ]


def help_examples() -> list[tuple[str, str]]:
    """`nextstate` lines of the commands' help texts, without the remarks beside them."""
    found = []
    for path in sorted((ROOT / "launch" / "commands").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
                text = ast.literal_eval(node.value).replace("\\\n", " ")
                lines = re.findall(r"^ +(nextstate .*)$", text, re.MULTILINE)
                found += [(path.name, re.split(r"\s{3,}(?=[a-z])(?!\w+[.\w]*=)", line)[0]) for line in lines]
    return found


@pytest.mark.parametrize(("page", "line"), documented(executed=True))
def test_marked_commands_run(page, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shown_files(next(path for path in PAGES if path.name == page), tmp_path)
    assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.fixture(scope="session")
def folders_of_pages(tmp_path_factory):
    """A working folder for each page that shows files of the reader's own."""
    folders = {}
    for page in PAGES:
        folder = tmp_path_factory.mktemp(page.stem)
        if write_shown_files(page, folder):
            folders[page.name] = folder
    return folders


@pytest.mark.parametrize(("page", "line"), documented(executed=False) + help_examples())
def test_other_commands_compose(page, line, folders_of_pages, monkeypatch, capsys):
    monkeypatch.chdir(folders_of_pages.get(page, "."))
    assert cli.main([*shlex.split(line)[1:], "--cfg", "job"]) == 0, capsys.readouterr().err


def test_make_targets_of_the_docs_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {
        line.split()[1]
        for page in PAGES
        for line, _ in commands(page.read_text(encoding="utf-8"))
        if line.startswith("make ")
    }
    assert used
    assert used <= targets


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_index_of_the_site():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    assert sorted(name for name in index if re.fullmatch(r"\w+", name)) == sorted(
        page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index"
    )


def test_the_check_finds_commands_of_both_kinds():
    text = "```console run\n$ nextstate a\noutput\n```\n\n```console\n$ make b\n```\n```yaml\n$ no\n```\n"
    assert commands(text) == [("nextstate a", True), ("make b", False)]
