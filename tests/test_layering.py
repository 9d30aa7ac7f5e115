"""The house: which way the arrows point, what never imports what, no circles, and nothing grows too large.

Everything counts as an import: at the top of a module, inside a function, under TYPE_CHECKING, and the constant beginning
of what `importlib.import_module` is given. The rules are data; each has a line that breaks it, and a test that it does.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "data_pipeline", "training", "launch")
ALLOWED = {
    "model": {"model"},
    "data_pipeline": {"data_pipeline", "model"},
    "training": {"training", "data_pipeline", "model"},
    "launch": {"launch", "training", "data_pipeline", "model"},
}
# Of `model`, the data pipeline sees the ids, the errors, how files are published, and the vision tokenizer.
MODEL_PARTS_OF_DATA_PIPELINE = (
    "model.vocabulary",
    "model.errors",
    "model.durable",
    "model.registry",
    "model.vision_tokenizer",
)
MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 500
MAX_ENTRIES = {"launch": 12, "training": 13, "data_pipeline": 12, "model": 12}  # files and folders of a room
# Base names that stand twice in a room and say the same thing of two parts.
SAID_TWICE = ("base", "config", "engine", "initialization", "optimizer", "registry")


@dataclass(frozen=True)
class Never:
    """No module of `who` imports anything of `what`, `unless_who` and `unless_what` excepted. Prefixes of dotted names."""

    who: tuple[str, ...]
    what: tuple[str, ...]
    example: tuple[str, str]  # (module, import) that breaks the rule
    unless_who: tuple[str, ...] = ()
    unless_what: tuple[str, ...] = ()


NEVER = {
    "objectives never import engines": Never(
        ("training.objectives",),
        ("training.engines",),
        ("training.objectives.next_token", "from training.engines.megatron.engine import MegatronEngine"),
    ),
    "engines never import objectives or inference": Never(
        ("training.engines",),
        ("training.objectives", "training.inference"),
        ("training.engines.replicated", "import training.inference.model"),
    ),
    "callbacks never import the loop": Never(
        ("training.callbacks",), ("training.loop",), ("training.callbacks.base", "from training.loop import Run")
    ),
    "contracts import nothing of training but its configuration": Never(
        ("training.contracts",),
        ("training",),
        ("training.contracts.engine", "from training.stage import Job"),
        unless_what=("training.contracts", "training.config"),
    ),
    "rewards import only the model and the parts of a prompt": Never(
        ("training.rewards",),
        ("training", "data_pipeline"),
        ("training.rewards.rules", "from data_pipeline.tokenize import ShardTokenizer"),
        unless_what=("training.rewards", "data_pipeline.parts"),
    ),
    "generation meets the transformer in its decoder alone": Never(
        ("model.generation",),
        ("model.backbone.transformer",),
        ("model.generation.ar", "from model.backbone.transformer import build_model"),
        unless_who=("model.generation.decoder",),
    ),
    "the backbone knows nothing of generation": Never(
        ("model.backbone",),
        ("model.generation",),
        ("model.backbone.transformer", "from model.generation.decoder import decoder_forward"),
    ),
    "one module imports megatron": Never(
        ROOMS,
        ("megatron",),
        ("training.engines.megatron.engine", "from megatron.core import parallel_state"),
        unless_who=("model.parallel.megatron",),
    ),
    "one module imports numba": Never(
        ROOMS,
        ("numba",),
        ("data_pipeline.packing.window", "import numba"),
        unless_who=("data_pipeline.packing.kernels",),
    ),
    "one folder imports deepspeed": Never(
        ROOMS, ("deepspeed",), ("training.stage", "import deepspeed"), unless_who=("training.engines.deepspeed",)
    ),
    "composition imports no cluster": Never(
        ("launch.composition",),
        ("launch.cluster",),
        ("launch.composition.compose", "from launch.cluster.profile import ClusterConfig"),
    ),
    "commands are imported by their registry alone": Never(
        ROOMS,
        ("launch.commands",),
        ("launch.commands.generate", "from launch.commands.evaluate import run"),
        unless_who=("launch.composition.registry",),
    ),
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def imported_modules(tree: ast.AST) -> set[str]:
    """Absolute names of everything imported anywhere in a module, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrow"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names |= dynamic_import(node.args[0])
    return names


def dynamic_import(argument: ast.expr) -> set[str]:
    """`import_module("a.b")` and the constant beginning of `import_module(f"a.b.{name}")`; empty for a variable."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return {argument.value.rstrip(".")}
    return set()


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What every module of the rooms imports."""
    return {
        module_name(path): imported_modules(ast.parse(path.read_text(encoding="utf-8"))) for path in sources(*ROOMS)
    }


def wrong_rooms(module: str, names: set[str]) -> list[str]:
    room = module.split(".")[0]
    ours = {name for name in names if name.split(".")[0] in (*ROOMS, "examples")}
    wrong = {name for name in ours if name.split(".")[0] not in ALLOWED[room]}
    if room == "data_pipeline":
        wrong |= {
            name for name in ours if name.startswith("model.") and not is_below(name, MODEL_PARTS_OF_DATA_PIPELINE)
        }
    return sorted(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room, imports):
    found = {module: wrong_rooms(module, names) for module, names in imports.items() if is_below(module, [room])}
    assert not {module: wrong for module, wrong in found.items() if wrong}


