"""The site of these pages: `make site`. The pages of the API come from the sources, which are read, not imported."""

import re
import sys
from pathlib import Path
from typing import Any

from astroid.manager import AstroidManager

ROOT = Path(__file__).resolve().parent.parent

ROOMS = ("model", "data_pipeline", "training", "launch")


class OtherPackages(set[str]):
    """Every module that is neither ours nor Python's own: to know what a decorator of torch's is, all of torch would be read."""

    def __contains__(self, name: object) -> bool:
        top = str(name).partition(".")[0]
        return top not in ROOMS and top not in sys.stdlib_module_names and top != ""


AstroidManager.brain["module_denylist"] = OtherPackages()

project = "nextstate"
html_show_copyright = False
extensions = ["myst_parser", "autoapi.extension"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "nextstate"
autoapi_dirs = [str(ROOT / room) for room in ROOMS]
autoapi_root = "api"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "undoc-members", "show-inheritance", "show-module-summary"]
autoapi_python_class_content = "both"
# Docstrings are plain text with Markdown's backticks: what reStructuredText makes of them is not worth a warning.
# Megatron's names come through one module, whose imports a reader of sources cannot follow.
suppress_warnings = ["autoapi.python_import_resolution", "docutils", "ref.python", "myst.header"]
exclude_patterns = ["_build"]

TOCTREE = re.compile(r"\.\. toctree::\n(?: +:.*\n)*\n((?: +\S+\n)+)")


def outside_of_the_margin(app: Any, name: str, content: list[str]) -> None:
    """Modules are listed on the pages of their packages, not in the margin of every page: that took a second and more a page."""
    if name.startswith("api/"):
        text = TOCTREE.sub(lambda found: "".join(f"- :doc:`{page}`\n" for page in found[1].split()), content[0])
        content[0] = f":orphan:\n\n{text}"


def setup(app: Any) -> None:
    app.connect("source-read", outside_of_the_margin)
