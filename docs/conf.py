"""The site of these pages: `make site`. The pages of the API come from the sources, which are read, not imported."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "nextstate"
html_show_copyright = False
extensions = ["myst_parser", "autoapi.extension"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "nextstate"
autoapi_dirs = [str(ROOT / room) for room in ("model", "data_pipeline", "training", "launch")]
autoapi_root = "api"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "undoc-members", "show-inheritance", "show-module-summary"]
autoapi_python_class_content = "both"
# Docstrings are plain text with Markdown's backticks: what reStructuredText makes of them is not worth a warning.
# Megatron's names come through one module, whose imports a reader of sources cannot follow.
suppress_warnings = ["autoapi.python_import_resolution", "docutils", "ref.python", "myst.header"]
exclude_patterns = ["_build"]