def test_the_check_of_arrows_can_fail():
    tree = ast.parse("def f():\n    from training import loop\n    import examples.shapes_world\n")
    assert wrong_rooms("model.config", imported_modules(tree)) == ["examples.shapes_world", "training.loop"]
    assert wrong_rooms("launch.inspection", imported_modules(tree)) == ["examples.shapes_world"]
    tree = ast.parse("from model.backbone.transformer import build_model\nfrom model.errors import UserError")
    assert wrong_rooms("data_pipeline.tokenize", imported_modules(tree)) == ["model.backbone.transformer.build_model"]


def broken(rule: Never, imports: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """The modules that break a rule, and with what."""
    found = {}
    for module, names in imports.items():
        if is_below(module, rule.who) and not is_below(module, rule.unless_who):
            wrong = [name for name in names if is_below(name, rule.what) and not is_below(name, rule.unless_what)]
            if wrong:
                found[module] = sorted(wrong)
    return found


@pytest.mark.parametrize("rule", NEVER.values(), ids=NEVER.keys())
def test_never(rule, imports):
    assert not broken(rule, imports)


@pytest.mark.parametrize("rule", NEVER.values(), ids=NEVER.keys())
def test_every_rule_can_fail(rule):
    module, line = rule.example
    for code in (line, f"def f():\n    {line}\n", f"if TYPE_CHECKING:\n    {line}\n"):
        assert list(broken(rule, {module: imported_modules(ast.parse(code))})) == [module]


def test_a_name_in_import_module_is_an_import():
    found = imported_modules(ast.parse("importlib.import_module(f'launch.commands.{name}'); import_module('megatron')"))
    assert found == {"launch.commands", "megatron"}
    assert imported_modules(ast.parse("import_module(name)")) == set()


def module_graph(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Module -> modules of the rooms that it imports; `from a.b import c` counts as `a.b.c` where that is a module."""
    graph: dict[str, set[str]] = {module: set() for module in imports}
    for module, names in imports.items():
        for name in names:
            while name and name not in imports:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def folder_graph(graph: Mapping[str, set[str]], folder: str) -> dict[str, set[str]]:
    """Between the folders that stand in `folder`."""
    depth = folder.count(".") + 2

    def below(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:depth]) if is_below(module, [folder]) and len(parts) > depth else ""

    arrows: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        start = below(module)
        for end in map(below, targets):
            if start and end and start != end:
                arrows[start].add(end)
    return dict(arrows)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that all reach each other, each sorted."""
    reached = {node: reachable(graph, node) for node in graph}
    groups = {tuple(sorted(other for other in reached[node] if node in reached.get(other, ()))) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph.get(node, ())
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_of_modules(room, imports):
    assert not [circle for circle in circles(module_graph(imports)) if is_below(circle[0], [room])]


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_of_folders(room, imports):
    graph = module_graph(imports)
    folders = {".".join(module.split(".")[:-1]) for module in imports if is_below(module, [room])}
    assert not {folder: found for folder in folders if (found := circles(folder_graph(graph, folder)))}


def test_the_check_of_circles_can_fail():
    code = {"launch.a.x": "from launch.b import y", "launch.b.y": "def f():\n    import launch.c.z", "launch.b": ""}
    code["launch.c.z"] = "if TYPE_CHECKING:\n    from launch.a.x import X"
    graph = module_graph({module: imported_modules(ast.parse(text)) for module, text in code.items()})
    assert circles(graph) == [["launch.a.x", "launch.b.y", "launch.c.z"]]
    assert circles(folder_graph(graph, "launch")) == [["launch.a", "launch.b", "launch.c"]]
    # Two folders may point at each other without a circle of modules.
    graph = {"launch.a.x": {"launch.b.x"}, "launch.b.y": {"launch.a.y"}, "launch.a.y": set(), "launch.b.x": set()}
    assert circles(graph) == []
    assert circles(folder_graph(graph, "launch")) == [["launch.a", "launch.b"]]


def entries(folder: Path) -> list[str]:
    """Files and folders that stand in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_few_entries(room):
    found = entries(ROOT / room)
    assert len(found) <= MAX_ENTRIES[room], found


def test_entries_are_counted(tmp_path):
    for name in ("__init__.py", "a.py", "style.css"):
        (tmp_path / name).touch()
    for name in ("__pycache__", "b"):
        (tmp_path / name).mkdir()
    assert entries(tmp_path) == ["a.py", "b", "style.css"]


def names_for_two_things(modules: Iterable[str]) -> dict[str, list[str]]:
    """Base names that stand twice among the modules of a room."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        by_name[module.rpartition(".")[2]].append(module)
    return {name: found for name, found in by_name.items() if len(found) > 1 and name not in SAID_TWICE}


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_for_two_things(room):
    paths = [path for path in sources(room) if path.name != "__init__.py"]
    assert not names_for_two_things(map(module_name, paths))


def test_the_check_of_names_can_fail():
    modules = ["launch.plan.layout", "launch.report.layout", "launch.plan.config", "launch.report.config"]
    assert names_for_two_things(modules) == {"layout": ["launch.plan.layout", "launch.report.layout"]}


def test_functions_and_files_stay_small():
    long = []
    for path in sources(*ROOMS, "examples"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {num_lines} lines")
    assert not long
