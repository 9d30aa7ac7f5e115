"""The lock names a version of everything that the project asks for, and the one that it asks for."""

import configparser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
IN_THE_LOCK_FOR = "3.11"  # the Python that it was written with


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_lock_holds_what_setup_cfg_asks_for():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = parser["options"]["install_requires"].splitlines()
    texts += [line for extra in parser["options.extras_require"].values() for line in extra.splitlines()]
    versions = locked()
    for text in filter(None, texts):
        asked = Requirement(text)
        if asked.name != "nextstate" and (
            asked.marker is None or asked.marker.evaluate({"python_version": IN_THE_LOCK_FOR})
        ):
            assert asked.specifier.contains(versions[canonicalize_name(asked.name)]), text
