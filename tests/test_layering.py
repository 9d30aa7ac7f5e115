"""The arrows between the packages, and the size of functions and files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "data_pipeline", "training", "launch")
ALLOWED = {
    "model": {"model"},
    "data_pipeline": {"data_pipeline", "model"},
    "training": {"training", "data_pipeline", "model"},
    "launch": {"launch", "training", "data_pipeline", "model"},
}
# Of `model`, the data pipeline sees the ids, the errors, how files are published, and the vision tokenizer.
MODEL_PARTS_OF_DATA_PIPELINE = ("model.vocabulary", "model.errors", "model.durable", "model.vision_tokenizer")
MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 500


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(tree: ast.AST) -> set[str]:
    """Absolute names of everything imported anywhere in a module, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrow"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(package: str, names: set[str]) -> list[str]:
    ours = {name for name in names if name.split(".")[0] in (*PACKAGES, "examples")}
    wrong = {name for name in ours if name.split(".")[0] not in ALLOWED[package]}
    if package == "data_pipeline":
        wrong |= {
            name for name in ours if name.startswith("model.") and not name.startswith(MODEL_PARTS_OF_DATA_PIPELINE)
        }
    return sorted(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package):
    found = {}
    for path in sources(package):
        wrong = violations(package, imported_modules(ast.parse(path.read_text(encoding="utf-8"))))
        if wrong:
            found[str(path.relative_to(ROOT))] = wrong
    assert not found


def test_the_check_of_arrows_can_fail():
    tree = ast.parse("def f():\n    from training import loop\n    import examples.shapes_world\n")
    assert violations("model", imported_modules(tree)) == ["examples.shapes_world", "training.loop"]
    assert violations("launch", imported_modules(tree)) == ["examples.shapes_world"]
    tree = ast.parse("from model.backbone.transformer import build_model\nfrom model.errors import UserError")
    assert violations("data_pipeline", imported_modules(tree)) == ["model.backbone.transformer.build_model"]


def test_functions_and_files_stay_small():
    long = []
    for path in sources(*PACKAGES, "examples"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {num_lines} lines")
    assert not long
